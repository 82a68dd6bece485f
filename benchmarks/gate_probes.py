"""Retrieval probes inside long texts: a number is said once, far back, and has to be known again at the end.

Each probe is a held-out document with sentences put in between: `pass_key` has one, `key_value` eight of different
names, one of which is asked for. The tokens of a number are the same in both places, whatever the tokenizer does at
their edges. Numbers depend on nothing but the document, task and depth.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.packing import Batch
from data.tokenizer import Tokenizer
from moba.documents import one_document
from train.model.decoder import Decoder

PAIRS = 8
ASKED = (1, 3, 5, 7)
"""Which of PAIRS places in the text, evenly spread, is asked for: depths 3/16, 7/16, 11/16, 15/16."""
TASKS = ("pass_key", "key_value")
NAMES = ("Anna", "Boris", "Clara", "David", "Emma", "Felix", "Greta", "Henry")
DIGITS = 5


@dataclass(frozen=True, eq=False)
class Probe:
    """A text that ends with the answer to a question."""

    document: str
    task: str
    depth: float
    """Where the answer was said, as a share of the text."""
    tokens_T: Tensor
    """int64: the text without the answer's last token, as many tokens as asked for."""
    answer: list[int]
    """Its tokens; the last positions of the text predict them."""


def probes(documents: Iterable[tuple[str, Batch]], tokenizer: Tokenizer, length: int) -> Iterator[Probe]:
    """A probe for each document (of at least `length` tokens), task and depth, each of `length` tokens."""
    for name, batch in documents:
        for task in TASKS:
            for place in ASKED:
                yield make_probe(name, batch.tokens.tolist(), tokenizer, task, place, length)


def make_probe(document: str, filler: list[int], tokenizer: Tokenizer, task: str, place: int, length: int) -> Probe:
    """The probe whose answer is said at `place` of PAIRS."""
    generator = random.Random(f"{document} {task} {place}")
    numbers = ["".join(generator.choices("0123456789", k=DIGITS)) for _ in range(PAIRS)]
    names = generator.sample(NAMES, PAIRS)
    told = [place] if task == "pass_key" else range(PAIRS)

    asks = [_encode(tokenizer, f"\nThe pass key of {name} is") for name in names]
    answers = [_encode(tokenizer, f" {number}") for number in numbers]
    end = _encode(tokenizer, ". Remember it.\n")
    sentences = {pair: [*asks[pair], *answers[pair], *end] for pair in told}
    question, answer = asks[place], answers[place]
    room = length + 1 - sum(map(len, sentences.values())) - len(question) - len(answer)
    assert 0 < room <= len(filler), (length, room, len(filler))
    tokens, used = [], 0
    for pair in told:
        at = round(room * (pair + 0.5) / PAIRS)
        tokens += [*filler[used:at], *sentences[pair]]
        used = at
    tokens += [*filler[used:room], *question, *answer]
    assert len(tokens) == length + 1, (len(tokens), length)
    return Probe(document, task, (place + 0.5) / PAIRS, torch.tensor(tokens[:-1]), answer)


def score(model: Decoder, probe: Probe, device: torch.device) -> tuple[bool, float]:
    """(whether each token of the answer is the likeliest, given those before it; mean nats of these tokens)."""
    length, count = len(probe.tokens_T), len(probe.answer)
    positions, answer = torch.arange(length, device=device), torch.tensor(probe.answer, device=device)
    logits_aV = model.logits(
        probe.tokens_T.to(device), positions, one_document(length, length, device), rows=positions[length - count :]
    ).float()
    nats = torch.nn.functional.cross_entropy(logits_aV, answer)
    return bool((logits_aV.argmax(dim=-1) == answer).all()), float(nats)


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return np.asarray(tokenizer.encode(text)).astype(int).tolist()
