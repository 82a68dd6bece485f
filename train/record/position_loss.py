"""Loss by position: how much predictions far into a document gain from the context before them.

The context position p of a prediction is the number of tokens of its document (or window of a long document) that
precede it, 1 to the length. Under packing that is `positions + 1`, never the place in the pack. Sums and counts are
float64 on the device, one per position, so a whole stage can be accumulated, saved and resumed exactly.

Buckets are 2048 tokens, or a sixteenth of the length where it is under 32K (MoBA paper, Table 3). A bucket of the curve
counts every token that lies in it, so the set of documents changes with the position. The trailing loss is the last
bucket of only those documents or windows that reach the full length (paper, section 3.1).

Tokens of one document are far from independent: standard errors treat each document or window as a cluster. Shape
suffixes: T tokens, N documents or windows, B buckets.
"""

from __future__ import annotations

import copy
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from conf.files import FileError
from conf.words import first_line, listed
from data.packing import IGNORED

BUCKET = 2048
MIN_BUCKETS = 16
NUM_MOMENTS = 6  # of each bucket over clusters: n, sum s, sum c, sum s^2, sum s c, sum c^2


def default_num_buckets(max_length: int) -> int:
    """Buckets of a length: `max_length // 2048` from 32K on, 16 below; never more than tokens."""
    return min(max_length, max(MIN_BUCKETS, max_length // BUCKET))


def bucket_of(positions: torch.Tensor, num_buckets: int, max_length: int) -> torch.Tensor:
    """The bucket of each 0-based position, in the shape and integer dtype of `positions`."""
    return positions * num_buckets // max_length


def bucket_edges(num_buckets: int, max_length: int) -> np.ndarray:
    """int64 `[B + 1]`: bucket b holds the predictions at context positions edges[b] + 1 to edges[b + 1]."""
    return -(-np.arange(num_buckets + 1, dtype=np.int64) * max_length // num_buckets)


class Trailing(NamedTuple):
    """Mean loss of the last bucket over documents or windows of full length (nats per token), its standard error, and
    how many tokens and documents it rests on. NaN where there are too few."""

    value: float
    se: float
    tokens: float
    clusters: float


@dataclass(frozen=True, eq=False)
class PositionCurve:
    """Loss by position, on the host: float64 arrays of nats per token, NaN where nothing was counted."""

    max_length: int
    """Length of a full document or window, in tokens."""
    edges: np.ndarray
    """int64 [B + 1]: bucket b holds the predictions at context positions edges[b] + 1 to edges[b + 1]."""
    mean: np.ndarray
    """[B] mean loss per token."""
    se: np.ndarray
    """[B] its standard error with documents or windows as clusters; NaN for fewer than two."""
    count: np.ndarray
    """[B] tokens counted."""
    clusters: np.ndarray
    """[B] documents or windows with a token in the bucket."""
    trailing: Trailing
    """The last bucket, of documents or windows of full length only."""
    position_mean: np.ndarray
    """[max_length] mean loss at each context position (index 0: position 1)."""
    position_count: np.ndarray
    """[max_length] tokens counted there."""
    freedom: np.ndarray | None = None
    """[B] degrees of freedom of each bucket's interval, NaN where no interval has its nominal coverage; None: the
    number of clusters less one (clusters of one size, or of unknown sizes)."""
    trailing_freedom: float | None = None
    """The same of `trailing`."""

    @property
    def interval_freedom(self) -> np.ndarray:
        """[B] degrees of freedom."""
        return self.clusters - 1 if self.freedom is None else self.freedom

    @property
    def trailing_interval_freedom(self) -> float:
        """Of the trailing loss."""
        return self.trailing.clusters - 1 if self.trailing_freedom is None else self.trailing_freedom

    @property
    def total_mean(self) -> float:
        """Mean loss of all tokens counted; NaN for none."""
        total = self.count.sum()
        return float(np.where(self.count > 0, self.mean * self.count, 0.0).sum() / total) if total else float("nan")

    def arrays(self) -> dict[str, np.ndarray]:
        """All fields as arrays, for a .npz file that may hold more beside them."""
        return {name: np.asarray(value) for name, value in vars(self).items() if value is not None}

    def to_npz(self, path: Path | str) -> None:
        """Writes the curve to `path`, to be read by `from_npz` or plain numpy."""
        # numpy's stub lets a name of **arrays be allow_pickle.
        np.savez_compressed(path, **self.arrays())  # pyright: ignore[reportArgumentType]

    @staticmethod
    def from_npz(path: Path | str) -> PositionCurve:
        """The curve in a .npz file that holds its `arrays`, equal bit for bit."""
        return read_npz(path)[0]


# What numpy and zipfile raise for bytes that are no .npz, or a damaged one.
NPZ_ERRORS = (OSError, ValueError, EOFError, RuntimeError, KeyError, MemoryError, zipfile.BadZipFile, zlib.error)


def read_npz(path: Path | str) -> tuple[PositionCurve, dict[str, np.ndarray]]:
    """The curve in a .npz file, and the arrays beside it. FileError if there is none."""
    remedy = "A curve is written by training (position_loss/) or launch/evaluate.py"
    try:
        with np.load(path) as fields:
            arrays = dict(fields)
    except NPZ_ERRORS as error:
        raise FileError(f"{path} cannot be read ({first_line(error)}). {remedy}") from error
    except TypeError as error:  # a .npy of one array
        raise FileError(f"{path} holds an array, not named arrays. {remedy}") from error
    shapes = _curve_shapes(arrays)
    missing = [name for name in shapes if name not in arrays and name not in OPTIONAL]
    if missing:
        raise FileError(f"{path} has no {listed(missing)}. {remedy}")
    values = {name: arrays.pop(name) for name in shapes if name in arrays}
    wrong = [n for n, v in values.items() if v.dtype.kind not in "fiu" or v.shape != shapes[n]]
    if wrong:
        raise FileError(f"{path}: {listed(wrong)} not in the shape of a curve. {remedy}")
    values["max_length"] = int(values["max_length"])
    values["trailing"] = Trailing(*map(float, values["trailing"]))
    if "trailing_freedom" in values:
        values["trailing_freedom"] = float(values["trailing_freedom"])
    return PositionCurve(**values), arrays


OPTIONAL = ("freedom", "trailing_freedom")


def _curve_shapes(arrays: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """The shape of each array of a PositionCurve with the length and buckets that `arrays` say."""
    length, edges = arrays.get("max_length", np.zeros(0)), arrays.get("edges", np.zeros(1))
    positions = (int(length),) if length.shape == () and length.dtype.kind in "iu" else (-1,)
    by_bucket = dict.fromkeys(("mean", "se", "count", "clusters", "freedom"), (edges.size - 1,))
    by_position = dict.fromkeys(("position_mean", "position_count"), positions)
    single = {"max_length": (), "trailing_freedom": (), "trailing": (4,), "edges": (edges.size,)}
    return by_bucket | by_position | single


class PositionLoss:
    """Adds up losses by position for one length. A stage of another length needs another PositionLoss."""

    def __init__(self, max_length: int, device: torch.device | str, num_buckets: int | None = None):
        """`num_buckets` None means the default of the length (see `default_num_buckets`)."""
        assert max_length >= 1, max_length
        self.max_length = max_length
        self.num_buckets = num_buckets or default_num_buckets(max_length)
        assert 1 <= self.num_buckets <= max_length, (self.num_buckets, max_length)
        # One flat tensor, so that saving is a copy and summing over ranks one collective.
        moments = NUM_MOMENTS * (self.num_buckets + 1)
        self._state = torch.zeros(2 * max_length + moments, dtype=torch.float64, device=device)

    def _views(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`(by_position [2, max_length], moments [6, B + 1])` into the state; the last column of moments is
        trailing."""
        by_position, moments = self._state.split([2 * self.max_length, NUM_MOMENTS * (self.num_buckets + 1)])
        return by_position.view(2, -1), moments.view(NUM_MOMENTS, -1)

    @torch.no_grad()
    def add(self, losses_T, positions_T, labels_T, cu_seqlens) -> None:
        """Counts the tokens of one pack (or several, end to end) on the device, without a synchronisation.

        `losses_T` float, `positions_T` int64 0-based in the document or window, `labels_T` int64, `cu_seqlens` int32
        `[N + 1]` whose segments are the clusters of the standard errors. Tokens with label -100 do not count. Nor do
        non-finite losses: the guards report those, and one would spoil every later sum.
        """
        num_documents, num_tokens = cu_seqlens.numel() - 1, losses_T.numel()
        assert positions_T.shape == labels_T.shape == losses_T.shape == (num_tokens,), losses_T.shape
        if positions_T.device.type == "cpu" and num_tokens:
            assert int(positions_T.max()) < self.max_length, (int(positions_T.max()), self.max_length)
        valid_T = (labels_T != IGNORED) & torch.isfinite(losses_T)
        pair_2T = torch.stack((torch.where(valid_T, losses_T.double(), 0.0), valid_T.double()))
        by_position, moments = self._views()
        by_position.index_add_(1, positions_T, pair_2T)

        ends_N = cu_seqlens[1:].long()
        document_T = torch.searchsorted(ends_N, torch.arange(num_tokens, device=ends_N.device), right=True)
        cell_T = document_T * self.num_buckets + bucket_of(positions_T, self.num_buckets, self.max_length)
        cells = pair_2T.new_zeros(2, num_documents * self.num_buckets).index_add_(1, cell_T, pair_2T)
        cells_2NB = cells.view(2, num_documents, self.num_buckets)
        is_full_N = cu_seqlens.diff() == self.max_length
        trailing_2N1 = cells_2NB[:, :, -1:] * is_full_N[:, None]
        s_NB, c_NB = torch.cat((cells_2NB, trailing_2N1), dim=-1)
        moments += torch.stack([(c_NB > 0).double(), s_NB, c_NB, s_NB**2, s_NB * c_NB, c_NB**2]).sum(dim=1)

    def all_reduce(self, group=None, reduce: Callable[[torch.Tensor], torch.Tensor] | None = None) -> PositionLoss:
        """A new PositionLoss that holds the sum over ranks; this one is unchanged.

        A collective of torch.distributed's `group` (where it is initialised; else a copy). `reduce` replaces it:
        called with the state, returns the summed one. A document must not be split over ranks: each part would count
        as a cluster.
        """
        total = PositionLoss(self.max_length, self._state.device, self.num_buckets)
        total._state.copy_(self._state)
        if reduce is not None:
            total._state = reduce(total._state)
        elif torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(total._state, group=group)
        return total

    @property
    def sums(self) -> torch.Tensor:
        """The state: one float64 tensor on the device."""
        return self._state

    def with_sums(self, sums: torch.Tensor) -> PositionLoss:
        """A PositionLoss like this one with the state `sums`, such as a copy on the host."""
        other = copy.copy(self)
        other._state = sums
        return other

    def curve(self) -> PositionCurve:
        """The curve so far (one device-to-host copy)."""
        by_position, moments = (view.cpu().numpy() for view in self._views())
        mean, se, count, clusters = ratio_estimate(moments)
        with np.errstate(invalid="ignore", divide="ignore"):
            position_mean = by_position[0] / by_position[1]
        return PositionCurve(
            max_length=self.max_length,
            edges=bucket_edges(self.num_buckets, self.max_length),
            mean=mean[:-1],
            se=se[:-1],
            count=count[:-1],
            clusters=clusters[:-1],
            trailing=Trailing(*(float(x[-1]) for x in (mean, se, count, clusters))),
            position_mean=position_mean,
            position_count=by_position[1].copy(),
        )

    def reset(self) -> None:
        """Sets all counts to zero."""
        self._state.zero_()

    def state_dict(self) -> dict:
        """`{"max_length", "num_buckets", "state": float64 tensor on the host}`: all that is needed to go on exactly."""
        return {
            "max_length": self.max_length,
            "num_buckets": self.num_buckets,
            "state": self._state.to("cpu", copy=True),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continues from a `state_dict`; ValueError if it is of another length or number of buckets."""
        for name in ("max_length", "num_buckets"):
            if state[name] != getattr(self, name):
                raise ValueError(f"position loss saved with {name}={state[name]}, expected {getattr(self, name)}")
        self._state.copy_(state["state"])


def ratio_estimate(moments: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """`(mean, se, count, clusters)`, each of shape `[...]`, from cluster moments `[6, ...]`.

    The mean is sum s / sum c over clusters of loss sum s and token count c; its standard error is that of a ratio
    estimator, sqrt(n / (n - 1) * sum (s_i - mean c_i)^2) / sum c, expanded into moments so that batches and ranks
    simply add. NaN for the mean of no token and for the error of fewer than two clusters.
    """
    n, s, c, ss, sc, cc = moments
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = s / c
        residual = np.maximum(ss - 2 * mean * sc + mean**2 * cc, 0)
        se = np.where(n > 1, np.sqrt(n / (n - 1) * residual) / c, np.nan)
    return mean, se, c.copy(), n.copy()
