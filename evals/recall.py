"""Recall tasks under several attentions: the share of answers that the same weights get right, and from how far back.

Scored with teacher forcing, in one pass per document: an answer counts if each of its tokens is the most likely one,
which is equivalent to greedy decoding with the same attention giving it. `far` answers are those whose evidence lies
`top_k` blocks back or more and not in a block that is always attended (first_blocks), where only the gate can reach it;
the control gates of moba/gates.py say whether it did. How often each head's gate picks that block is reported beside
what FlashMoBA's signal-to-noise model expects. A setting tests the gate only with many blocks of which few are
attended: otherwise random blocks do as well.

Shapes: N documents, A answers of a document (padded with NaN), W variants of attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conf.numbers import format_length
from conf.schema import DataConfig, SyntheticConfig
from data.synthetic import SIZES, Sample, SyntheticSource
from data.tokenizer import load_tokenizer
from evals.context import Context
from evals.page import image
from evals.page import table as html_table
from evals.protocol import Eval, Job, Result, names
from evals.recall_report import EVIDENCE, Gates, RecallReport, draw_recall, table
from evals.routing import observed
from evals.routing_numbers import evidence_blocks
from evals.swap import VARIANTS, under, variant
from moba.documents import Documents
from moba.kinds import AttentionSpec, Full, Moba
from train.model.decoder import Decoder


@torch.no_grad()
def recall(
    context: Context, source: SyntheticSource, *, samples: int, variants: tuple[str, ...] = VARIANTS
) -> RecallReport:
    """The RecallReport of a model on the first `samples` documents of the source, on every rank. With MoBA layers in
    the current plan under its `variants` (evals/swap.py), else as it is ("full"). All ranks run the same number of
    forward passes."""
    model, plan, count = context.model, context.model.attention, min(samples, source.num_documents)
    routing = next((spec.routing for spec in plan if spec.routing is not None), None)
    variants = (Full.name,) if routing is None else variants
    documents = [source.sample(i) for i in range(count)]
    width = max(len(document.answers) for document in documents)
    layers = [i for i, spec in enumerate(plan) if spec.routing is not None]
    sums = torch.zeros(2, len(variants), count, width, dtype=torch.float64, device=context.device)
    shape = (len(EVIDENCE), len(layers), model.config.num_heads, count, width)
    gate_sums = torch.zeros(shape, dtype=torch.float64, device=context.device)
    for w, name in enumerate(variants):
        with under(model, variant(plan, name)):
            for index, counts in context.share(count, source.config.task):
                own = layers if name == Moba.name else []
                with observed(model, own, _observer(gate_sums, documents[index], index if counts else None)):
                    scores_2A = score(model, documents[index], context.device)
                if counts:
                    sums[:, w, index, : scores_2A.shape[1]] = scores_2A
    correct_WNA, nll_WNA = context.reduce(sums).cpu().numpy()
    distance_NA, blocks_NA = (np.full((count, width), np.nan) for _ in range(2))
    is_first_NA = np.zeros((count, width), dtype=bool)
    for i, document in enumerate(documents):
        for a, (start, _, needle) in enumerate(document.answers):
            distance_NA[i, a] = start - needle
            # The answer's first token is predicted by the query before it.
            if routing is None:
                continue
            block = needle // routing.block_size
            blocks_NA[i, a] = (start - 1) // routing.block_size - block
            is_first_NA[i, a] = block < routing.first_blocks
    missing_NA = ~np.isfinite(distance_NA)
    correct_WNA[:, missing_NA] = nll_WNA[:, missing_NA] = np.nan
    blocks_NA = None if routing is None else blocks_NA
    gates = Gates([plan[i] for i in layers], layers, *context.reduce(gate_sums).cpu().numpy()) if layers else None
    return RecallReport(source, variants, correct_WNA, nll_WNA, distance_NA, blocks_NA, routing, is_first_NA, gates)


def _observer(sums: Tensor, sample: Sample, index: int | None) -> Callable:
    """An observer that puts what each layer's gate does with the evidence of a document's answers into `sums`
    [EVIDENCE, L, H, N, A]; None for `index`: nothing."""
    start_A, _, needle_A = torch.tensor(sample.answers, device=sums.device).T

    def see(place: int, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> None:
        if index is not None:
            assert spec.routing is not None
            found = evidence_blocks(spec.routing, q, k, documents, start_A - 1, needle_A)
            sums[:, place, :, index, : len(start_A)] = torch.stack([found[name] for name in EVIDENCE])

    return see


def score(model: Decoder, sample: Sample, device: torch.device | str) -> Tensor:
    """float64 [2, A]: whether greedy decoding gives each answer, and its mean loss in nats per token."""
    tokens = torch.from_numpy(sample.tokens).to(device)
    wanted = [torch.arange(start, start + length) for start, length, _ in sample.answers]
    place = torch.cat(wanted).to(device)
    documents = Documents.from_lengths([len(tokens) - 1], device=device)
    positions = torch.arange(len(tokens) - 1, device=device)
    scores = model.logits(tokens[:-1], positions, documents, rows=place - 1).float()
    right = scores.argmax(-1) == tokens[place]
    nll = torch.nn.functional.cross_entropy(scores, tokens[place], reduction="none")
    sizes = [len(part) for part in wanted]
    return torch.stack(
        [
            torch.stack([part.all() for part in right.split(sizes)]).double(),
            torch.stack([part.mean() for part in nll.split(sizes)]).double(),
        ]
    )


def run(job: Job) -> Result:
    """Recall on generated documents of each task asked for."""
    sources = {config.task: synthetic_source(job, config) for config in _tasks(job)}
    samples = job.integer("samples", 64)
    reports = {}
    for task, source in sources.items():
        job.say(f"recall: {samples} documents of {task}, {format_length(source.config.length)} tokens")
        reports[task] = recall(job.context, source, samples=samples)
    return result(reports)


def result(reports: Mapping[str, RecallReport]) -> Result:
    """The reports of some tasks as files and text."""
    arrays = {f"{task}_{name}": getattr(r, f"{name}_WNA") for task, r in reports.items() for name in ("correct", "nll")}
    arrays |= {f"{task}_distance": report.distance_NA for task, report in reports.items()}
    configs = [report.source.config for report in reports.values()]
    return Result(
        length=max(config.length for config in configs),
        record={"tasks": {task: report.summary() for task, report in reports.items()}},
        text=table(reports),
        numbers={f"{t}_{row['attention']}": row["all"]["accuracy"] for t, r in reports.items() for row in r.rows()},
        arrays=arrays,
        figures={"": lambda path: draw_recall(reports, path)},
        seed=min(config.seed for config in configs),
    )


def _tasks(job: Job) -> list[SyntheticConfig]:
    """The tasks asked for by name; else those that the run was trained or validated on; else all."""
    own = own_tasks(job.trained.config.data)
    if "tasks" not in job.values and own and "seq_len" not in job.values:
        return list(own.values())
    chosen = names(job.values, "tasks", SIZES, default=",".join(own or SIZES))
    routings = [spec.routing for spec in job.trained.model.attention if spec.routing is not None]
    block_size = routings[0].block_size if routings else 64
    found = [replace(own.get(name, SyntheticConfig(task=name)), length=job.seq_len) for name in chosen]
    # Only where it matters, so that other tasks have the same documents under all block sizes.
    return [replace(one, block_size=block_size) if one.task == "straddle" else one for one in found]


def own_tasks(data: DataConfig) -> dict[str, SyntheticConfig]:
    """The tasks that a run was trained or validated on, by name."""
    sources = (*data.sources.values(), data.validation)
    return {one.synthetic.task: one.synthetic for one in sources if one and one.synthetic}


def synthetic_source(job: Job, config: SyntheticConfig) -> SyntheticSource:
    """The task's held-out documents, in the run's vocabulary."""
    vocab_size = load_tokenizer(job.trained.config.data.tokenizer).vocab_size
    return SyntheticSource(config.task, config, vocab_size, held_out=True)


def page(record: Mapping[str, Any], path: Path) -> str:
    """The shares of right answers, and the figure."""
    rows = []
    for task, found in record["tasks"].items():
        for row in found["variants"]:
            shares = []
            for what in ("all", "far"):
                value, (low, high) = row[what]["accuracy"], row[what]["interval_95"]
                shares.append("" if value is None else f"{value:.3f} ({low:.3f} to {high:.3f})")
            judged = {True: "yes", False: "no: too few blocks", None: ""}[found["gate_matters"]]
            rows.append((task, row["attention"], *shares, f"{row['all']['nll']:.3f}", judged))
    columns = ("task", "attention", "right answers", "of far evidence", "nats per token", "tests the gate")
    return html_table(columns, rows) + image(path.with_suffix(".png"))


EVAL = Eval(
    name="recall",
    about="the share of right answers in generated tasks, of those that need the gate, under the same attentions.",
    run=run,
    keys={
        "tasks": "such as [mqar,passkey] (default: the run's own, else all)",
        "samples": "documents of each task (default 64)",
    },
    heading="Recall",
    page=page,
)
