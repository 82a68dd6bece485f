"""Retrieval probes in long texts: a number is stated once, far back, and asked for at the end.

Each probe is a held-out document with inserted sentences: `pass_key` has one, `key_value` eight with different names,
one of which is asked for. The number has the same tokens in both places, whatever the tokenizer does at its edges.
Numbers depend only on document, task and depth.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from data.packing import Batch
from data.tokenizer import Tokenizer
from moba.documents import Documents
from train.model.decoder import Decoder

PAIRS = 8
ASKED = (1, 3, 5, 7)
"""Which of PAIRS evenly spread places is asked for: depths 3/16, 7/16, 11/16, 15/16."""
TASKS = ("pass_key", "key_value")
NAMES = ("Anna", "Boris", "Clara", "David", "Emma", "Felix", "Greta", "Henry")
DIGITS = 5


@dataclass(frozen=True, eq=False)
class Probe:
    """A text that ends with the answer to a question."""

    document: str
    task: str
    depth: float
    """Where the answer was stated, as a fraction of the text."""
    tokens_T: Tensor
    """int64 [T]: the text without the answer's last token, T the length asked for."""
    answer: list[int]
    """Its tokens; the last positions of the text predict them."""


def probes(documents: Iterable[tuple[str, Batch]], tokenizer: Tokenizer, length: int) -> Iterator[Probe]:
    """A probe for each document (of at least `length` tokens), task and depth, each of `length` tokens."""
    for name, batch in documents:
        for task in TASKS:
            yield from of_document(name, batch, tokenizer, task, length)


def of_document(name: str, batch: Batch, tokenizer: Tokenizer, task: str, length: int) -> list[Probe]:
    """Its probes of a task, one per place."""
    return [make_probe(name, batch.tokens.tolist(), tokenizer, task, place, length) for place in ASKED]


def make_probe(document: str, filler: list[int], tokenizer: Tokenizer, task: str, place: int, length: int) -> Probe:
    """The probe whose answer is stated at `place` of PAIRS."""
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


def score(model: Decoder, asked: Sequence[Probe], device: torch.device | str) -> list[tuple[bool, float]]:
    """Of each probe (whether greedy decoding gives the answer, mean nats of its tokens). All are read in one pass,
    packed as documents."""
    lengths = [len(probe.tokens_T) for probe in asked]
    rows = [end - len(p.answer) + torch.arange(len(p.answer)) for p, end in zip(asked, accumulate(lengths))]
    positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
    tokens = torch.cat([probe.tokens_T for probe in asked]).to(device)
    answers = torch.tensor([token for probe in asked for token in probe.answer], device=device)
    documents = Documents.from_lengths(lengths, device=device)
    logits_aV = model.logits(tokens, positions, documents, rows=torch.cat(rows).to(device)).float()
    nats = torch.nn.functional.cross_entropy(logits_aV, answers, reduction="none").tolist()
    right = (logits_aV.argmax(dim=-1) == answers).tolist()
    ends = list(accumulate((len(probe.answer) for probe in asked), initial=0))
    return [(all(right[a:b]), sum(nats[a:b]) / (b - a)) for a, b in pairwise(ends)]


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return np.asarray(tokenizer.encode(text)).astype(int).tolist()
