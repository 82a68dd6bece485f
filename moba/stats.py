"""Scalars that show what the router does: how far back queries look, and whether they spread or collapse onto a few
blocks.

Everything is computed on the device from a selection as `route` returns it, and nothing waits for the device: read the
values when the metrics are written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moba.layer import MoBAAttention
from moba.routing import route


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


@contextmanager
def record_routing(model: nn.Module) -> Iterator[list[dict[str, Tensor]]]:
    """A list that gets the `routing_stats` of every MoBA layer in the first forward pass inside the context.

    Empty if no layer is MoBA. The selection is computed once more for it, so this is for evaluations, not for every
    training step.
    """
    recorded: list[dict[str, Tensor]] = []
    layers = [m for m in model.modules() if isinstance(m, MoBAAttention) and m.spec.kind == "moba"]

    def observe(layer: MoBAAttention, q_THD: Tensor, k_TGD: Tensor, cu_seqlens: Tensor | None) -> None:
        layer.observer = None
        spec = layer.spec
        selection = route(
            q_THD.detach(), k_TGD.detach(), block_size=spec.block_size, top_k=spec.top_k, cu_seqlens=cu_seqlens
        )
        recorded.append(routing_stats(selection, spec.block_size))

    for layer in layers:
        layer.observer = observe
    try:
        yield recorded
    finally:
        for layer in layers:
            layer.observer = None


def mean_stats(recorded: list[dict[str, Tensor]]) -> dict[str, float]:
    """Each scalar's mean over layers, on the host, without NaN (no picks); one without any number is left out."""
    means = {}
    for name in recorded[0] if recorded else ():
        value = torch.stack([stats[name] for stats in recorded]).nanmean().item()
        if value == value:
            means[name] = value
    return means
