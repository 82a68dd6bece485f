"""Texts in which much of what comes next stood before, far back: to train small models that look things up.

Three kinds, a third of the documents each. `pairs`: lines of a key and its value, of which half say an earlier pair
once more. `told`: a passage of a book, and between its words sentences that say a number of somebody, or what to do in
a town, half of them again. `book`: a passage alone. How far back the earlier one stands is drawn evenly from the
logarithm of the distance, so that documents are of use at every length. The names are not those that
evals/needle_text.py and evals/probes.py ask for. A document is a function of (SEED, its number, the books) alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

SEED = 23
KINDS = ("pairs", "told", "book")
CHARACTERS = 48_000
"""Of a document: 12K tokens or more of the shipped tokenizers."""
GAP = 400
"""Characters of a book between two told sentences, in the mean."""
NAMES = (
    *("Ada", "Agnes", "Bela", "Bruno", "Carl", "Celia", "Dirk", "Dora", "Egon", "Elsa", "Fanny", "Georg", "Hilda"),
    *("Igor", "Jana", "Karl", "Lena", "Milan", "Nora", "Otto", "Paula", "Rolf", "Sonja", "Tomas", "Ulla", "Viktor"),
)
TOWNS = ("Bergen", "Cadiz", "Delft", "Evora", "Ghent", "Haifa", "Izmir", "Jena", "Leeds", "Nantes", "Oslo", "Riga")
VERBS = ("visit", "look at", "listen to", "walk around", "paint", "photograph", "draw", "wait for")
THINGS = ("harbour", "market", "organ", "lighthouse", "old bridge", "clock", "park", "fountain", "theatre", "station")
WHEN = ("in the morning", "at noon", "after dark", "on a Sunday", "in winter", "when it rains", "before breakfast")


def document(number: int, books: Sequence[str]) -> tuple[str, str]:
    """(id, text) of a document, with passages of these books."""
    kind, rng = KINDS[number % len(KINDS)], random.Random(f"{SEED} {number}")
    make = {"pairs": _pairs, "told": _told, "book": _book}[kind]
    return f"{kind}-{number}", make(rng, books)


def _pairs(rng: random.Random, books: Sequence[str]) -> str:
    def fresh() -> str:
        return f"{rng.getrandbits(32):08x}: {rng.getrandbits(32):08x}\n"

    lines = _with_repetitions(rng, fresh)
    text = ["Each line is a key and its value.\n"]
    length = 0
    while length < CHARACTERS:
        text.append(next(lines))
        length += len(text[-1])
    return "".join(text)


def _told(rng: random.Random, books: Sequence[str]) -> str:
    numbers = {name: f"{rng.randrange(10**5):05d}" for name in NAMES}
    rng.shuffle(names := list(NAMES))
    rng.shuffle(towns := list(TOWNS))
    sayings = [f"\nThe pass key of {name} is {numbers[name]}. Remember it.\n" for name in names]
    for town in towns:
        thing = f"{rng.choice(VERBS)} the {rng.choice(THINGS)} {rng.choice(WHEN)}"
        sayings.append(f" The best thing to do in {town} is {thing}.")
    rng.shuffle(sayings)
    left = iter(sayings)
    lines = _with_repetitions(rng, lambda: next(left, None) or rng.choice(sayings))
    passage, text, at = _book(rng, books), [], 0
    while at < len(passage):
        step = max(20, int(rng.expovariate(1 / GAP)))
        end = passage.find(" ", at + step)
        end = len(passage) if end < 0 else end
        text += [passage[at:end], next(lines)]
        at = end
    return "".join(text)


def _book(rng: random.Random, books: Sequence[str]) -> str:
    book = rng.choice(books)
    start = rng.randrange(max(1, len(book) - CHARACTERS))
    return book[start : start + CHARACTERS]


def _with_repetitions(rng: random.Random, fresh: Callable[[], str]) -> Iterator[str]:
    """New lines, and as many that stood before."""
    lines: list[str] = []
    while True:
        if lines and rng.random() < 0.5:
            back = int(len(lines) ** rng.random())
            line = lines[-max(1, back)]
        else:
            line = fresh()
        lines.append(line)
        yield line
