"""Loss by position on held-out documents: one document a forward pass, from its start, nothing packed.

Which documents: a cohort of data.validation. In the fixed one every bucket is measured on the same documents, so the
curve shows the effect of context, not of which documents are long. In a packed stream late positions would have little
context of their own document. Documents, or groups of them that belong together, are the clusters of the standard
errors.

An evaluation also keeps each document's mean in each bucket, under a hash of its tokens: two models evaluated on the
same documents can then be compared document by document (evals/paired.py), which resolves far smaller differences than
two separate curves.

Sums are integers in units of 2^-32 nats, so their order does not matter: one process and many agree bit for bit.

Shapes: T positions, N documents, B buckets.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsFloat

import numpy as np
import torch

from conf.files import Count, read_json
from conf.numbers import format_length, given_length
from data.packing import IGNORED, Batch
from data.validation import COHORTS
from evals.context import Context
from evals.figures import plot_curves
from evals.protocol import Eval, Job, Result
from evals.statistics import clustered_mean, half_width
from train.record.position_loss import PositionCurve, Trailing, bucket_edges, default_num_buckets, read_npz

FORMAT = 2
FIXED_POINT = 2.0**32
LARGEST = 1e6
"""Nats; a larger loss counts as non-finite (the sums are 64-bit)."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What one model scores on one set of documents."""

    curve: PositionCurve
    """Loss by position, its errors clustered as `document_clusters` says."""
    document_ids: list[str]
    """[N] names."""
    document_keys: list[str]
    """[N] hash of the evaluated tokens: equal keys mean equal tokens."""
    document_clusters: list[str]
    """[N] which cluster each belongs to."""
    document_loss: np.ndarray
    """float64 [N, B] mean loss of each document in each bucket, nats per token; NaN where it does not fill it."""
    num_non_finite: int
    """Tokens whose loss was infinite, NaN or beyond LARGEST, excluded from every mean."""
    cohort: str = "fixed"

    @classmethod
    def of_documents(
        cls, edges: np.ndarray, ids: list[str], keys: list[str], clusters: list[str], loss_NB: np.ndarray
    ) -> Evaluation:
        """The evaluation of documents that all reach the length, from each one's mean loss in each bucket, where every
        token counts; without per-position losses."""
        count_NB = np.broadcast_to(np.diff(edges), loss_NB.shape)
        length = int(edges[-1])
        unknown_2T = np.zeros((2, length))
        curve = _curve(loss_NB * count_NB, count_NB, np.ones(len(ids), bool), unknown_2T, clusters, length)
        return cls(curve, ids, keys, clusters, loss_NB, num_non_finite=0)

    def result(self, title: str, dense_up_to: int | None = None) -> Result:
        """The evaluation as files and text. `title` is the curve's in the figure, `dense_up_to` a line there."""
        value, se, _, clusters = self.curve.trailing
        width = float(half_width(se, self.curve.trailing_interval_freedom))
        known = f"+- {width:.4f} (95 %, {clusters:.0f} clusters)"
        if width != width:
            known = (
                "(one cluster: no error estimate)" if clusters < 2 else f"({clusters:.0f} clusters too unequal for one)"
            )
        table = {name: getattr(self, name) for name in ("document_ids", "document_keys", "document_clusters")}
        return Result(
            length=self.curve.max_length,
            record=self.summary(),
            text=f"trailing loss {value:.4f} {known}",
            numbers={"trailing_loss": value, "trailing_se": se},
            arrays={**self.curve.arrays(), "document_loss": self.document_loss, **table},
            figures={"": lambda path: plot_curves({title: self.curve}, path, dense_up_to=dense_up_to)},
            suffix="" if self.cohort == "fixed" else self.cohort,
        )

    def summary(self) -> dict[str, Any]:
        """The evaluation without its per-position arrays, as plain JSON values (null for NaN)."""
        curve = self.curve
        cohorts = {
            "fixed": f"fixed: documents of at least {curve.max_length + 1} tokens, cut to those",
            "available": f"available: in each bucket the documents that fill it, up to {curve.max_length} tokens",
        }
        rows = zip(self.document_ids, self.document_keys, self.document_clusters)
        with np.errstate(invalid="ignore"):
            spread = np.ma.masked_invalid(self.document_loss).std(axis=0, ddof=1).filled(np.nan)
        return {
            "format": FORMAT,
            "unit": "nats per token",
            "cohort": cohorts[self.cohort],
            "num_documents": len(self.document_ids),
            "num_clusters": len(set(self.document_clusters)),
            "seq_len": curve.max_length,
            "trailing": dict(zip(Trailing._fields, plain(curve.trailing))),
            "edges": curve.edges.tolist(),
            "mean": plain(curve.mean),
            "se": plain(curve.se),
            "num_tokens": plain(curve.count),
            "clusters": plain(curve.clusters),
            "freedom": plain(curve.interval_freedom),
            "sd_of_documents": plain(spread),
            "num_non_finite": self.num_non_finite,
            "documents": [{"id": i, "key": k, "cluster": c} for i, k, c in rows],
            "document_loss": [plain(row) for row in self.document_loss],
        }


@torch.no_grad()
def evaluate(
    context: Context,
    documents: Sequence[tuple[str, Batch]],
    *,
    seq_len: int,
    num_buckets: int | None = None,
    cohort: str = "fixed",
    what: str = "position_loss",
) -> Evaluation:
    """Scores each document once and returns the Evaluation of all of them, on every rank.

    `documents` are (id, batch of one document), as of data.validation for this cohort and these buckets; every rank is
    given all of them. `what` names the progress bar.
    """
    loss_fn, device = context.loss_fn, context.device
    num_buckets = num_buckets or default_num_buckets(seq_len)
    edges_E = torch.from_numpy(bucket_edges(num_buckets, seq_len)).to(device)
    by_position = torch.zeros(2, seq_len, dtype=torch.int64, device=device)
    # Of each document and bucket: sum, tokens counted, tokens there (also without labels, but not if non-finite).
    table = torch.zeros(3, len(documents), num_buckets, dtype=torch.int64, device=device)
    non_finite = torch.zeros(1, dtype=torch.int64, device=device)
    for index, counts in context.share(len(documents), what):
        batch = documents[index][1].to(device)
        assert batch.cu_seqlens.numel() == 2 and batch.tokens.numel() <= seq_len, (batch.tokens.numel(), seq_len)
        losses_T = loss_fn(batch.tokens, batch.positions, batch.documents, batch.labels)
        if counts:
            good_T = losses_T.abs() <= LARGEST  # false for NaN too
            counted_T = good_T & (batch.labels != IGNORED)
            fixed_T = (torch.where(counted_T, losses_T, 0).double() * FIXED_POINT).round().long()
            values_3T = torch.stack((fixed_T, counted_T.long(), good_T.long()))
            bucket_T = torch.searchsorted(edges_E, batch.positions, right=True) - 1
            by_position.index_add_(1, batch.positions, values_3T[:2])
            table[:, index].index_add_(1, bucket_T, values_3T)
            non_finite += (~good_T).sum()
    table, by_position = (context.reduce(x).cpu().numpy() for x in (table, by_position))
    names = [(name, document_key(batch), batch.tokens.numel()) for name, batch in documents]
    clusters = [context.cluster_of(name) for name, _, _ in names]
    sums_NB, counts_NB = table[0] / FIXED_POINT, table[1]
    is_full_N = np.array([length == seq_len for _, _, length in names])
    return Evaluation(
        curve=_curve(sums_NB, counts_NB, is_full_N, by_position, clusters, seq_len),
        document_ids=[name for name, _, _ in names],
        document_keys=[key for _, key, _ in names],
        document_clusters=clusters,
        document_loss=_divide(np.where(table[2] == np.diff(edges_E.cpu()), sums_NB, np.nan), counts_NB),
        num_non_finite=int(context.reduce(non_finite).item()),
        cohort=cohort,
    )


def _curve(sums_NB, counts_NB, is_full_N, by_position_2T, clusters: list[str], seq_len: int) -> PositionCurve:
    """The curve of all documents; its trailing value is of those with the full length."""
    found = clustered_mean(sums_NB, counts_NB, clusters)
    last = clustered_mean(sums_NB[:, -1] * is_full_N, counts_NB[:, -1] * is_full_N, clusters)
    return PositionCurve(
        max_length=seq_len,
        edges=bucket_edges(sums_NB.shape[1], seq_len),
        mean=found.mean,
        se=found.se,
        count=found.count,
        clusters=found.clusters,
        trailing=Trailing(float(last.mean), float(last.se), float(last.count), float(last.clusters)),
        freedom=found.freedom,
        trailing_freedom=float(last.freedom),
        position_mean=_divide(by_position_2T[0] / FIXED_POINT, by_position_2T[1]),
        position_count=by_position_2T[1].astype(np.float64),
    )


def _divide(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """sums / counts, NaN where nothing was counted."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums / counts


def document_key(batch: Batch) -> str:
    """A hash of a document's tokens, the last label included: 16 hexadecimal digits."""
    tokens = torch.cat((batch.tokens, batch.labels[-1:])).numpy()
    return hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest()[:16]


def plain(values: Iterable[SupportsFloat]) -> list[float | None]:
    """Floats for JSON, which has no NaN."""
    return [float(x) if math.isfinite(x) else None for x in values]


@dataclass(frozen=True)
class _Saved:
    """The fields of an evaluation's .json that are read."""

    num_non_finite: Count
    cohort: str


def load_evaluation(path: Path | str) -> Evaluation:
    """A saved evaluation, from its .json or the .npz beside it. ValueError if either is missing or invalid."""
    base = Path(path)
    record = read_json(
        base.with_suffix(".json"), _Saved, remedy="A saved loss-by-position evaluation is .json and .npz"
    )
    curve, arrays = read_npz(base.with_suffix(".npz"))
    shape = (len(arrays.get("document_keys", ())), len(curve.edges) - 1)
    wanted = dict.fromkeys(("document_keys", "document_ids"), shape[:1]) | {"document_loss": shape}
    for name, dimensions in wanted.items():
        if name not in arrays or arrays[name].shape != dimensions:
            found = "no such array" if name not in arrays else f"shape {arrays[name].shape}"
            raise ValueError(f"{base.with_suffix('.npz')} is no saved evaluation: {name} has {found}, not {dimensions}")
    if arrays["document_loss"].dtype.kind != "f":
        raise ValueError(f"{base.with_suffix('.npz')} is no saved evaluation: document_loss holds no numbers")
    columns = (arrays[name] for name in ("document_ids", "document_keys"))
    ids, keys = ([str(x) for x in column] for column in columns)
    clusters = [str(x) for x in arrays.get("document_clusters", ids)]
    if len(clusters) != shape[0]:
        raise ValueError(f"{base.with_suffix('.npz')} is no saved evaluation: clusters of {len(clusters)} documents")
    cohort = record.cohort.partition(":")[0]
    return Evaluation(curve, ids, keys, clusters, arrays["document_loss"], record.num_non_finite, cohort)


def run(job: Job) -> Result:
    """The loss by position of the held-out documents of the cohort that was asked for."""
    seq_len, cohort = job.seq_len, job.values.get("cohort", "fixed")
    num_buckets = _num_buckets(job, seq_len)
    documents = job.held_out(bucket_edges(num_buckets, seq_len) if cohort == "available" else None)
    job.say(f"position_loss: {len(documents)} documents, {format_length(seq_len)} tokens, {job.attention}")
    found = evaluate(job.context, documents, seq_len=seq_len, num_buckets=num_buckets, cohort=cohort)
    return found.result(job.title, job.dense_up_to)


def _num_buckets(job: Job, seq_len: int) -> int:
    if "bucket" not in job.values:
        return default_num_buckets(seq_len)
    bucket = given_length(job.values, "bucket")
    if seq_len % bucket:
        raise ValueError(f"bucket={job.values['bucket']}: must divide the length, {format_length(seq_len)}")
    return seq_len // bucket


EVAL = Eval(
    name="position_loss",
    about="the loss by position on held-out documents, those of the run's own data unless others are named. The same "
    "weights can be measured under another attention, and on documents of another length; launch/compare.py puts two "
    "results beside each other.",
    run=run,
    keys={
        "cohort": "fixed (default: documents of full length) or available (each bucket: all that fill it)",
        "bucket": "tokens per bucket, a divisor of the length (default: 2K; a sixteenth below 32K)",
    },
    choices={"cohort": COHORTS},
)
