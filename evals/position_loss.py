"""Loss by position on held-out documents: one document a forward pass, from its start, at full length.

The cohort is fixed: only documents of at least `seq_len + 1` tokens, cut to those, so that every bucket is measured
on the same documents and the curve shows what context gives, not which documents are long. Nothing is packed: in a
packed stream the late positions see little of their own document. Documents are the clusters of the standard errors.

An evaluation also keeps each document's mean in each bucket, under a key made from its tokens: two models evaluated
on the same documents can then be compared document by document, which resolves far smaller differences than two
separate curves.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.packing import Batch
from evals.figures import plot_curves
from train.position_loss import PositionCurve, PositionLoss, Trailing, bucket_of

FORMAT = 1
LossFn = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What one model scores on one set of documents."""

    curve: PositionCurve
    """Loss by position; every bucket rests on all documents."""
    document_ids: list[str]
    """[N] names."""
    document_keys: list[str]
    """[N] hash of the evaluated tokens: equal keys in two evaluations are the same text in the same tokens."""
    document_loss: np.ndarray
    """float64 [N, B] mean loss of each document in each bucket, nats a token."""
    num_non_finite: int
    """Tokens whose loss was infinite or NaN, which are left out of every mean."""

    def save(self, folder: Path | str, stem: str, **info: Any) -> Path:
        """Writes `stem`.npz, .json and .png into `folder` (made if missing) and returns the path of the json.

        `info` goes into the json as it is: tokens seen, attention, what else tells evaluations apart.
        """
        base = Path(folder) / stem
        base.parent.mkdir(parents=True, exist_ok=True)
        table = {"document_ids": self.document_ids, "document_keys": self.document_keys}
        np.savez_compressed(
            base.with_name(f"{stem}.npz"), **self.curve.arrays(), document_loss=self.document_loss, **table
        )
        plot_curves({stem: self.curve}, base.with_name(f"{stem}.png"))
        path = base.with_name(f"{stem}.json")
        path.write_text(json.dumps({**info, **self.summary()}, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        return path

    def summary(self) -> dict[str, Any]:
        """The evaluation without its per-position arrays, as plain JSON values (null for NaN)."""
        curve = self.curve
        return {
            "format": FORMAT,
            "unit": "nats a token; standard errors with documents as clusters",
            "cohort": f"fixed: documents of at least {curve.max_length + 1} tokens, cut to those",
            "num_documents": len(self.document_ids),
            "seq_len": curve.max_length,
            "trailing": dict(zip(Trailing._fields, _plain(curve.trailing))),
            "edges": curve.edges.tolist(),
            "mean": _plain(curve.mean),
            "se": _plain(curve.se),
            "num_tokens": _plain(curve.count),
            "num_non_finite": self.num_non_finite,
            "documents": [{"id": i, "key": k} for i, k in zip(self.document_ids, self.document_keys)],
            "document_loss": [_plain(row) for row in self.document_loss],
        }


@torch.no_grad()
def evaluate(
    loss_fn: LossFn,
    documents: Sequence[tuple[str, Batch]],
    *,
    seq_len: int,
    device: torch.device | str,
    num_buckets: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
) -> Evaluation:
    """Scores each document once and returns the Evaluation of all of them, on every rank.

    `loss_fn(tokens, positions, cu_seqlens, labels)` returns float `[T]` losses (a Decoder or an engine around one).
    `documents` are (id, batch of seq_len predictions), as of data.validation; every rank is given all of them and takes
    each world_size-th; `reduce` sums a float64 tensor over ranks. All ranks run the same number of forward passes, as
    sharded parameters need: a rank left over repeats a document without counting it.
    """
    tracker = PositionLoss(seq_len, device, num_buckets)
    table = torch.zeros(len(documents), tracker.num_buckets, dtype=torch.float64, device=device)
    non_finite = torch.zeros(1, dtype=torch.float64, device=device)
    for start in range(0, len(documents), world_size):
        index = start + rank
        batch = documents[index if index < len(documents) else 0][1].to(device)
        assert batch.cu_seqlens.numel() == 2 and batch.tokens.numel() == seq_len, (batch.tokens.numel(), seq_len)
        losses = loss_fn(batch.tokens, batch.positions, batch.cu_seqlens, batch.labels)
        if index < len(documents):
            tracker.add(losses, batch.positions, batch.labels, batch.cu_seqlens)
            table[index] = _bucket_means(losses, batch.positions, tracker)
            non_finite += (~losses.isfinite()).sum()
    names = [(name, _key(batch)) for name, batch in documents]
    return Evaluation(
        curve=tracker.all_reduce(reduce=reduce).curve(),
        document_ids=[name for name, _ in names],
        document_keys=[key for _, key in names],
        document_loss=reduce(table).cpu().numpy(),
        num_non_finite=int(reduce(non_finite).item()),
    )


def _bucket_means(losses_T: torch.Tensor, positions_T: torch.Tensor, tracker: PositionLoss) -> torch.Tensor:
    """float64 `[B]`: one document's mean loss in each bucket; NaN where a loss is not finite."""
    buckets = bucket_of(positions_T, tracker.num_buckets, tracker.max_length)
    sums = torch.zeros(tracker.num_buckets, dtype=torch.float64, device=losses_T.device)
    sums.index_add_(0, buckets, losses_T.double())
    means = sums / torch.bincount(buckets, minlength=tracker.num_buckets)
    return torch.where(means.isfinite(), means, torch.nan)


def _key(batch: Batch) -> str:
    """16 hexadecimal digits that name a document's tokens, the last label included."""
    tokens = torch.cat((batch.tokens, batch.labels[-1:])).numpy()
    return hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest()[:16]


def _plain(values: Sequence[float]) -> list[float | None]:
    """Floats for JSON, which has no NaN."""
    return [float(x) if math.isfinite(x) else None for x in values]


def load_curves(paths: Mapping[str, Path | str]) -> dict[str, PositionCurve]:
    """The curves of saved evaluations (.npz), by label, for `evals.figures.plot_curves`."""
    return {label: PositionCurve.from_npz(path) for label, path in paths.items()}
