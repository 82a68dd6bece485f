"""Makes and tokenises the texts (data/retrieval_set.py) of the study `retrieval`.

    python benchmarks/retrieval.py to=results/texts
    python benchmarks/study.py retrieval to=results/retrieval data=results/texts/shards jobs=3

An interrupted command goes on where it was.
"""

from __future__ import annotations

import json
import lzma
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.common import whole_numbers
from data import retrieval_set
from data.sources import SHIPPED_TEXT
from launch import prepare_data
from launch.cli import exits_on, key_values

KEYS = {
    "to": "folder of the texts; the shards go to shards/ in it",
    "documents": "of 48,000 characters each (default 1200)",
    "workers": "processes (default 8)",
}


@exits_on(ValueError, OSError)
def main() -> None:
    """The command; see the module's text."""
    values = key_values(sys.argv[1:], KEYS, about=__doc__, required=["to"])
    (documents,), (workers,) = (whole_numbers(values, *key) for key in (("documents", "1200"), ("workers", "8")))
    to = Path(values["to"])
    to.mkdir(parents=True, exist_ok=True)
    parts = [part.tolist() for part in np.array_split(np.arange(documents), workers)]
    with ProcessPoolExecutor(workers) as pool:
        list(pool.map(partial(write_texts, to), range(workers), parts))
    prepare = {"source": to / "*.jsonl", "to": to / "shards", "tokenizer": "bpe-4k", "workers": workers, "shard_mb": 2}
    prepare_data.main([f"{key}={value}" for key, value in prepare.items()])


def write_texts(folder: Path, index: int, numbers: list[int]) -> None:
    """Writes the documents of these numbers, unless they are there."""
    file = folder / f"{index:03d}_{len(numbers)}.jsonl"
    if file.is_file():
        return
    with lzma.open(SHIPPED_TEXT["embedded"], "rt", encoding="utf-8") as books:
        known = [json.loads(row)["text"] for row in books]
    rows = (retrieval_set.document(number, known) for number in numbers)
    text = "".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in rows)
    file.with_suffix(".part").write_text(text, encoding="utf-8")
    file.with_suffix(".part").rename(file)


if __name__ == "__main__":
    main()
