"""Which attention each layer should have within a budget of attended pairs over all layers: a search over measured
costs, without a model.

Costs are assumed to add over layers, as pairs do. So the best plan for a budget is a knapsack: on each layer's lower
convex hull of (pairs, cost) the steps that save most per pair come first, and the remaining budget goes to single
changes that still fit.

Shapes: L layers, C candidates for each of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from moba.backends.refusals import TRITON_TOP_K
from moba.kinds import AttentionSpec, Full, Moba

LEVELS = (1 / 4, 1 / 2, 3 / 4, 1, 3 / 2, 2, 3)
"""Multiples of the budget (a share of the causal pairs); candidates are the largest below each."""
SLACK = 1 + 1e-12
"""Tolerance for sums of floats."""
LEAST_TOP_K = 3
"""With fewer, the first block and the query's own leave a gate nothing to pick."""
LEAST_BLOCK = 16
"""Kernels compute with tiles of as many keys, at least."""


def pairs_share(spec: AttentionSpec, length: int) -> float:
    """Attended pairs over those of full attention, for a document of this length."""
    return spec.attended_pairs(length) / Full().attended_pairs(length)


def candidates(length: int, budget: float, block_sizes: Iterable[int], first_blocks: Iterable[int]) -> list[Moba]:
    """What a layer may have beside full attention: for each block size and first_blocks the largest top_k at each of
    LEVELS, up to what the Triton kernels take."""
    found = []
    for block_size in block_sizes:
        top_k, most = LEAST_TOP_K, min(TRITON_TOP_K, length // block_size)
        for level in LEVELS:
            share = min(budget * level, 1.0)
            while top_k < most and pairs_share(Moba(block_size, top_k + 1), length) <= share:
                top_k += 1
            fits = pairs_share(Moba(block_size, top_k), length) <= share
            if fits and not Moba(block_size, top_k).is_dense_at(length):
                found += [Moba(block_size, top_k, first_blocks=first) for first in first_blocks if first < top_k - 1]
    return list(dict.fromkeys(found))


def predicted_cost(kl_L: np.ndarray, error_LC: np.ndarray, reference_L: Sequence[int]) -> np.ndarray:
    """[L, C] predicted cost in nats of each candidate in each layer: the cost measured at the layer's reference
    candidate, scaled by the squared error of the attention's output. Near a minimum the loss is quadratic in small
    errors."""
    at_reference_L1 = np.take_along_axis(error_LC, np.asarray(reference_L)[:, None], axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio_LC = np.where(at_reference_L1 > 0, error_LC / at_reference_L1, 0)
    return np.maximum(kl_L, 0)[:, None] * ratio_LC


def allocate(pairs_C: np.ndarray, cost_LC: np.ndarray, budget: float) -> list[int]:
    """Each layer's candidate [L], of the least summed cost found within `budget` pairs in all. The smallest candidates
    must fit the budget."""
    num_layers = len(cost_LC)
    hulls = [_hull(pairs_C, cost_C) for cost_C in cost_LC]
    at = [hull[0] for hull in hulls]
    spent = float(sum(pairs_C[c] for c in at))
    assert spent <= budget * SLACK, (spent, budget)
    steps = []
    for layer, hull in enumerate(hulls):
        for before, after in itertools.pairwise(hull):
            saved = (cost_LC[layer, before] - cost_LC[layer, after]) / (pairs_C[after] - pairs_C[before])
            steps.append((-saved, layer, before, after))
    for _, layer, before, after in sorted(steps):
        if at[layer] == before and spent + pairs_C[after] - pairs_C[before] <= budget:
            spent += pairs_C[after] - pairs_C[before]
            at[layer] = after
    while True:
        room = [(cost_LC[i, at[i]] - cost_LC[i], pairs_C - pairs_C[at[i]]) for i in range(num_layers)]
        gains = [
            (saved[c], i, c)
            for i, (saved, rise) in enumerate(room)
            for c in range(len(pairs_C))
            if saved[c] > 0 and spent + rise[c] <= budget
        ]
        if not gains:
            return at
        _, layer, chosen = max(gains)
        spent += pairs_C[chosen] - pairs_C[at[layer]]
        at[layer] = chosen


def best_alike(pairs_C: np.ndarray, cost_LC: np.ndarray, budget: float) -> int:
    """The candidate within the budget with the least summed cost if all layers have the same."""
    fits_C = len(cost_LC) * pairs_C <= budget * SLACK
    assert fits_C.any(), (pairs_C, budget)
    return int(np.where(fits_C, cost_LC.sum(0), np.inf).argmin())


def _hull(pairs_C: np.ndarray, cost_C: np.ndarray) -> list[int]:
    """The candidates on the lower convex hull of (pairs, cost), from the fewest pairs to the least cost."""
    hull: list[int] = []
    for c in sorted(range(len(pairs_C)), key=lambda c: (pairs_C[c], cost_C[c])):
        if hull and (cost_C[c] >= cost_C[hull[-1]] or pairs_C[c] == pairs_C[hull[-1]]):
            continue
        while len(hull) > 1:
            a, b = hull[-2:]
            rise = (cost_C[b] - cost_C[a]) * (pairs_C[c] - pairs_C[a])
            if rise < (cost_C[c] - cost_C[a]) * (pairs_C[b] - pairs_C[a]):
                break
            hull.pop()
        hull.append(c)
    return hull
