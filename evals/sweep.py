"""The effect of top_k: the same weights under many sizes of MoBA, against full attention, paired by document.

A setting is a block size, top_k, gate and first_blocks in the layers that have MoBA (in the full ones, if none has).
Each is measured on the same held-out documents: mean and trailing loss minus those under full attention, beside the
attended share of the causal pairs. For a run trained or validated on recall tasks also the share of right answers, and
for any model that of probes in the same documents (evals/probes.py), and the share of full attention's probability that
the selected blocks hold. Each finished document is kept (evals/ledger.py), so that an interrupted sweep resumes.

Shapes: S settings, full attention first; N documents; B buckets; L layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from fractions import Fraction
from itertools import product

import numpy as np
import torch

from conf.numbers import format_length, parse_length
from data.packing import Batch
from data.tokenizer import load_tokenizer
from evals import probes
from evals.context import Context
from evals.ledger import Countdown, Ledger
from evals.loading import attention_label, attention_plan, with_moba
from evals.position_loss import evaluate
from evals.protocol import Eval, Job, Result, names
from evals.recall import own_tasks, score, synthetic_source
from evals.routing import observed
from evals.sinks import SINKS, MobaWithSinks
from evals.swap import under
from evals.sweep_report import FULL, Setting, SweepReport, page
from moba.attention import attend
from moba.documents import Documents
from moba.kinds import GATES, AttentionSpec, Moba
from moba.kinds.moba import MEAN
from train.record.position_loss import default_num_buckets
from train.record.throughput import batch_work

Plan = tuple[AttentionSpec, ...]
TOP_K = "1..8"
WITH_SINKS = "sinks"
"""What `gates` calls MoBA that also sees the first tokens."""
CAPTURED = "captured"
MOST = 10_000


def run(job: Job) -> Result:
    """The sweep over the settings asked for."""
    seq_len, own = job.seq_len, job.context.model.attention
    plans = {FULL: tuple(spec.dense() for spec in own)} | _settings(job, seq_len)
    tokenizer = load_tokenizer(job.trained.config.data.tokenizer)
    documents, samples = job.held_out(), job.integer("samples", 64)
    tasks = {name: synthetic_source(job, config) for name, config in own_tasks(job.trained.config.data).items()}
    parts: dict[str, list[tuple[str, Callable[[Context], Sequence[float | None]]]]] = {"loss": []}
    for document in documents:
        parts["loss"].append((document[0], lambda context, one=document: _losses(context, one, seq_len)))
    for name, source in tasks.items():
        count = min(samples, source.num_documents)
        parts[name] = [(str(i), lambda context, s=source, i=i: _right(context, s.sample(i))) for i in range(count)]
    configs = {name: asdict(source.config) for name, source in tasks.items()}
    asked = names(job.values, "probes", probes.TASKS, default="") if job.values.get("probes") else []
    for task in asked:
        for name, batch in documents:
            found = probes.of_document(name, batch, tokenizer, task, seq_len)
            parts.setdefault(task, []).append((name, lambda context, found=found: _known(context, found)))
    if job.values.get(CAPTURED) == "true":
        parts[CAPTURED] = [(name, lambda context, one=batch: _captured(context, one)) for name, batch in documents]
    ids = [name for name, _ in documents]
    ledger = Ledger(job, "sweep", {"seq_len": seq_len, "documents": ids, "tasks": configs})
    also = "".join(f", {name}" for name in [*tasks, *asked])
    job.say(
        f"sweep: {len(plans) - 1} settings and full attention on {len(documents)} documents of "
        f"{format_length(seq_len)} tokens{also}; parts are kept in {ledger.path}"
    )
    found = _measure(job, plans, parts, ledger)
    clusters = [job.context.cluster_of(name) for name in ids]
    works = {setting: batch_work(plan, (seq_len,)) for setting, plan in plans.items()}
    report = SweepReport(
        settings=list(plans),
        attended_S=np.array([work.attended_pairs / work.causal_pairs for work in works.values()]),
        losses_SNB=found.pop("loss"),
        captured_SNL=found.pop(CAPTURED, None),
        clusters=clusters,
        right_SN=found,
        probes=asked,
        seq_len=seq_len,
        title=job.title,
    )
    return report.result()


def _measure(job: Job, plans: Mapping[Setting, Plan], parts, ledger: Ledger) -> dict[str, np.ndarray]:
    """By part: float64 [S, N, values] of every setting and document, on every rank."""
    context = job.context
    mine = {name: list(range(len(own)))[context.rank :: context.world_size] for name, own in parts.items()}
    work = {name: len(plans) * len(indices) for name, indices in mine.items()}
    countdown = Countdown(job, "sweep", work, unit="documents")
    alone = replace(context, rank=0, world_size=1, reduce=lambda tensor: tensor, bars=False)
    keys = {setting: _key(setting, plan) for setting, plan in plans.items()}
    for setting, plan in plans.items():
        with under(context.model, plan):
            for name, indices in mine.items():
                for i in indices:
                    key = (*keys[setting], name, i)
                    if key in ledger:
                        countdown.skip(1, name)
                        continue
                    ledger.put({key: parts[name][i][1](alone)})
                    countdown.step(1, 1, name)
    found, widths = {}, {"loss": default_num_buckets(job.seq_len), CAPTURED: len(context.model.attention)}
    for name, own in parts.items():
        values = torch.zeros(len(plans), len(own), widths.get(name, 3), dtype=torch.float64, device=context.device)
        for s, setting in enumerate(plans):
            for i in mine[name]:
                row = [np.nan if value is None else value for value in ledger[(*keys[setting], name, i)]]
                values[s, i] = torch.tensor(row, dtype=torch.float64)
        found[name] = context.reduce(values).cpu().numpy()
    return found


def _key(setting: Setting, plan: Plan) -> tuple:
    """A setting's key in the ledger; with the plan, since a name may later refer to another."""
    return setting if setting.block_size or setting == FULL else (*setting, repr(plan))


@torch.no_grad()
def _losses(context: Context, document, seq_len: int) -> list[float | None]:
    """The document's mean loss in each bucket, None where it has no supervised token."""
    row = evaluate(context, [document], seq_len=seq_len).document_loss[0]
    return [float(value) if np.isfinite(value) else None for value in row]


@torch.no_grad()
def _right(context: Context, sample) -> list[float]:
    """[right answers, answers, nats per token summed over answers] of a recall document."""
    right_A, nats_A = score(context.model, sample, context.device)
    return [float(right_A.sum()), float(len(right_A)), float(nats_A.sum())]


@torch.no_grad()
def _known(context: Context, asked: Sequence[probes.Probe]) -> list[float]:
    """The same for a document's probes."""
    found = probes.score(context.model, asked, context.device)
    return [float(sum(right for right, _ in found)), float(len(found)), sum(nats for _, nats in found)]


@torch.no_grad()
def _captured(context: Context, batch: Batch) -> list[float]:
    """By layer, how much of full attention's probability the attention in force sees, were its queries and keys those
    of the model with full attention: mean over heads and queries that drop a block; 1 where none does."""
    plan, found = context.model.attention, [1.0] * len(context.model.attention)
    layers = [i for i, spec in enumerate(plan) if spec.routing is not None]
    batch = batch.to(context.device)

    def observe(place: int, spec: AttentionSpec, q, k, v, documents: Documents) -> None:
        own = plan[layers[place]]
        assert own.routing is not None
        routed_T = documents.layout(own.routing.block_size).query_block_T >= own.routing.top_k
        (_, sparse_HT), (_, full_HT) = (attend(q, k, v, kind, documents, return_lse=True) for kind in (own, spec))
        assert sparse_HT is not None and full_HT is not None
        if routed_T.any():
            found[layers[place]] = float((sparse_HT - full_HT)[:, routed_T].double().exp().mean())

    with under(context.model, [spec.dense() for spec in plan]), observed(context.model, layers, observe):
        context.model.logits(batch.tokens, batch.positions, batch.documents, rows=batch.tokens.new_zeros(1))
    return found


def _settings(job: Job, seq_len: int) -> dict[Setting, Plan]:
    """The settings asked for, without those that equal full attention at this length. ValueError if none is left."""
    own = job.context.model.attention
    named = {}
    for word in _words(job.values.get("attentions", "")):
        if word:
            named[Setting(0, 0, attention_label(word), 0)] = attention_plan(word, job.trained)
    routing = next((spec.routing for spec in own if spec.routing is not None), None)
    if "block_sizes" not in job.values and routing is None:
        if named:
            return named
        raise ValueError(
            "no layer of the model is MoBA here; name block_sizes=, or an attention such as attention=512x3"
        )
    default = str(routing.block_size) if routing else ""
    blocks = [_length("block_sizes", word) for word in _words(job.values.get("block_sizes", default))]
    gates = names(job.values, "gates", (*GATES, WITH_SINKS), default=routing.gate if routing else MEAN)
    firsts = whole_numbers(job.values, "first_blocks", str(routing.first_blocks if routing else 0), least=0)
    plans, dense = {}, 0
    for block_size, gate, first in product(blocks, gates, firsts):
        if gate == WITH_SINKS and first != firsts[0]:
            continue  # it has none
        first = 0 if gate == WITH_SINKS else first
        for top_k in _top_ks(job.values, block_size, seq_len):
            if first and first >= top_k:
                continue  # with the query's own block they would exceed top_k
            sinks = gate == WITH_SINKS
            plan = with_moba(own, MobaWithSinks(block_size, top_k) if sinks else Moba(block_size, top_k, gate, first))
            if block_size * top_k >= seq_len:
                dense += 1
            else:
                plans[Setting(block_size, top_k, gate, first)] = plan
    if not plans:
        raise ValueError(f"top_k, block_sizes: every setting is full attention at {format_length(seq_len)} tokens")
    if dense:
        job.say(f"note: {dense} settings are full attention at {format_length(seq_len)} tokens, and left out")
    return plans | named


def _top_ks(values: Mapping[str, str], block_size: int, seq_len: int) -> list[int]:
    """The values of top_k=, or those that fill the shares of budgets= with blocks of this size."""
    if "budgets" not in values:
        return whole_numbers(values, "top_k", TOP_K, least=1)
    if "top_k" in values:
        raise ValueError(f"budgets={values['budgets']}, top_k={values['top_k']}: give one of the two")
    try:
        shares = [Fraction(word) for word in _words(values["budgets"])]
    except (ValueError, ZeroDivisionError):
        shares = [Fraction(0)]
    if not all(0 < share < 1 for share in shares):
        raise ValueError(f"budgets={values['budgets']}: shares of the length above 0 and below 1, such as 1/4,1/8")
    return sorted({max(1, int(share * seq_len / block_size)) for share in shares})


def whole_numbers(values: Mapping[str, str], key: str, default: str, least: int) -> list[int]:
    """The integers given for a key, such as 3, 1..8 or [1,2,4..6], ascending; ValueError for others."""
    found: set[int] = set()
    for word in _words(values.get(key, default)):
        match = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", word)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if last < first or first < least or last > MOST:
            raise ValueError(
                f"{key}={values.get(key, default)}: {word!r} is no number from {least} to {MOST:,}, or range as 1..8"
            )
        found |= set(range(first, last + 1))
    return sorted(found)


def _words(text: str) -> Sequence[str]:
    return [word.strip() for word in text.strip("[]").split(",")]


def _length(key: str, word: str) -> int:
    try:
        return parse_length(word)
    except ValueError as error:
        raise ValueError(f"{key}={word}: {error}") from None


EVAL = Eval(
    name="sweep",
    about="the same weights over block sizes, top_k, gates and first blocks: the loss minus full attention's, document "
    "by document, against the attended share of the pairs.",
    run=run,
    keys={
        "block_sizes": "such as [128,256] (default: that of the attention in force)",
        "top_k": f"blocks a query attends to, including its own: a number, list or range (default {TOP_K})",
        "budgets": "instead of top_k: shares of the length that a query sees at most, such as 1/4,1/8",
        "attentions": "more settings, each as attention= takes it: such as plan.yaml,512x3+1",
        "gates": f"of {', '.join(GATES)} (default: that of the attention in force), or {WITH_SINKS}: the first {SINKS} "
        "tokens besides MoBA's blocks",
        "first_blocks": "of a document that are always seen, such as [0,1] (default: as the attention in force)",
        CAPTURED: "true: also the share of full attention's probability that the selected blocks hold",
        "samples": "documents of each recall task the run was trained or validated on (default 64)",
        "probes": f"of {', '.join(probes.TASKS)}: numbers said once in each document and asked for at its end, four "
        "places each (default: none)",
    },
    choices={CAPTURED: ("true", "false")},
    heading="What k is worth",
    page=page,
)
