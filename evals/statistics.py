"""Means of tokens that come in documents, with errors that hold: clustered standard errors and Student intervals.

Tokens of one document are far from independent, and so may be documents of one origin (files of one program, chapters
of one book). Whoever measures names the cluster of each document; clusters are then the draws, and with few of them a
normal interval is too narrow, so every 95 % interval here is Student's with one degree of freedom less than clusters.

Shapes: N documents, C clusters, X anything (buckets, say).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A mean a token; each field is float64 [X]."""

    mean: np.ndarray
    """NaN where nothing was counted."""
    se: np.ndarray
    """Standard error; NaN for fewer than two clusters."""
    count: np.ndarray
    """Tokens."""
    clusters: np.ndarray
    """Clusters with a token."""


def clustered_mean(sums_NX: np.ndarray, counts_NX: np.ndarray, clusters: Sequence[str]) -> Estimate:
    """The mean sum / count over all documents, with `clusters` (one name a document) as the draws of its error.

    The error is the jackknife's, sqrt((n - 1) / n * sum over clusters of (mean without it - mean)^2), n the clusters
    with a token. With clusters of one size that is the textbook's; with a few of very unequal size it holds where the
    linearised error of a ratio is too small.
    """
    names, index_N = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    shape = (len(names), *np.shape(sums_NX)[1:])
    s_CX, c_CX = np.zeros(shape), np.zeros(shape)
    np.add.at(s_CX, index_N, np.asarray(sums_NX, dtype=np.float64))
    np.add.at(c_CX, index_N, np.asarray(counts_NX, dtype=np.float64))
    total, n = c_CX.sum(axis=0), (c_CX > 0).sum(axis=0).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = s_CX.sum(axis=0) / total
        shift_CX = (s_CX - np.where(total > 0, mean, 0) * c_CX) / (total - c_CX)
        se = np.where(n > 1, np.sqrt((n - 1) / n * (shift_CX**2).sum(axis=0)), np.nan)
    return Estimate(mean, se, total, n)


def half_width(se: np.ndarray | float, clusters: np.ndarray | float, comparisons: int = 1) -> np.ndarray:
    """Half of the 95 % Student interval for errors that rest on so many clusters; NaN for fewer than two.

    With `comparisons` > 1 all that many intervals hold at once with 95 % (Bonferroni: safe, somewhat wide).
    """
    se, clusters = np.broadcast_arrays(np.asarray(se, np.float64), np.asarray(clusters, np.float64))
    tail = 1 - (1 - CONFIDENCE) / (2 * comparisons)
    factor = [student_quantile(tail, int(n) - 1) if n > 1 else math.nan for n in clusters.ravel()]
    return se * np.reshape(factor, se.shape)


@functools.lru_cache(maxsize=4096)
def student_quantile(probability: float, freedom: int) -> float:
    """The quantile of Student's t with `freedom` >= 1 degrees of freedom, for 0.5 <= probability < 1.

    With t = sqrt(freedom) tan(a) the density becomes cos(a)^(freedom - 1), which is summed and inverted on a grid:
    exact to about 1e-5 where intervals are made.
    """
    assert freedom >= 1 and 0.5 <= probability < 1, (probability, freedom)
    angle = np.linspace(0, math.pi / 2, 200_001)
    density = np.cos(angle) ** (freedom - 1)
    below = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(freedom) * math.tan(float(np.interp(2 * probability - 1, below / below[-1], angle)))


def clusters_needed(sd: float, gap: float, power: float = 0.8) -> int:
    """Clusters to average so that a true difference of `gap` is told from zero, at 95 %, with this probability (0.5
    <= power < 1), where clusters vary by `sd`: the fewest n >= 2 with (t(n - 1) + z(power)) sd / sqrt(n) <= gap.

    power=0.5 is an interval just as wide as the gap: (1.96 sd / gap)^2 for many clusters.
    """
    assert gap > 0 and sd >= 0, (gap, sd)
    normal = 10**6
    z = student_quantile(power, normal)
    n = max(2, math.floor(((student_quantile(0.975, normal) + z) * sd / gap) ** 2))
    while (student_quantile(0.975, n - 1) + z) * sd / math.sqrt(n) > gap:
        n += 1
    return n


def wilson(share: float, trials: float) -> tuple[float, float]:
    """The 95 % Wilson interval of a share of independent trials (any number, as where they are worth fewer than they
    are); (0, 1) without a trial."""
    if trials <= 0:
        return 0.0, 1.0
    z = student_quantile(0.975, 10**6)
    middle = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)
