"""The same weights under other attentions: separates what was never learned, what routing loses and what sparsity
costs.

Variants, each with the budget of the MoBA layers (full layers stay full): `full`, `moba` (the current plan), `oracle`
(the blocks with the most attention probability), `random` and `local` (moba/gates.py). oracle - full is the cost of
sparsity, moba - oracle that of the gate, random - moba the gate's gain. A model that is as good under random blocks
does not use its router.

And prefill x decode: the last tokens of each document are read with a cache of the tokens before them, each part sparse
or full. The paper and its released code prefill with MoBA and decode with full attention, which can hide what the
router misses; sparse x sparse is the strict number. Reading the last tokens as one chunk gives the same losses as
decoding one by one.

Shapes: N documents, m last tokens, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conf.numbers import format_length
from data.packing import Batch
from evals.comparison import plot_positions
from evals.context import Context
from evals.page import image, table
from evals.position_loss import Evaluation, evaluate
from evals.protocol import Eval, Job, Result
from evals.statistics import clustered_mean, half_width
from moba.documents import one_document
from moba.kinds import AttentionSpec, Full, Moba
from moba.layer import KVCache
from train.model.decoder import Decoder

OWN, DENSE = PARTS = (Moba.name, Full.name)
VARIANTS = Moba.VARIANTS


def variant(plan: Sequence[AttentionSpec], name: str) -> tuple[AttentionSpec, ...]:
    """The plan with its MoBA layers in this variant; full layers stay as they are."""
    return tuple(spec.variants().get(name, spec) for spec in plan)


@contextmanager
def under(model: Decoder, plan: Sequence[AttentionSpec]):
    """Context in which the model has another attention plan."""
    before = model.attention
    model.set_attention(plan)
    try:
        yield
    finally:
        model.set_attention(before)


@dataclass(frozen=True, eq=False)
class SwapReport:
    """Losses of one set of weights under each variant."""

    evaluations: dict[str, Evaluation]
    """By VARIANTS name, on the same documents."""
    last_loss_NPD: np.ndarray
    """[N, prefill, decode] mean loss of each document's last tokens; both in the order of PARTS."""
    last_kl_NPD: np.ndarray
    """[N, prefill, decode] mean KL divergence of the next-token distribution from that of full x full there, nats."""
    last_tokens: int
    clusters: list[str]

    def rows(self) -> list[dict[str, Any]]:
        """One row per variant: overall and trailing loss, and its difference from full, document by document."""
        full = self.evaluations[DENSE].document_loss
        rows = []
        for name, evaluation in self.evaluations.items():
            row: dict[str, Any] = {"attention": name}
            for what, pick in (
                ("loss", lambda table: np.nanmean(table, axis=1)),
                ("trailing", lambda table: table[:, -1]),
            ):
                ours, gap = pick(evaluation.document_loss), pick(evaluation.document_loss) - pick(full)
                row[what] = document_mean(ours, self.clusters)
                row[f"{what}_minus_full"] = document_mean(gap, self.clusters)
            rows.append(row)
        return rows

    def costs(self) -> dict[str, dict[str, float | None]]:
        """Paired differences of the trailing loss: cost of sparsity, cost of the gate, and gain of the gate."""
        trailing = {name: one.document_loss[:, -1] for name, one in self.evaluations.items()}
        pairs = {
            "sparsity costs (oracle - full)": ("oracle", DENSE),
            "the gate costs (moba - oracle)": (OWN, "oracle"),
            "the gate is worth (random - moba)": ("random", OWN),
        }
        return {what: document_mean(trailing[a] - trailing[b], self.clusters) for what, (a, b) in pairs.items()}

    def cells(self) -> list[dict[str, Any]]:
        """One row per pair of prefill and decode attention."""
        rows = []
        for p, prefill in enumerate(PARTS):
            for d, decode in enumerate(PARTS):
                gap = self.last_loss_NPD[:, p, d] - self.last_loss_NPD[:, 1, 1]
                rows.append(
                    {
                        "prefill": prefill,
                        "decode": decode,
                        "loss": document_mean(self.last_loss_NPD[:, p, d], self.clusters),
                        "minus_full": document_mean(gap, self.clusters),
                        "kl_from_full": document_mean(self.last_kl_NPD[:, p, d], self.clusters),
                    }
                )
        return rows

    def table(self) -> str:
        """Both tables as text, with the costs of sparsity and the gate."""
        lines = [f"{'attention':<9}  {'loss':>8}  {'minus full':>20}  {'trailing':>8}  {'minus full':>20}"]
        for row in self.rows():
            cells = [
                f"{row[what]['mean']:>8.4f}  {with_error(row[f'{what}_minus_full']):>20}"
                for what in ("loss", "trailing")
            ]
            lines.append(f"{row['attention']:<9}  " + "  ".join(cells))
        lines.append("trailing loss, document by document:")
        lines += [f"  {what}: {with_error(value)}" for what, value in self.costs().items()]
        lines.append(
            f"\nlast {self.last_tokens} tokens\n{'prefill':<9}{'decode':<7}  {'loss':>8}  {'minus full':>20}  {'KL':>9}"
        )
        for cell in self.cells():
            lines.append(
                f"{cell['prefill']:<9}{cell['decode']:<7}  {cell['loss']['mean']:>8.4f}  "
                f"{with_error(cell['minus_full']):>20}  {cell['kl_from_full']['mean']:>9.5f}"
            )
        return "\n".join(lines)

    def summary(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "unit": "nats per token; differences document by document",
            "num_documents": len(self.clusters),
            "num_clusters": len(set(self.clusters)),
            "variants": self.rows(),
            "trailing_costs": self.costs(),
            "last_tokens": self.last_tokens,
            "prefill_decode": self.cells(),
        }

    def _documents(self) -> dict[str, Any]:
        """The .npz's arrays about the documents, which are the same under every attention."""
        own = self.evaluations[DENSE]
        kept = {name: getattr(own, name) for name in ("document_ids", "document_keys", "document_clusters")}
        return {"edges": own.curve.edges, **kept}

    def result(self, dense_up_to: int | None = None) -> Result:
        """The report as files and text; the figure has each variant's loss by position and its gap to full."""
        losses = {f"document_loss_{name}": one.document_loss for name, one in self.evaluations.items()}
        return Result(
            length=self.evaluations[DENSE].curve.max_length,
            record=self.summary(),
            text=self.table(),
            numbers={f"trailing_{row['attention']}": row["trailing"]["mean"] for row in self.rows()},
            arrays={**self._documents(), **losses, "last_loss": self.last_loss_NPD, "last_kl": self.last_kl_NPD},
            figures={"": lambda path: plot_positions(self.evaluations, path, dense_up_to)},
        )


def load_evaluations(path: Path) -> dict[str, Evaluation]:
    """The evaluation under each attention, from the .npz that launch/evaluate.py wrote beside a swap's .json: loss by
    position of documents that reach the length, without per-position losses."""
    with np.load(path.with_suffix(".npz")) as arrays:
        edges, own = arrays["edges"], {key: arrays[f"document_loss_{key}"] for key in VARIANTS}
        ids, keys, clusters = (arrays[f"document_{name}"].tolist() for name in ("ids", "keys", "clusters"))
    return {name: Evaluation.of_documents(edges, ids, keys, clusters, loss_NB) for name, loss_NB in own.items()}


def document_mean(values_N: np.ndarray, clusters: Sequence[str]) -> dict[str, float | None]:
    """Mean over documents, its standard error and 95 % half-width, as JSON values."""
    known_N = np.isfinite(values_N)  # a conversation may have no supervised token there
    found = clustered_mean(np.where(known_N, values_N, 0), known_N, clusters)
    width = half_width(found.se, found.freedom)
    return {
        "mean": float(found.mean),
        "se": float(found.se) if np.isfinite(found.se) else None,
        "interval_95": float(width) if np.isfinite(width) else None,
    }


def with_error(value: Mapping[str, Any]) -> str:
    """A difference in words: `+0.0123 +- 0.0045`."""
    return f"{value['mean']:+.4f}" + ("" if value["interval_95"] is None else f" +- {value['interval_95']:.4f}")


@torch.no_grad()
def swap(context: Context, documents: Sequence[tuple[str, Batch]], *, last_tokens: int = 256) -> SwapReport:
    """The SwapReport of a model whose current plan has MoBA layers, on every rank; documents as for
    evals.position_loss.evaluate, all of one length. ValueError without a MoBA layer, or if the document has no more
    than the last tokens."""
    model, plan, seq_len = context.model, context.model.attention, documents[0][1].tokens.numel()
    if not any(spec.variants() for spec in plan):
        raise ValueError("no layer of the model is MoBA here; choose an attention such as attention=512x3")
    if not 0 < last_tokens < seq_len:
        raise ValueError(f"last_tokens={last_tokens}: must be at least 1 and below the length, {seq_len}")
    evaluations = {}
    for name in VARIANTS:
        with under(model, variant(plan, name)):
            evaluations[name] = evaluate(context, documents, seq_len=seq_len, what=name)
    sums = torch.zeros(2, len(documents), 2, 2, dtype=torch.float64, device=context.device)
    for index, counts in context.share(len(documents), "prefill x decode"):
        if counts:
            batch = documents[index][1].to(context.device)
            sums[:, index] = _prefill_decode(model, plan, batch, last_tokens)
    loss_NPD, kl_NPD = context.reduce(sums).cpu().numpy()
    clusters = [context.cluster_of(name) for name, _ in documents]
    return SwapReport(evaluations, loss_NPD, kl_NPD, last_tokens, clusters)


def _prefill_decode(model: Decoder, plan: Sequence[AttentionSpec], batch: Batch, last: int) -> Tensor:
    """float64 [2 (loss, KL divergence), prefill, decode] of one document's last tokens."""
    labels_m = batch.labels[-last:]
    log_probs = {}
    for p, prefill in enumerate(PARTS):
        for d, decode in enumerate(PARTS):
            cache = KVCache(len(plan))
            with under(model, variant(plan, prefill)):
                _read(model, batch, slice(0, len(batch.tokens) - last), cache, rows=1)
            with under(model, variant(plan, decode)):
                scores_mV = _read(model, batch, slice(len(batch.tokens) - last, None), cache, rows=last)
            log_probs[p, d] = scores_mV.float().log_softmax(-1)
    full_mV = log_probs[1, 1]
    out = torch.zeros(2, 2, 2, dtype=torch.float64, device=labels_m.device)
    for place, own_mV in log_probs.items():
        out[(0, *place)] = torch.nn.functional.nll_loss(own_mV, labels_m).double()
        out[(1, *place)] = (full_mV.exp() * (full_mV - own_mV)).sum(-1).mean().double()
    return out


def _read(model: Decoder, batch: Batch, part: slice, cache: KVCache, rows: int) -> Tensor:
    """Reads a part of a document into the cache; returns the logits of its last `rows` tokens."""
    tokens = batch.tokens[part]
    documents = one_document(len(tokens), len(tokens), tokens.device)
    wanted = torch.arange(len(tokens) - rows, len(tokens), device=tokens.device)
    return model.logits(tokens, batch.positions[part], documents, cache, rows=wanted)


def run(job: Job) -> Result:
    """The swap of the current attention, on held-out documents."""
    seq_len, documents = job.seq_len, job.held_out()
    job.say(f"swap: {len(documents)} documents of {format_length(seq_len)} tokens, {job.attention} and its variants")
    report = swap(job.context, documents, last_tokens=job.integer("last_tokens", min(256, seq_len // 4)))
    return report.result(job.dense_up_to)


def page(record: Mapping[str, Any], path: Path) -> str:
    """The three tables and the figure."""

    def cell(value: Mapping[str, Any]) -> str:
        error = "" if value["interval_95"] is None else f" +- {value['interval_95']:.4f}"
        return f"{value['mean']:.4f}{error}"

    names = ("loss", "loss_minus_full", "trailing", "trailing_minus_full")
    rows = [(row["attention"], *(cell(row[name]) for name in names)) for row in record["variants"]]
    costs = [(what, cell(value)) for what, value in record["trailing_costs"].items()]
    parts = []
    for part in record["prefill_decode"]:
        losses = (cell(part[name]) for name in ("loss", "minus_full"))
        parts.append((f"{part['prefill']} x {part['decode']}", *losses, f"{part['kl_from_full']['mean']:.5f}"))
    last = f"loss of the last {record['last_tokens']} tokens"
    tables = [
        table(("attention", *(name.replace("_", " ") for name in names)), rows),
        table(("trailing loss, document by document", "difference"), costs),
        table(("prefill x decode", last, "minus full", "KL from full"), parts),
    ]
    return "\n".join([*tables, image(path.with_suffix(".png"))])


EVAL = Eval(
    name="swap",
    about="the same weights under full attention, the gate's, the best, random and the latest blocks; prefill x "
    "decode.",
    run=run,
    keys={"last_tokens": "tokens at the end that count as decoded (default 256, at most a quarter of the length)"},
    heading="Attention swap",
    page=page,
)
