"""Cuts held-out windows out of long documents: equally many of each group, from anywhere in the document, so that what
the loss by position shows is context and not how documents begin.

    python benchmarks/windows.py source=corpus/validation.parquet to=windows.jsonl group=package

Ids are <group>:<id>:<number>; the groups take turns, so that the first n windows are as many of each as can be. Then
launch/prepare_data.py tokenises them.

    python benchmarks/windows.py source=shards/validation to=cuts

takes from such shards the last 512 of the first 8K tokens of each document with 1K, 2K and 4K before them, as
shards in cuts/1024 and so on: the study `small` evaluates the same tokens after less context.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow.parquet as parquet

from benchmarks.common import read_json, whole_numbers
from data.shards import META, TokenShards, write_meta, write_shard
from data.tokenizer import load_tokenizer
from launch.cli import UsageError, exits_on, key_values

KEYS = {
    "source": "parquet file with the columns id, text and the group's; or token shards",
    "to": "the .jsonl; of token shards a folder",
    "group": "column: documents with the same value belong together (default package)",
    "windows": "of a group at most (default 12)",
    "characters": "of a window (default 40000: 8K tokens of bpe-4k and more)",
}
LENGTH, LAST, CONTEXTS = 8192, 512, (1024, 2048, 4096)


@exits_on(ValueError, OSError)
def main() -> None:
    """The command; see the module's text."""
    values = key_values(sys.argv[1:], KEYS, about=__doc__, required=["source", "to"])
    if Path(values["source"], META).is_file():
        return ends(Path(values["source"]), Path(values["to"]))
    group = values.get("group", "package")
    (most,), (size,) = (
        whole_numbers(values, key, value) for key, value in (("windows", "12"), ("characters", "40000"))
    )
    if not Path(values["source"]).is_file():
        raise UsageError(f"source={values['source']}: no such file (parquet) or folder of shards")
    rows = parquet.read_table(values["source"], columns=["id", "text", group]).to_pylist()
    texts = {name: [row for row in rows if row[group] == name] for name in sorted({row[group] for row in rows})}
    generator, turns = random.Random(0), []
    for name, documents in texts.items():
        found = [
            {"id": f"{name}:{row['id']}:{i}", "text": text}
            for row, count in zip(documents, shares([len(row["text"]) // size for row in documents], most))
            for i, text in enumerate(cut(row["text"], count, size))
        ]
        generator.shuffle(found)
        turns.append(found)
    order = [found[-1 - i] for i in range(most) for found in turns if i < len(found)]
    Path(values["to"]).write_text("".join(json.dumps(one) + "\n" for one in order), encoding="utf-8")
    print(f"{len(order)} windows of {len(texts)} groups in {values['to']}")


def ends(source: Path, to: Path) -> None:
    """Writes shards of the ends of documents of at least LENGTH tokens and one, LAST tokens after CONTEXTS."""
    shards, tokenizer = TokenShards(source), load_tokenizer(read_json(source / META)["tokenizer"]["name"])
    known = [i for i, length in enumerate(shards.lengths.tolist()) if length > LENGTH]
    for context in CONTEXTS:
        folder = to / str(context)
        folder.mkdir(parents=True)
        tokens = [np.array(shards.tokens(i, LENGTH - LAST - context, LENGTH + 1)) for i in known]
        record = write_shard(folder, 0, tokens, [shards.ids[i] for i in known])
        write_meta(folder, tokenizer, [record], {"title": f"ends of {source.name}"})
    print(f"ends of {len(known)} documents in {to}")


def shares(room: Sequence[int], most: int) -> list[int]:
    """Windows of each document: as even as its room allows, `most` together at most."""
    taken = [0] * len(room)
    while sum(taken) < most and any(a < b for a, b in zip(taken, room)):
        taken[min((i for i in range(len(room)) if taken[i] < room[i]), key=taken.__getitem__)] += 1
    return taken


def cut(text: str, count: int, size: int) -> list[str]:
    """That many parts of the text, evenly spaced, each from the beginning of a line."""
    starts = [i * (len(text) - size) // max(1, count - 1) for i in range(count)]
    starts = [text.rfind("\n", 0, start) + 1 for start in starts]
    return [text[start : start + size] for start in starts]


if __name__ == "__main__":
    main()
