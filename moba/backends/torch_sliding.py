"""The `torch` backend of sliding windows: attention in tiles along the diagonal, in plain PyTorch, on any device.

Each document's queries are cut into tiles of neighbours. A tile is one matrix product with the keys that its queries
see, the window - 1 tokens before the tile included; tiles of equal shape share a mask and are multiplied together. So
work and memory grow with T * window, and the workspace is bounded whatever the length. The backward pass recomputes
the probabilities from the log-sum-exp.

Tiles that share keys never stand in one step, so sums run in a fixed order and results repeat bit for bit. The lengths
of the documents are needed on the host.

Shapes: T queries, S keys, H query heads, G key/value heads, R = H / G, D head size; L tiles of a step, n queries and b
keys of each.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import accumulate

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moba.documents import Documents
from moba.routing import full_precision, score_dtype

# Queries of a tile: about as many as the window has keys, within what makes efficient products.
LEAST_QUERIES, MOST_QUERIES = 16, 128
# Scores of a step: few enough for the cache of a CPU core.
STEP_ELEMENTS = 1 << 20


def sliding_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    *,
    window: int,
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(out [T, H, D] in q's dtype, log-sum-exp [H, T] in float32, or float64 for float64 inputs, without gradient).

    Sizes as for `moba.sliding_attention`, which checks them. Half precisions are computed in float32.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    bounds, bounds_k = (tuple(accumulate(lengths, initial=0)) for lengths in documents.host_lengths())
    return _Sliding.apply(q, k, v, bounds, bounds_k, window, scale)


class _Sliding(torch.autograd.Function):
    """Attention of every query to the last `window` keys of its document."""

    @staticmethod
    def forward(ctx, q, k, v, bounds, bounds_k, window, scale):
        dtype = score_dtype(q)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse_TH = q.new_empty(q.shape[:2], dtype=dtype)
        steps = _Steps(q, k, bounds, bounds_k, window, scale)
        with full_precision(q.device):
            for query_Ln, key_Lb, hidden_nb in steps:
                scores_LGrb, _, _ = steps.scores(query_Ln, key_Lb, hidden_nb)
                peak_LGr1 = scores_LGrb.amax(dim=-1, keepdim=True)
                probs_LGrb = scores_LGrb.sub_(peak_LGr1).exp_()
                total_LGr1 = probs_LGrb.sum(dim=-1, keepdim=True)
                out_LGrD = (probs_LGrb @ steps.key_heads(v, key_Lb)).div_(total_LGr1)
                out[query_Ln] = steps.tokens(out_LGrD, query_Ln).to(out.dtype)
                lse_TH[query_Ln] = steps.tokens(total_LGr1.log_().add_(peak_LGr1), query_Ln)[..., 0]
        lse_HT = lse_TH.T.contiguous()
        ctx.save_for_backward(q, k, v, out, lse_HT)
        ctx.call = (bounds, bounds_k, window, scale)
        ctx.mark_non_differentiable(lse_HT)
        return out, lse_HT

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, _dlse):  # pyright: ignore[reportIncompatibleMethodOverride]  # torch: *grad_outputs
        q, k, v, out, lse_HT = ctx.saved_tensors
        steps = _Steps(q, k, *ctx.call)
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        dk, dv = (torch.zeros_like(x, dtype=lse_HT.dtype) for x in (k, v))
        with full_precision(q.device):
            for query_Ln, key_Lb, hidden_nb in steps:
                scores_LGrb, q_LGrD, k_LGbD = steps.scores(query_Ln, key_Lb, hidden_nb)
                lse_LGr1 = steps.query_heads(lse_HT.T[..., None], query_Ln)
                probs_LGrb = scores_LGrb.sub_(lse_LGr1).exp_()
                dout_LGrD = steps.query_heads(dout, query_Ln)
                delta_LGr1 = (dout_LGrD * steps.query_heads(out, query_Ln)).sum(dim=-1, keepdim=True)
                keys = key_Lb.flatten()
                dv_LGbD = probs_LGrb.mT @ dout_LGrD
                dv.index_add_(0, keys, dv_LGbD.transpose(1, 2).flatten(0, 1))
                dprobs_LGrb = dout_LGrD @ steps.key_heads(v, key_Lb).mT
                dscores_LGrb = dprobs_LGrb.sub_(delta_LGr1).mul_(probs_LGrb)
                # q_LGrD holds the scale already.
                dk.index_add_(0, keys, (dscores_LGrb.mT @ q_LGrD).transpose(1, 2).flatten(0, 1))
                dq[query_Ln] = steps.tokens(dscores_LGrb @ k_LGbD, query_Ln).mul_(steps.scale).to(dq.dtype)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


class _Steps:
    """The tiles of a pack in steps of (queries [L, n], keys [L, b], what is hidden [n, b]), and their tensors."""

    def __init__(self, q: Tensor, k: Tensor, bounds, bounds_k, window: int, scale: float):
        self.q, self.k, self.window, self.scale = q, k, window, scale
        self.shapes = _tiles(bounds, bounds_k, window)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        device, num_heads = self.q.device, self.q.shape[1]
        for (num_queries, num_keys, _), tiles in self.shapes.items():
            hidden_nb = _hidden(num_queries, num_keys, self.window, device)
            starts = torch.tensor(tiles, device=device)
            for first_L2 in starts.split(max(1, STEP_ELEMENTS // (num_heads * num_queries * num_keys))):
                query_Ln = first_L2[:, :1] + torch.arange(num_queries, device=device)
                yield query_Ln, first_L2[:, 1:] + torch.arange(num_keys, device=device), hidden_nb

    def scores(self, query_Ln: Tensor, key_Lb: Tensor, hidden_nb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(masked scores [L, G, R * n, b], scaled queries [L, G, R * n, D], keys [L, G, b, D])."""
        q_LGrD, k_LGbD = self.query_heads(self.q, query_Ln).mul_(self.scale), self.key_heads(self.k, key_Lb)
        scores_LGrb = q_LGrD @ k_LGbD.mT
        scores_LGrb.unflatten(2, (-1, len(hidden_nb))).masked_fill_(hidden_nb, float("-inf"))
        return scores_LGrb, q_LGrD, k_LGbD

    def query_heads(self, x_THD: Tensor, query_Ln: Tensor) -> Tensor:
        """A copy of rows of x, which has a row per query: [L, G, R * n, D], the heads of a group one after the
        other."""
        x_LnGRD = x_THD[query_Ln].to(score_dtype(self.q)).unflatten(2, (self.k.shape[1], -1))
        return x_LnGRD.permute(0, 2, 3, 1, 4).flatten(2, 3)

    def key_heads(self, x_SGD: Tensor, key_Lb: Tensor) -> Tensor:
        """A copy of rows of k or v: [L, G, b, D]."""
        return x_SGD[key_Lb].to(score_dtype(self.q)).transpose(1, 2)

    def tokens(self, x_LGrD: Tensor, query_Ln: Tensor) -> Tensor:
        """`query_heads` undone: [L, n, H, D]."""
        return x_LGrD.unflatten(2, (-1, query_Ln.shape[1])).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _tiles(bounds, bounds_k, window: int) -> dict[tuple[int, int, int], list[tuple[int, int]]]:
    """(first query, first key) of every tile, under (queries, keys, colour); tiles of a colour share no keys.

    A tile's last query stands at its last key.
    """
    size = min(max(window, LEAST_QUERIES), MOST_QUERIES)
    num_colours = 1 + -(-(window - 1) // size)
    tiles = defaultdict(list)
    for i in range(len(bounds) - 1):
        shift = bounds_k[i + 1] - bounds[i + 1]
        for index, start in enumerate(range(bounds[i], bounds[i + 1], size)):
            stop = min(start + size, bounds[i + 1])
            first_key = max(bounds_k[i], start + shift - window + 1)
            tiles[stop - start, stop + shift - first_key, index % num_colours].append((start, first_key))
    return tiles


def _hidden(num_queries: int, num_keys: int, window: int, device: torch.device) -> Tensor:
    """Bool [queries, keys]: the keys that a query must not see, the last query being at the last key."""
    at_own = num_keys - num_queries
    ones = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    return ~(ones.tril(at_own) & ones.triu(at_own - window + 1))
