"""Means over tokens of documents: clustered standard errors and Student intervals with nominal coverage.

Tokens of one document are far from independent, and so may be documents of one origin (files of one program, chapters
of one book). The caller names the cluster of each document; clusters are then the sampling units. With few of them, or
of very unequal size, the usual error is too small and a normal interval too narrow: here errors are those of Bell and
McCaffrey (CR2), and intervals Student's with Satterthwaite's degrees of freedom. Where one cluster has so much of the
weight that no interval has nominal coverage, there is none.

Shapes: N documents, C clusters, X anything (buckets, say).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True, eq=False)
class Estimate:
    """A mean per token; each field is float64 [X]."""

    mean: np.ndarray
    """NaN where nothing was counted."""
    se: np.ndarray
    """Standard error; NaN for fewer than two clusters."""
    count: np.ndarray
    """Tokens."""
    clusters: np.ndarray
    """Clusters with a token."""
    freedom: np.ndarray
    """Degrees of freedom of an interval; NaN where none has nominal coverage."""
    largest_share: np.ndarray
    """Share of the tokens that the largest cluster has."""


LARGEST_SHARE = 0.48
"""Of the weight of three clusters or more: up to it 95 % intervals cover in 93 to 97 % of experiments, whatever the
correlation within clusters (tests/evals/test_statistics.py)."""
LARGEST_OF_TWO = 0.6


def clustered_mean(sums_NX: np.ndarray, counts_NX: np.ndarray, clusters: Sequence[str | int]) -> Estimate:
    """The mean sum / count over all documents, with `clusters` (one name per document) as the sampling units of its
    error.

    The error is CR2: sqrt(sum over clusters of r^2 / (1 - w)) / sum of counts, where r is a cluster's sum minus the
    mean times its count and w its share of the counts. With clusters of equal size that is the textbook formula.
    """
    s_CX, c_CX = clustered_sums(sums_NX, counts_NX, clusters)
    total, n = c_CX.sum(axis=0), (c_CX > 0).sum(axis=0).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean, share_CX = s_CX.sum(axis=0) / total, c_CX / total
        r_CX = s_CX - np.where(total > 0, mean, 0) * c_CX
        se = np.where(n > 1, np.sqrt((r_CX**2 / (1 - share_CX)).sum(axis=0)) / total, np.nan)
    largest = np.nan_to_num(share_CX.max(axis=0))
    return Estimate(mean, se, total, n, _freedom(share_CX, n, largest), largest)


def clustered_sums(
    sums_NX: np.ndarray, counts_NX: np.ndarray, clusters: Sequence[str | int]
) -> tuple[np.ndarray, np.ndarray]:
    """(sums, counts) of each cluster, float64 [C, X]."""
    names, index_N = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    shape = (len(names), *np.shape(sums_NX)[1:])
    s_CX, c_CX = np.zeros(shape), np.zeros(shape)
    np.add.at(s_CX, index_N, np.asarray(sums_NX, dtype=np.float64))
    np.add.at(c_CX, index_N, np.asarray(counts_NX, dtype=np.float64))
    return s_CX, c_CX


def _freedom(share_CX: np.ndarray, n: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """Satterthwaite's degrees of freedom of a CR2 error, float64 [X], for clusters with these shares of the tokens.

    (sum of l)^2 / sum of l^2 over the eigenvalues l of A (D - w w') A, with D = diag(w) the shares and A = diag(1 -
    w)^-1/2, for independent tokens of equal variance, as Satterthwaite's approximation assumes.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        b_CX = np.where(share_CX < 1, share_CX / (1 - share_CX), 0)  # a^2 w
        trace = np.nan_to_num(share_CX).sum(axis=0)  # of a^2 (w - w^2)
        # |K|^2 with K_ij = a_i a_j (w_i [i=j] - w_i w_j)
        square = (b_CX**2 - 2 * b_CX**2 * share_CX).sum(axis=0) + (b_CX * share_CX).sum(axis=0) ** 2
        freedom = trace**2 / square
    holds = (largest <= LARGEST_SHARE) | ((n == 2) & (largest <= LARGEST_OF_TWO))
    return np.where((n > 1) & holds, np.maximum(freedom, 1.0), np.nan)


def half_width(se: np.ndarray | float, freedom: np.ndarray | float) -> np.ndarray:
    """Half-width of the 95 % Student interval for errors with these degrees of freedom; NaN for less than one."""
    se, freedom = np.broadcast_arrays(np.asarray(se, np.float64), np.asarray(freedom, np.float64))
    tail = 1 - (1 - CONFIDENCE) / 2
    factor = [student_quantile(tail, round(float(f), 2)) if f >= 1 else math.nan for f in freedom.ravel()]
    return se * np.reshape(factor, se.shape)


@functools.lru_cache(maxsize=4096)
def student_quantile(probability: float, freedom: float) -> float:
    """The quantile of Student's t with `freedom` >= 1 degrees of freedom, for 0.5 <= probability < 1.

    With t = sqrt(freedom) tan(a) the density becomes cos(a)^(freedom - 1), which is summed and inverted on a grid:
    exact to about 1e-5 at the probabilities used.
    """
    assert freedom >= 1 and 0.5 <= probability < 1, (probability, freedom)
    angle = np.linspace(0, min(math.pi / 2, 40 / math.sqrt(freedom)), 20_001)  # beyond 40 sigma there is nothing
    density = np.cos(angle) ** (freedom - 1)
    below = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(freedom) * math.tan(float(np.interp(2 * probability - 1, below / below[-1], angle)))


def clusters_needed(sd: float, gap: float, power: float = 0.8) -> int:
    """Clusters needed to detect a true difference of `gap` at the 5 % level with this power (0.5 <= power < 1), where
    clusters have standard deviation `sd`: the fewest n >= 2 with (t(n - 1) + z(power)) sd / sqrt(n) <= gap.

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
    """The 95 % Wilson interval of a share of independent trials (an effective number need not be whole); (0, 1) without
    a trial."""
    if trials <= 0:
        return 0.0, 1.0
    z = student_quantile(0.975, 10**6)
    middle = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)
