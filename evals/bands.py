"""A simultaneous 95 % band over all buckets of a paired difference, where one with nominal coverage exists.

Sixteen intervals of 95 % miss somewhere far more often than one; how much wider they must be depends on the correlation
of buckets and on the number of clusters: Bonferroni's is far too wide for few clusters. The factor here is the quantile
of the largest |t| over buckets in draws that resemble the clusters: normal, of their sizes, correlated over buckets as
their residuals are; scaled to one bucket's quantile at Satterthwaite's degrees of freedom.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from evals.statistics import CONFIDENCE, Estimate, clustered_sums, student_quantile

DRAWS = 1000
LARGEST_SHARE = 0.3
"""Of the weight: with a larger cluster coverage is 91 to 98 %, depending on the correlation of its documents."""
FEWEST = 4
LARGE_OF_MANY, TIMES_ITS_PART = 0.1, 8
"""No band for a cluster of more than a tenth of the weight and more than 8 times an equal part: with clusters of 20,
10, 10 and 77 of 1, coverage is 92 %."""
FEW = 200
DRAWN_AT_ONCE = 2_000_000  # numbers, so that memory stays small with thousands of clusters


def no_band(clusters: np.ndarray, largest_share: np.ndarray) -> str | None:
    """Why there is no band over these buckets, or None."""
    if not len(clusters) or clusters.min() < FEWEST:
        return f"it takes {FEWEST} clusters in every bucket"
    if largest_share.max() > LARGEST_SHARE and largest_share.max() > 1.02 / clusters.min():
        return f"one cluster has {largest_share.max():.0%} of the documents; a band holds up to {LARGEST_SHARE:.0%}"
    if ((largest_share > LARGE_OF_MANY) & (largest_share * clusters > TIMES_ITS_PART)).any():
        return f"one cluster of {clusters.max()} has {largest_share.max():.0%} of the documents; sizes differ too much"
    return None


def simultaneous_factor(sums_NX: np.ndarray, counts_NX: np.ndarray, clusters: list[str], found: Estimate) -> float:
    """Half-width of the band over X buckets, in standard errors; buckets without an interval do not count."""
    known = np.isfinite(found.freedom) & (found.se > 0)
    if not known.any():
        return math.nan
    t_DX = relative_t(sums_NX[:, known], counts_NX[:, known], clusters)
    exact = [student_quantile(1 - (1 - CONFIDENCE) / 2, round(float(f), 2)) for f in found.freedom[known]]
    return float(np.quantile(t_DX.max(axis=1), CONFIDENCE) * np.max(exact))


def relative_t(sums_NX: np.ndarray, counts_NX: np.ndarray, clusters: Sequence[str | int]) -> np.ndarray:
    """|t| of each bucket in draws that resemble the clusters, over its own 95 % quantile: float64 [draws, X]."""
    s_CX, c_CX = clustered_sums(sums_NX, counts_NX, clusters)
    r_CX = s_CX - s_CX.sum(axis=0) / c_CX.sum(axis=0) * c_CX
    share_CX = c_CX / c_CX.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        e_CX = np.nan_to_num(r_CX / np.sqrt(c_CX * (1 - share_CX)))
    e_CX /= np.sqrt((e_CX**2).mean(axis=0))
    t_DX = _drawn_t(e_CX, c_CX, share_CX)
    return t_DX / np.quantile(t_DX, CONFIDENCE, axis=0)


def _drawn_t(e_CX: np.ndarray, c_CX: np.ndarray, share_CX: np.ndarray) -> np.ndarray:
    """|t| of each bucket in draws of whole clusters, with residuals correlated as e_CX are: [DRAWS, X]."""
    n, generator = len(e_CX), np.random.default_rng(0)
    root_RX = e_CX / math.sqrt(n)
    if n > FEW:
        root_RX = np.linalg.qr(root_RX, mode="r")  # the same covariance out of fewer numbers
    at_once = max(1, DRAWN_AT_ONCE // (n * len(root_RX)))
    parts = []
    for first in range(0, DRAWS, at_once):
        count = min(at_once, DRAWS - first)
        u_DCX = (generator.standard_normal((count, n, len(root_RX))) @ root_RX) * np.sqrt(c_CX)
        mean_DX = u_DCX.sum(axis=1) / c_CX.sum(axis=0)
        r_DCX = u_DCX - c_CX * mean_DX[:, None]
        parts.append(np.abs(mean_DX) * c_CX.sum(axis=0) / np.sqrt((r_DCX**2 / (1 - share_CX)).sum(axis=1)))
    return np.concatenate(parts)
