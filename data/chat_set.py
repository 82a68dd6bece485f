"""A small chat set made from the shipped books: questions whose answers stand far back in a long document.

`data.sources.<name>.path=embedded-chat:<length>` (with format=chat) names the conversations that fit `length` tokens
of the run's tokenizer and template. Each opens with a passage of a book, and every turn asks for something that has
to be copied from it: the line behind a given one, or how a line that is begun goes on. Which passages and questions,
is a function of the length, the tokenizer and SEED alone. Made to try out and to measure fine-tuning where no real
chat data is at hand; an assistant does not come out of it.
"""

from __future__ import annotations

import json
import lzma
import random
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from data.sft import ChatEncoder

VERSION = 1  # of the set: another one has other conversations
SEED = 20
TOTAL_TOKENS, MOST, FEWEST = 4_000_000, 2_000, 64
LEAST_LENGTH = 256
SYSTEM = "Answer with the words of the text."
SHORT, LONG = 25, 90  # characters of a line that is asked about


def num_conversations(length: int) -> int:
    """How many conversations the set of this length has."""
    return max(FEWEST, min(MOST, TOTAL_TOKENS // length))


def read_works(books: Path) -> list[tuple[str, list[str]]]:
    """(id, lines as they are printed) of each book in a jsonl.xz file; empty and very long lines left out."""
    with lzma.open(books, "rt", encoding="utf-8") as file:
        rows = [json.loads(row) for row in file]
    works = [(row["id"], [line.strip() for line in row["text"].split("\n")]) for row in rows]
    return [(name, [line for line in lines if 0 < len(line) <= LONG]) for name, lines in works]


def conversations(books: Path, length: int, encoder: ChatEncoder) -> Iterator[tuple[str, str]]:
    """(id, messages as JSON) of the set made from the books in a jsonl.xz file. Half of the conversations are as long
    as `length` allows, the others down to an eighth of it."""
    works = read_works(books)
    for number in range(num_conversations(length)):
        rng = random.Random(f"{SEED} {length} {number}")
        target = length if rng.random() < 0.5 else int(length * 8 ** -rng.random())
        name, lines = works[_pick(rng, len(works))]
        messages = _conversation(rng, lines, target, encoder)
        yield f"{name}-{number}", json.dumps(messages, ensure_ascii=False)


def _conversation(rng: random.Random, lines: list[str], target: int, encoder: ChatEncoder) -> list[dict[str, str]]:
    """A conversation of at most `target` + 1 tokens about lines from somewhere in a work, with as many as fit."""
    start = _pick(rng, max(1, len(lines) - target // 8))
    num_lines, tokens = 0, 0
    while tokens < target and start + num_lines < len(lines):
        tokens += len(encoder.tokenizer.encode(lines[start + num_lines] + "\n"))
        num_lines += 1
    seed, per_line = rng.random(), tokens / num_lines
    while True:
        messages = _asked(random.Random(str(seed)), lines[start : start + num_lines], 1 + target // 512)
        over = len(encoder.encode(messages)[0]) - (target + 1)
        if over <= 0 or num_lines <= 4:
            return messages
        num_lines = max(4, num_lines - max(1, int(over / per_line)))


def _asked(rng: random.Random, passage: list[str], most: int) -> list[dict[str, str]]:
    """The messages about a passage: one to four questions, `most` at most, about lines that occur once in it."""
    once = {line for line, count in Counter(passage).items() if count == 1}
    pairs = [(a, b) for a, b in pairwise(passage) if a in once and min(len(a), len(b)) >= SHORT]
    pairs = pairs or list(pairwise(passage))
    messages = [{"role": "system", "content": SYSTEM}] if rng.random() < 0.25 else []
    text = "\n".join(passage) + "\n\n"
    for _ in range(min(1 + _pick(rng, 4), most, len(pairs))):
        line, following = pairs.pop(_pick(rng, len(pairs)))
        words = line.split(" ")
        if rng.random() < 0.5 or len(words) < 4:
            question, answer = f"Which line follows this one? {line}", following
        else:
            begun = " ".join(words[: len(words) // 2])
            question, answer = f"How does this line go on? {begun}", " ".join(words[len(words) // 2 :])
        messages += [{"role": "user", "content": text + question}, {"role": "assistant", "content": answer}]
        text = ""
    return messages


def _pick(rng: random.Random, count: int) -> int:
    """A number below `count`, from what Python keeps the same between its versions."""
    return int(rng.random() * count)
