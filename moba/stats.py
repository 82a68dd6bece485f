"""Scalars that show what the router does: how far back queries look, and whether they spread or collapse onto a few
blocks.

Everything is computed on the device from a selection as `route` returns it, and nothing waits for the device: read the
values when the metrics are written.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def routing_stats(selection_HTK: Tensor, block_size: int) -> dict[str, Tensor]:
    """Scalars (float32, on the selection's device) of a selection int32 [H, T, K] of a pack whose queries are all its
    keys.

    history_blocks: mean number of history blocks a query attends to, at most K - 1. previous_share, first_share:
    shares of the picks that are the block just before the query's own, or its document's first. distance: mean number
    of blocks between the query's block and a pick. entropy: of the picked block indices of a head, in nats, mean over
    heads; the indices count from the start of each document.
        exp(entropy) is the effective number of blocks in use.
    All but the first are NaN where no query picked any history block.
    """
    history, own = selection_HTK[:, :, :-1].long(), selection_HTK[:, :, -1:].long()
    picked = history >= 0
    num_picks = picked.sum().float()
    num_heads, num_tokens, _ = selection_HTK.shape

    # Picks per head and block; entries that are no picks count 0 for block 0.
    histogram = torch.zeros(num_heads, num_tokens // block_size + 1, device=selection_HTK.device)
    histogram.scatter_add_(1, history.clamp(min=0).flatten(1), picked.flatten(1).float())
    share = histogram / histogram.sum(1, keepdim=True)
    return {
        "history_blocks": num_picks / (num_heads * num_tokens),
        "previous_share": (picked & (history == own - 1)).sum() / num_picks,
        "first_share": (history == 0).sum() / num_picks,
        "distance": ((own - history) * picked).sum() / num_picks,
        "entropy": torch.special.entr(share).sum(1).mean(),
    }
