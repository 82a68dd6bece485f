"""Routing statistics of one layer on one document, per head, and FlashMoBA's model of a gate's hit rate.

Shapes: T tokens of a document, H query heads, M blocks, C sampled queries, K = top_k.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from moba.attention import attend
from moba.documents import Documents
from moba.gates import select
from moba.kinds import AttentionSpec, Routing
from moba.routing import BlockLayout, gate_scores, layout_means
from moba.stats import BlockMass, block_load, captured_share, forced_share, oracle_share, random_share


def whole_document(q, k, v, spec: AttentionSpec, selection, documents: Documents) -> dict[str, Tensor]:
    """[H] statistics over all queries."""
    assert spec.routing is not None
    layout = documents.layout(spec.routing.block_size)
    sparse_THD, sparse_lse_HT = attend(q, k, v, spec, documents, return_lse=True)
    full_THD, full_lse_HT = attend(q, k, v, spec.dense(), documents, return_lse=True)
    assert sparse_lse_HT is not None and full_lse_HT is not None
    routed_T = layout.query_block_T >= spec.routing.top_k
    error_THD, full_THD = (sparse_THD.double() - full_THD.double())[routed_T], full_THD.double()[routed_T]
    load = block_load(selection, layout, spec.routing.first_blocks)
    open_M = load.expected_M > 0
    load_HM = load.picks_HM[:, open_M] / load.expected_M[open_M]
    share_HM = load_HM / load_HM.sum(1, keepdim=True)
    return {
        "captured_all": (sparse_lse_HT - full_lse_HT)[:, routed_T].double().exp().mean(1),
        "output_error": error_THD.norm(dim=(0, 2)) / full_THD.norm(dim=(0, 2)),
        "load_entropy": torch.special.entr(share_HM).sum(1) / max(math.log(int(open_M.sum())), 1e-6),
        "max_load": load_HM.amax(1),
        "dead_share": (load_HM == 0).double().mean(1),
    }


def sampled_queries(
    q, k, mass: BlockMass, selection_HCK, layout: BlockLayout, rows, routing: Routing
) -> dict[str, Tensor]:
    """[H, C] statistics of the sampled queries' block probabilities and gate scores (of one document, whose queries all
    route). The first blocks, which are always attended, neither compete nor count as hits."""
    top_k, first = routing.top_k, routing.first_blocks
    candidates_CM = mass.free(first)
    history_HCM = mass.history_HCM * candidates_CM
    blocks_M = torch.arange(layout.num_blocks, device=q.device)
    own_C1, routed = layout.query_block_T[rows, None], top_k - 1 - first
    best_HC1 = history_HCM.argmax(-1, keepdim=True)
    wanted_HCM = torch.zeros_like(history_HCM, dtype=torch.bool)
    wanted_HCM.scatter_(2, history_HCM.topk(routed, dim=-1).indices, True)
    picked_HCM = picked_blocks(selection_HCK, layout.num_blocks, first)
    latest_CM = candidates_CM & (blocks_M >= own_C1 - routed)

    scores_HCM = gate_scores(q[rows], layout_means(k, layout)).double()
    sorted_HCM = scores_HCM.masked_fill(~candidates_CM, float("-inf")).sort(-1, descending=True).values
    _, spread_HC = _moments(scores_HCM, candidates_CM.expand_as(scores_HCM))
    return {
        "captured": captured_share(mass, selection_HCK, layout, rows),
        "oracle": oracle_share(mass, top_k, first),
        "local": forced_share(mass, first) + (history_HCM * latest_CM).sum(-1),
        "random": random_share(mass, top_k, first),
        "own": mass.own_HC,
        "recall": (wanted_HCM & (picked_HCM > 0)).sum(-1) / max(1, routed),
        "hit": picked_HCM.gather(2, best_HC1)[..., 0],
        "margin": (sorted_HCM[..., routed - 1] - sorted_HCM[..., routed]) / spread_HC if routed else 0 * spread_HC,
        "snr": signal_to_noise(scores_HCM, candidates_CM, best_HC1),
    }


def evidence_blocks(routing: Routing, q, k, documents: Documents, rows_C, tokens_C) -> dict[str, Tensor]:
    """float64 [H, C] of the queries `rows_C` of a document, each of which needs a token of `tokens_C`: whether that
    token's block is picked (hit), its signal-to-noise ratio (snr), and how many blocks compete (candidates). Only where
    the token's block competes."""
    layout = documents.layout(routing.block_size)
    selection_HCK = select(routing, q, k, documents=documents)[:, rows_C]
    blocks_M = torch.arange(layout.num_blocks, device=q.device)
    candidates_CM = (blocks_M >= routing.first_blocks) & (blocks_M < layout.query_block_T[rows_C, None])
    scores_HCM = gate_scores(q[rows_C], layout_means(k, layout)).double()
    target_HC1 = (tokens_C // routing.block_size)[:, None].expand(len(scores_HCM), -1, -1)
    picked_HCM = picked_blocks(selection_HCK, layout.num_blocks, routing.first_blocks)
    return {
        "hit": picked_HCM.gather(2, target_HC1)[..., 0],
        "snr": signal_to_noise(scores_HCM, candidates_CM, target_HC1),
        "candidates": candidates_CM.sum(1).double().expand(len(scores_HCM), -1),
    }


def signal_to_noise(scores_HCM: Tensor, candidates_CM: Tensor, target_HC1: Tensor) -> Tensor:
    """[H, C] the score of the target block over the mean of the other candidates, in sqrt(2) standard deviations of
    theirs."""
    others_HCM = candidates_CM.expand_as(scores_HCM).scatter(2, target_HC1, False)
    mean_HC, noise_HC = _moments(scores_HCM, others_HCM)
    return (scores_HCM.gather(2, target_HC1)[..., 0] - mean_HC) / (math.sqrt(2) * noise_HC)


def picked_blocks(selection_HCK: Tensor, num_blocks: int, first_blocks: int = 0) -> Tensor:
    """float64 [H, C, M]: 1 where a past block after the first ones was selected (of one document, so that blocks are
    the pack's)."""
    history = selection_HCK[:, :, :-1].long()
    picked = torch.zeros(*history.shape[:2], num_blocks, dtype=torch.float64, device=history.device)
    return picked.scatter_add_(2, history.clamp(min=0), (history >= first_blocks).double())


def _moments(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over the last dimension, where `mask`."""
    count = mask.sum(-1)
    mean = (values * mask).sum(-1) / count
    variance = ((values - mean[..., None]) ** 2 * mask).sum(-1) / (count - 1)
    return mean, variance.sqrt()


def model_hit_rate(snr: np.ndarray | float, candidates: float, picks: int) -> np.ndarray:
    """FlashMoBA's model: the probability that the target block is among the `picks` best of `candidates`, for a
    signal-to-noise ratio as `RoutingReport` measures it.

    Every block's score has normal noise of one variance, the target's a higher mean; `snr` is that gap over the
    standard deviation of the difference of two scores. Averaged over the target's own noise z, which all its
    comparisons share: E_z P(Binomial(candidates - 1, 1 - Phi(sqrt(2) snr + z)) < picks), by Gauss-Hermite quadrature.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(64)
    shift = math.sqrt(2) * np.asarray(snr, dtype=np.float64)[..., None] + nodes
    beats = 0.5 * np.vectorize(math.erfc)(shift / math.sqrt(2))
    others = round(candidates) - 1
    below = sum(math.comb(others, j) * beats**j * (1 - beats) ** (others - j) for j in range(min(picks, others + 1)))
    return (below * weights).sum(-1) / weights.sum()
