"""Needle in a haystack: how often the same weights find a fact, by context length and depth, under each attention.

Two scores. `exact`: the greedy continuation begins with the answer. `ranked`: of ten candidate answers the right one
has the highest log-likelihood; chance is 10 %, and this also measures models that cannot yet generate an answer.
Prompts of one length are read in batches, the text before the needle once for all depths, and the prompt once for arms
with the same prefill (evals/answering.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch

from conf.numbers import format_length
from data.tokenizer import Tokenizer, load_tokenizer
from evals.answering import (
    ABOUT_ARMS,
    ABOUT_BESIDE,
    ARMS,
    Arm,
    Reader,
    batch_tokens,
    by_prompt,
    chosen_arms,
    chosen_lengths,
    work_kind,
)
from evals.context import Context
from evals.ledger import Countdown, Ledger
from evals.needle_report import SCORES, NeedleReport, page
from evals.needle_text import FORMS, SPARE_TOKENS, Sample, make_sample
from evals.protocol import Eval, Job, Result, names

LENGTHS = ("1K", "2K", "4K", "8K", "12K", "16K", "24K", "32K")
SEED = 0


@dataclass(frozen=True)
class Grid:
    """What is measured."""

    forms: list[str]
    lengths: list[int]
    depths: list[float]
    """Percent of the text before the needle."""
    samples: int


def run(job: Job) -> Result:
    """The grid of a model under each arm."""
    grid = _grid(job)
    arms = chosen_arms(job, ",".join(ARMS))
    groups = by_prompt(arms)
    tokenizer = load_tokenizer(job.trained.config.data.tokenizer)
    ledger = Ledger(job, "needle", {"seed": SEED, "tokenizer": tokenizer.fingerprint})
    units = _units(grid, batch_tokens(job.context))
    for form in grid.forms:
        make_sample(form, tokenizer, min(grid.lengths), SEED, 0)  # fails now if that is too short
    cells = len(grid.forms) * len(grid.lengths) * len(grid.depths)
    job.say(
        f"needle: {cells} cells of {grid.samples} samples, up to {format_length(max(grid.lengths))} tokens, under "
        f"{', '.join(arm.name for arm in arms)}; parts are kept in {ledger.path}"
    )
    sizes = (len(SCORES), len(grid.forms), len(arms), len(grid.lengths), len(grid.depths), grid.samples)
    right = torch.zeros(sizes, dtype=torch.float64, device=job.context.device)
    mine = units[job.context.rank :: job.context.world_size]
    work = Counter[str]()
    for (_, length, indices), group in product(mine, groups.values()):
        work[work_kind(group, length)] += length * len(indices)
    countdown = Countdown(job, "needle", work, unit="answers")
    for form, length, indices in mine:
        for plan, group in groups.items():
            _measure(job.context, plan, group, form, length, indices, grid.depths, tokenizer, ledger, countdown)
        for a, arm in enumerate(arms):
            for d, depth in enumerate(grid.depths):
                for i in indices:
                    found = ledger[form, arm.key, length, depth, i]
                    place = (grid.forms.index(form), a, grid.lengths.index(length), d, i)
                    right[(slice(None), *place)] = torch.tensor(found[: len(SCORES)], dtype=torch.float64)
    report = NeedleReport(
        grid.forms,
        [arm.name for arm in arms],
        grid.lengths,
        grid.depths,
        job.context.reduce(right).cpu().numpy(),
        job.title,
        job.dense_up_to,
    )
    return report.result(SEED)


@torch.inference_mode()
def _measure(
    context: Context,
    plan: Sequence,
    arms: Sequence[Arm],
    form: str,
    length: int,
    indices: Sequence[int],
    depths: Sequence[float],
    tokenizer: Tokenizer,
    ledger: Ledger,
    countdown: Countdown,
) -> None:
    """Puts into the ledger what is missing of some samples at all depths, under the arms that share a prompt's plan."""
    work, kind = length * len(indices), work_kind(arms, length)

    def lacks(depth: float, i: int) -> bool:
        return any((form, arm.key, length, depth, i) not in ledger for arm in arms)

    indices = [i for i in indices if any(lacks(depth, i) for depth in depths)]
    missing = [depth for depth in depths if any(lacks(depth, i) for i in indices)]
    if not missing:
        countdown.skip(work, kind)
        return
    samples = [make_sample(form, tokenizer, length, SEED, i) for i in indices]
    answer = max(len(candidate) for sample in samples for candidate in sample.candidates) + SPARE_TOKENS
    reader = Reader(context.model, len(samples), tokenizer.vocab_size, capacity=length + answer)
    reader.read([sample.head for sample in samples], plan)
    places = [0] * len(samples)
    for depth in missing:
        before, places = places, [sample.place(depth / 100) for sample in samples]
        reader.read([s.text[start:stop] for s, start, stop in zip(samples, before, places)], plan)
        mark = reader.mark()
        reader.read([s.needle + s.text[place:] + s.question for s, place in zip(samples, places)], plan)
        found = {}
        for arm in arms:
            for i, (scores, text) in zip(indices, _answers(reader, samples, arm, tokenizer)):
                found[form, arm.key, length, depth, i] = (*scores, text)
        reader.rewind(mark)
        ledger.put(found)
        countdown.step(work / len(missing), len(found), kind)


def _answers(
    reader: Reader, samples: Sequence[Sample], arm: Arm, tokenizer: Tokenizer
) -> list[tuple[tuple[bool, bool], str]]:
    """(SCORES, generated text) of each sample."""
    room = max(len(sample.candidates[0]) for sample in samples) + SPARE_TOKENS
    written = reader.greedy(room, arm.decode, stop={tokenizer.eos_id})
    texts = [tokenizer.decode(tokens).strip() for tokens in written]
    likely = np.array(reader.score([sample.candidates for sample in samples], arm.decode))[:, :, 0]
    best = likely[:, 0] > likely[:, 1:].max(1)  # not where it is one of equals, or NaN
    return [((text.startswith(s.answer), bool(b)), text) for s, text, b in zip(samples, texts, best)]


def _units(grid: Grid, tokens: int) -> list[tuple[str, int, list[int]]]:
    """(form, length, samples) of batches of at most `tokens` tokens, to be shared among processes."""
    units = []
    for form in grid.forms:
        for length in grid.lengths:
            size = max(1, tokens // length)
            units += [
                (form, length, list(range(start, min(start + size, grid.samples))))
                for start in range(0, grid.samples, size)
            ]
    return units


def _grid(job: Job) -> Grid:
    """What was asked for."""
    depths = job.integer("depths", 10)
    return Grid(
        forms=names(job.values, "forms", FORMS, default=",".join(FORMS)),
        lengths=chosen_lengths(job, LENGTHS),
        depths=np.linspace(0, 100, depths).round(1).tolist() if depths > 1 else [50.0],
        samples=job.integer("samples", 10),
    )


EVAL = Eval(
    name="needle",
    about="a fact hidden in a long text, over length and depth: written or ranked, under the attention in force, full "
    "attention, and both.",
    run=run,
    keys={
        "forms": "essay (a sentence in the shipped held-out works) and key_value (a pair among pairs); default: both",
        "lengths": f"tokens of the contexts (default: of {','.join(LENGTHS)} up to the run's own)",
        "depths": "places of the needle, evenly from the start to the end (default 10)",
        "samples": "texts of each length and depth (default 10)",
        "arms": f"of {ABOUT_ARMS} (default: all)",
        "beside": ABOUT_BESIDE,
    },
    heading="Needle in a haystack",
    page=page,
)
