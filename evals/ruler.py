"""RULER: 13 long-context tasks, with NVIDIA's own samples, generation lengths and scorers (evals/ruler_data.py).

Prompts end with the beginning of the answer, so models without instruction tuning can answer; decoding is greedy, up to
the task's number of tokens or EOS. A prediction scores the share of the references that it contains (for questions with
several right answers: whether it contains one).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import version
from itertools import product

import torch

from conf.numbers import format_length
from data.tokenizer import Tokenizer, load_tokenizer
from evals.answering import (
    ABOUT_ARMS,
    ABOUT_BESIDE,
    HYBRID,
    Arm,
    Reader,
    batch_tokens,
    by_prompt,
    chosen_arms,
    chosen_lengths,
    work_kind,
)
from evals.ledger import Countdown, Ledger
from evals.protocol import Eval, Job, Result, names
from evals.ruler_data import SEED, Ruler, RulerSample, cleaned
from evals.ruler_report import RulerReport, page
from train.engine import collectives

LENGTHS = ("4K", "8K", "16K", "32K", "64K", "128K")
FOLDER = "ruler_samples"
MOST_SAMPLES = 5000


def run(job: Job) -> Result:
    """The scores of a model under each arm."""
    ruler, context = Ruler(), job.context
    tasks = names(job.values, "tasks", ruler.tasks, default=",".join(ruler.tasks))
    arms, lengths, number = chosen_arms(job, HYBRID), chosen_lengths(job, LENGTHS), job.integer("samples", 500)
    if number > MOST_SAMPLES:
        raise ValueError(f"samples={number}: RULER's question sets have enough for {MOST_SAMPLES} at most")
    groups = by_prompt(arms)
    tokenizer = load_tokenizer(job.trained.config.data.tokenizer)
    samples = _samples(job, ruler, tasks, tokenizer, lengths, number)
    settings = {
        "package": version("nvidia-long-context-eval"),
        "tokenizer": tokenizer.fingerprint,
    }
    ledger = Ledger(job, "ruler", settings)
    job.say(
        f"ruler: {len(tasks)} tasks, {number} samples each, at {', '.join(map(format_length, lengths))} tokens, under "
        f"{', '.join(arm.name for arm in arms)}; parts are kept in {ledger.path}"
    )
    mine = list(_units(samples, batch_tokens(context)))[context.rank :: context.world_size]
    work = Counter[str]()
    for (_, length, indices), group in product(mine, groups.values()):
        work[work_kind(group, length)] += length * len(indices)
    countdown = Countdown(job, "ruler", work, unit="answers")
    sums = torch.zeros(len(arms), len(tasks), len(lengths), number, dtype=torch.float64, device=context.device)
    for name, length, indices in mine:
        task, asked = ruler.tasks[name], samples[name, length]
        key = partial(_key, name, length, asked)
        for plan, group in groups.items():
            missing = [i for i in indices if not all(key(arm, i) in ledger for arm in group)]
            countdown.skip(length * (len(indices) - len(missing)), work_kind(group, length))
            if not missing:
                continue
            prompts = [_prompt(tokenizer, asked[i].prompt) for i in missing]
            capacity = max(map(len, prompts)) + task.tokens_to_generate
            reader = Reader(context.model, len(missing), tokenizer.vocab_size, capacity)
            with torch.inference_mode():
                reader.read(prompts, plan)
                found = {}
                for arm in group:
                    written = reader.greedy(task.tokens_to_generate, arm.decode, stop={tokenizer.eos_id})
                    found |= {key(arm, i): tokenizer.decode(ids) for i, ids in zip(missing, written)}
            ledger.put(found)
            countdown.step(length * len(missing), len(found), work_kind(group, length))
        for a, arm in enumerate(arms):
            texts = [cleaned(ledger[key(arm, i)]) for i in indices]
            scores = task.scores(texts, [asked[i].answers for i in indices])
            sums[a, tasks.index(name), lengths.index(length), indices] = torch.tensor(scores).to(sums)
    counts = [[len(samples[name, length]) for length in lengths] for name in tasks]
    report = RulerReport(
        tasks=tasks,
        all_tasks=list(ruler.tasks),
        arms=[arm.name for arm in arms],
        lengths=lengths,
        scores_ATLN=context.reduce(sums).cpu().numpy(),
        counts_TL=counts,
        stand_in=[
            name for name in tasks if any(not sample.exact for length in lengths for sample in samples[name, length])
        ],
        title=job.title,
        dense_up_to=job.dense_up_to,
    )
    return report.result(SEED)


def _samples(
    job: Job, ruler: Ruler, tasks: Sequence[str], tokenizer: Tokenizer, lengths: Sequence[int], number: int
) -> dict[tuple[str, int], list[RulerSample]]:
    """By task and length. The processes share the generation of missing samples, then read them all."""
    folder, context = job.folder / FOLDER, job.context
    wanted = [(name, length) for length in lengths for name in tasks]
    for i, (name, length) in enumerate(wanted[context.rank :: context.world_size]):
        if not i % len(tasks):
            job.say(f"ruler: making samples of {format_length(length)} tokens in {folder}, unless they are there")
        ruler.samples(name, tokenizer, length, number, folder)
    if context.world_size > 1:
        collectives.barrier()
    return {(name, length): ruler.samples(name, tokenizer, length, number, folder) for name, length in wanted}


def _key(name: str, length: int, asked: Sequence[RulerSample], arm: Arm, i: int) -> tuple:
    """Of an answer in the ledger."""
    return arm.key, name, length, i, asked[i].exact


def _units(samples: dict[tuple[str, int], list[RulerSample]], tokens: int) -> Iterator[tuple[str, int, list[int]]]:
    """(task, length, samples) of batches of at most `tokens` tokens."""
    for (name, length), asked in samples.items():
        size = max(1, tokens // length)
        for start in range(0, len(asked), size):
            yield name, length, list(range(start, min(start + size, len(asked))))


def _prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    return ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(text).tolist()


EVAL = Eval(
    name="ruler",
    about="RULER's 13 tasks with NVIDIA's samples and scorers, over length, and the effective length (extra ruler).",
    run=run,
    keys={
        "tasks": "such as [niah_single_1,vt] (default: all 13)",
        "lengths": f"tokens of a prompt with its answer (default: of {','.join(LENGTHS)} up to the run's own)",
        "samples": "of each task and length (default 500)",
        "arms": f"of {ABOUT_ARMS} (default: {HYBRID})",
        "beside": ABOUT_BESIDE,
    },
    heading="RULER",
    page=page,
)
