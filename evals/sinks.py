"""MoBA with a few tokens in place of a first block, for comparison with `first_blocks`: not a setting of the product.

Shapes: T queries, H query heads, G key/value heads, R = H / G, D head size, S = SINKS.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moba.gates import select
from moba.kinds import Moba
from moba.routing import full_precision, score_dtype

SINKS = 4
"""Tokens, as in StreamingLLM (arXiv 2309.17453)."""


@dataclass(frozen=True)
class MobaWithSinks(Moba):
    """MoBA whose queries also attend to the first SINKS tokens of their document, by whichever backend and without a
    gradient: blocks and tokens are attended to apart and merged by their log-sum-exps."""

    def __post_init__(self):
        super().__post_init__()
        if self.block_size < SINKS:
            raise ValueError(f"block_size={self.block_size}: the {SINKS} sink tokens have to lie in one block")

    def attended_pairs(self, length: int) -> int:
        """At most: queries that select the first block see no more than MoBA's."""
        return super().attended_pairs(length) + SINKS * max(0, length - self.block_size * self.top_k)

    @torch.no_grad()
    def run(self, backend, q, k, v, documents, *, softmax_scale, return_lse, selection=None, **options: Any):
        if selection is None:
            selection = select(self.routing, q, k, documents=documents, softmax_scale=softmax_scale)
        options |= {"softmax_scale": softmax_scale, "selection": selection}
        out_THD, lse_HT = super().run(backend, q, k, v, documents, return_lse=True, **options)
        assert lse_HT is not None
        layout, dtype = documents.layout(self.block_size), score_dtype(k)
        first_T1 = layout.start_M[layout.query_first_block_T, None]
        index_TS = (first_T1 + torch.arange(SINKS, device=q.device)).clamp(max=layout.num_keys - 1)
        q_TGRD = q.to(dtype).unflatten(1, (k.shape[1], -1))
        scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
        with full_precision(q.device):
            scores_GRTS = torch.einsum("tgrd,tsgd->grts", q_TGRD, k[index_TS].to(dtype)) * scale
            sinks_TGRD = torch.einsum("grts,tsgd->tgrd", scores_GRTS.softmax(-1), v[index_TS].to(dtype))
        # Whoever selects the first block, or is in it, has them already.
        sinks_HT = scores_GRTS.logsumexp(-1).flatten(0, 1).masked_fill((selection == 0).any(-1), float("-inf"))
        weight_TH1 = (sinks_HT - lse_HT).sigmoid().T[..., None]
        merged_THD = torch.lerp(out_THD.to(dtype), sinks_TGRD.flatten(1, 2), weight_TH1).to(q.dtype)
        return merged_THD, torch.logaddexp(lse_HT, sinks_HT)

    def __str__(self) -> str:
        return f"{super().__str__()}, {SINKS} sink tokens"
