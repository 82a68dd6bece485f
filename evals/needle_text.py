"""Prompts with a needle: a fact at a given depth of a long text, and a question for it at the end.

Two forms. `essay`: a sentence about a city between the sentences of the held-out works that ship with the project.
`key_value`: a pair among pairs that look the same, answered by copying the value of the same key; small models learn
that first. The other candidates of a ranking are, in `key_value`, values of the same list, so that having seen the list
is not enough; in `essay`, activities that the text does not mention.

A prompt has exactly the length asked for, the answer and spare tokens included. All depths of a sample share their
text, so that it can be read once.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from conf.schema import SourceConfig
from data.sources import SHIPPED_TEXT
from data.text import Documents
from data.tokenizer import Tokenizer

ESSAY, KEY_VALUE = FORMS = ("essay", "key_value")
CANDIDATES = 10
SPARE_TOKENS = 2  # after the answer, which the model may spell with more tokens

CITIES = ("Lisbon", "Nairobi", "Kyoto", "Quito", "Tromso", "Hanoi", "Valencia", "Adelaide", "Montreal", "Tbilisi")
THINGS = (
    "ride the last tram up to the old castle",
    "eat warm bread on the steps of the mill",
    "watch the fishing boats come in at dawn",
    "climb the bell tower before it gets hot",
    "rent a bike and follow the river inland",
    "drink mint tea on a roof above the port",
    "hear the brass band in the rose gardens",
    "swim in the lake behind the town museum",
    "buy a paper kite and fly it from a roof",
    "walk the city wall with a bag of apples",
    "sketch the lions in front of a big bank",
    "play chess with strangers under the oak",
)
"""All of one length, or a ranking would compare lengths."""


@dataclass(frozen=True, eq=False)
class Sample:
    """A text, and where a needle can go. Token ids throughout."""

    head: list[int]
    """The prompt before the text."""
    text: list[int]
    cuts: list[int]
    """Token offsets of the boundaries of sentences, or pairs; ascending, from 0 to the text's length."""
    needle: list[int]
    question: list[int]
    candidates: list[list[int]]
    """Answers, the right one first."""
    answer: str
    """The right one, as text."""

    def place(self, depth: float) -> int:
        """The cut nearest to this fraction of the text."""
        return min(self.cuts, key=lambda cut: abs(cut - depth * len(self.text)))

    def prompt(self, depth: float) -> list[int]:
        """The whole prompt, with the needle at this depth."""
        place = self.place(depth)
        return self.head + self.text[:place] + self.needle + self.text[place:] + self.question


def make_sample(form: str, tokenizer: Tokenizer, length: int, seed: int, index: int) -> Sample:
    """The `index`-th sample of a form for contexts of `length` tokens. ValueError for a length with no room for text
    around the needle."""
    rng = random.Random(f"{seed} {form} {length} {index}")
    make = _essay if form == ESSAY else _key_value
    return make(tokenizer, length, rng)


def _essay(tokenizer: Tokenizer, length: int, rng: random.Random) -> Sample:
    city: str = rng.choice(CITIES)
    things: list[str] = list(rng.sample(THINGS, CANDIDATES))
    needle = f" The best thing to do in {city} is to {things[0]}."
    # "is to", since models put a "to" in front of a bare verb, and an answer has to begin as the needle does.
    question = f"\n\nQuestion: What is the best thing to do in {city}?\nAnswer: The best thing to do in {city} is to"
    return _fill(tokenizer, length, "", needle, question, things, _sentences(rng))


def _key_value(tokenizer: Tokenizer, length: int, rng: random.Random) -> Sample:
    seen: set[str] = set()

    def fresh() -> str:
        while (word := f"{rng.getrandbits(32):08x}") in seen:
            pass
        seen.add(word)
        return word

    key, values = fresh(), [fresh() for _ in range(CANDIDATES)]
    head = "Each line is a key and its value.\n"
    question = f"\nThe line of the key {key} once more:\n{key}:"

    def pairs() -> Iterator[str]:
        """The other candidates' pairs among the first ones, so that they are in every text, then any."""
        yield from (f"{fresh()}: {value}\n" for value in values[1:])
        while True:
            yield f"{fresh()}: {fresh()}\n"

    return _fill(tokenizer, length, head, f"{key}: {values[0]}\n", question, values, pairs(), shuffle=rng)


def _fill(
    tokenizer: Tokenizer,
    length: int,
    head: str,
    needle: str,
    question: str,
    answers: list[str],
    pieces: Iterator[str],
    shuffle: random.Random | None = None,
) -> Sample:
    """The sample, with as many pieces of text as fit: first the end of the one that does not fit, then the others,
    shuffled with `shuffle`."""

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text).tolist()

    before = ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + ids(head)
    parts = {"needle": ids(needle), "question": ids(question), "candidates": [ids(f" {answer}") for answer in answers]}
    longest = max(map(len, parts["candidates"]))
    room = length - len(before) - len(parts["needle"]) - len(parts["question"]) - longest - SPARE_TOKENS
    if room < length // 4:
        raise ValueError(
            f"lengths={length}: too short for a needle, which takes {length - room} tokens of this tokenizer; give at "
            f"least {2 * (length - room)}"
        )
    kept: list[list[int]] = []
    while room > 0:
        kept.append(ids(next(pieces))[-room:])
        room -= len(kept[-1])
    last = kept.pop()  # its beginning may be missing
    if shuffle is not None:
        shuffle.shuffle(kept)
    text: list[int] = []
    cuts = [0]
    for piece in (last, *kept):
        text += piece
        cuts.append(len(text))
    return Sample(before, text, cuts, answer=answers[0], **parts)


def _sentences(rng: random.Random) -> Iterator[str]:
    """The sentences of the shipped held-out works from a random one on, work after work, endlessly."""
    works = _works()
    work = rng.randrange(len(works))
    start = rng.randrange(len(works[work]))
    while True:
        yield from works[work][start:]
        work, start = (work + 1) % len(works), 0


@lru_cache(maxsize=1)
def _works() -> list[list[str]]:
    """Each work's sentences, with leading white space."""
    files = [SHIPPED_TEXT["embedded-validation"]]
    config = SourceConfig(path="embedded-validation")
    return [re.split(r"(?<=[.!?])(?=\s)", text) for _, text in Documents(config).of_files(files)]
