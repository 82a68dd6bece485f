"""What the router does: how far back queries look, whether they spread over the blocks or collapse onto a few, and how
much of full attention's probability the chosen blocks hold.

The first two come from a selection as `route` returns it. The third is exact, for as many queries as are asked for:
their products with all keys give the share of each block, and so also what the best blocks would have held.

The document's `first_blocks` first blocks, which everybody attends to, are no picks: the router did not choose them,
and what stands in its place, the best or random blocks, has them too and only the rest of the budget to choose.

Shapes: T queries (all of a pack's keys), H query heads, G key/value heads, D head size, K = top_k, M block slots of the
pack, B tokens of a block, C sampled queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moba.documents import Documents
from moba.gates import block_log_mass, select
from moba.layer import MoBAAttention
from moba.routing import BlockLayout

SAMPLED_QUERIES = 64
MASS_ELEMENTS = 1 << 24


class Load(NamedTuple):
    """How often each block is picked, and how often it would be if every query picked evenly among those it may."""

    picks_HM: Tensor
    """float32 [H, M]; 0 for first blocks, which nobody picks."""
    expected_M: Tensor
    """float32 [M]: the sum of min(1, (K - 1 - F) / (candidates - F)), with F = first_blocks, over the queries that may
    pick the block; 0 for those that nobody may, first blocks among them. Raw counts would favour early blocks, which
    more queries may pick."""


@torch.no_grad()
def block_load(selection_HTK: Tensor, layout: BlockLayout, first_blocks: int = 0) -> Load:
    """The load of the blocks of a pack whose queries are all its keys."""
    num_heads, _, top_k = selection_HTK.shape
    block_HTk = selection_HTK[:, :, :-1].long() + layout.query_first_block_T[:, None]
    picked_HTk = selection_HTK[:, :, :-1] >= first_blocks
    picks_HM = torch.zeros(num_heads, layout.num_blocks, device=selection_HTK.device)
    picks_HM.scatter_add_(1, block_HTk.clamp(min=0).flatten(1), picked_HTk.flatten(1).float())

    candidates_T = layout.query_block_T - layout.query_first_block_T - first_blocks
    rate_T = ((top_k - 1 - first_blocks) / candidates_T.clamp(min=1)).clamp(max=1) * (candidates_T > 0)
    rate_M = torch.zeros(layout.num_blocks + 1, dtype=torch.float64, device=rate_T.device)
    rate_M.index_add_(0, layout.query_block_T + 1, rate_T.double())
    below_M = rate_M.cumsum(0)  # of the queries in earlier blocks of the pack
    last_N = layout.first_block_N[1:]
    document_M = layout.document_M.clamp(max=len(last_N) - 1)
    expected_M = (below_M[last_N[document_M]] - below_M[1:]) * (layout.document_M < len(last_N))
    place_M = torch.arange(layout.num_blocks, device=rate_T.device) - layout.first_block_N[document_M]
    expected_M = expected_M * (place_M >= first_blocks)
    return Load(picks_HM, expected_M.clamp(min=0).float())


@torch.no_grad()
def routing_stats(selection_HTK: Tensor, layout: BlockLayout, first_blocks: int = 0) -> dict[str, Tensor]:
    """Scalars (float32, on the selection's device, nothing waits for it) of a selection int32 [H, T, K] of a pack whose
    queries are all its keys.

    history_blocks: mean number of history blocks a query attends to, at most K - 1, `first_blocks` of them no picks.
    previous_share, first_share: shares of the picks that are the block just before the query's own, or its document's
    first. distance: mean number of blocks between the query's block and a pick. Of the load relative to
    `Load.expected_M`, mean over heads: load_entropy: its entropy over that of an even load, 1 is even, 0 all on one
    block; max_load: its largest value, 1 if even; dead_share: share of blocks that nobody picked.
    All but the first are NaN where no query picked any history block.
    """
    history, own = selection_HTK[:, :, :-1].long(), selection_HTK[:, :, -1:].long()
    picked = history >= first_blocks
    num_picks = picked.sum().float()
    picks_HM, expected_M = block_load(selection_HTK, layout, first_blocks)
    open_M = expected_M > 0
    load_HM = torch.where(open_M, picks_HM / expected_M, 0)
    share_HM = load_HM / load_HM.sum(1, keepdim=True)
    num_open = open_M.sum()
    return {
        "history_blocks": (history >= 0).sum().float() / (selection_HTK.shape[0] * selection_HTK.shape[1]),
        "previous_share": (picked & (history == own - 1)).sum() / num_picks,
        "first_share": (picked & (history == 0)).sum() / num_picks,
        "distance": ((own - history) * picked).sum() / num_picks,
        "load_entropy": (torch.special.entr(share_HM).sum(1) / num_open.log().clamp(min=1e-6)).mean(),
        "max_load": load_HM.amax(1).mean() / (num_picks > 0),
        "dead_share": (open_M & (picks_HM == 0)).sum() / (num_open * len(picks_HM)),
    }


class BlockMass(NamedTuple):
    """Where full attention's probability lies, for some queries."""

    history_HCM: Tensor
    """[H, C, M] share of each block of the pack that lies wholly before the query; 0 for the others."""
    own_HC: Tensor
    """[H, C] share of the query's own block, up to itself."""
    candidates_CM: Tensor
    """bool [C, M]: the blocks that lie wholly before the query."""

    def free(self, first_blocks: int) -> Tensor:
        """bool [C, M]: the candidates that compete, all but the document's first."""
        return self.candidates_CM & (self.candidates_CM.cumsum(1) > first_blocks)


@torch.no_grad()
def block_mass(
    q: Tensor, k: Tensor, layout: BlockLayout, rows_C: Tensor, softmax_scale: float | None = None
) -> BlockMass:
    """The shares of full attention of the queries `rows_C` (int64), exact, from log-sum-exps in float32 (float64 for
    float64 inputs). q is [T, H, D], k [T, G, D]. Without Triton all products of the queries with all keys exist at
    once: take few queries at a time where keys are many."""
    blocks_M = torch.arange(layout.num_blocks, device=q.device)
    first_C1, own_C1 = layout.query_first_block_T[rows_C, None], layout.query_block_T[rows_C, None]
    candidates_CM = (blocks_M >= first_C1) & (blocks_M < own_C1)
    log_HCM = block_log_mass(q[rows_C], k, layout, rows_C, slice(0, layout.num_blocks), softmax_scale)
    share_HCM = log_HCM.softmax(-1)
    own_HC = share_HCM.gather(2, own_C1.expand(len(log_HCM), -1, -1))[..., 0]
    return BlockMass(share_HCM.masked_fill_(~candidates_CM, 0), own_HC, candidates_CM)


def captured_share(mass: BlockMass, selection_HCK: Tensor, layout: BlockLayout, rows_C: Tensor) -> Tensor:
    """[H, C]: the share of full attention that the selected blocks hold; `selection_HCK` is that of the rows."""
    history = selection_HCK[:, :, :-1].long()
    block = (history + layout.query_first_block_T[rows_C, None]).clamp(min=0)
    return mass.own_HC + (mass.history_HCM.gather(2, block) * (history >= 0)).sum(-1)


def forced_share(mass: BlockMass, first_blocks: int) -> Tensor:
    """[H, C]: the share that the own block and the first ones hold, which every query has whatever picks the rest."""
    return mass.own_HC + (mass.history_HCM * ~mass.free(first_blocks)).sum(-1)


def oracle_share(mass: BlockMass, top_k: int, first_blocks: int = 0) -> Tensor:
    """[H, C]: the share that the own block, the first ones and the best of the others within top_k hold."""
    free_HCM = mass.history_HCM * mass.free(first_blocks)
    best = free_HCM.topk(min(top_k - 1 - first_blocks, free_HCM.shape[2]), dim=-1).values
    return forced_share(mass, first_blocks) + best.sum(-1)


def random_share(mass: BlockMass, top_k: int, first_blocks: int = 0) -> Tensor:
    """[H, C]: the share that the own block, the first ones and others drawn at random within top_k hold on average."""
    free_CM = mass.free(first_blocks)
    rate_C = ((top_k - 1 - first_blocks) / free_CM.sum(1).clamp(min=1)).clamp(max=1)
    return forced_share(mass, first_blocks) + (mass.history_HCM * free_CM).sum(-1) * rate_C


def routed_queries(layout: BlockLayout, top_k: int, count: int) -> Tensor:
    """int64 [<= count]: queries for which the gate drops a block (more candidates than top_k - 1), evenly spaced over
    all of them. Waits for the device."""
    rows = (layout.query_block_T - layout.query_first_block_T >= top_k).nonzero().flatten()
    if len(rows) <= count:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, count, device=rows.device).round().long()]


@contextmanager
def record_routing(model: nn.Module) -> Iterator[list[dict[str, Tensor]]]:
    """A list that gets, for every MoBA layer in the first forward pass inside the context, `routing_stats` and the mean
    captured, oracle's and random shares over SAMPLED_QUERIES queries that drop a block (NaN if there is none).

    Empty if no layer is MoBA. The selection is computed once more for it, so this is for evaluations, not for every
    training step.
    """
    recorded: list[dict[str, Tensor]] = []
    layers = [m for m in model.modules() if isinstance(m, MoBAAttention) and m.spec.routing is not None]

    def observe(layer: MoBAAttention, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> None:
        layer.observer = None
        routing, q, k = layer.spec.routing, q.detach(), k.detach()
        assert routing is not None
        layout, top_k, first = documents.layout(routing.block_size), routing.top_k, routing.first_blocks
        selection = select(routing, q, k, documents=documents)
        stats = routing_stats(selection, layout, first)
        rows = routed_queries(layout, top_k, SAMPLED_QUERIES)
        shares = []
        for part in rows.split(max(1, MASS_ELEMENTS // (q.shape[1] * k.shape[0]))):
            mass = block_mass(q, k, layout, part)
            captured = captured_share(mass, selection[:, part], layout, part)
            shares.append(torch.stack([captured, oracle_share(mass, top_k, first), random_share(mass, top_k, first)]))
        means = torch.cat(shares, -1).mean((1, 2)).float()
        stats |= dict(zip(("captured", "oracle_share", "random_share"), means))
        recorded.append(stats if layer.axis is None else _over_processes(stats, layer, q.shape[1]))

    for layer in layers:
        layer.observer = observe
    try:
        yield recorded
    finally:
        for layer in layers:
            layer.observer = None


def _over_processes(stats: dict[str, Tensor], layer: MoBAAttention, num_heads: int) -> dict[str, Tensor]:
    """The means over all heads of what each process measured of its own `num_heads`."""
    assert layer.axis is not None
    values = torch.stack([*stats.values()])
    *sums, heads = layer.axis.sum(torch.cat([values, torch.ones_like(values[:1])]) * num_heads)
    return {name: total / heads for name, total in zip(stats, sums)}


def mean_stats(recorded: list[dict[str, Tensor]]) -> dict[str, float]:
    """Each scalar's mean over layers, on the host, without NaN (no picks); one without any number is left out."""
    means = {}
    for name in recorded[0] if recorded else ():
        value = torch.stack([stats[name] for stats in recorded]).nanmean().item()
        if value == value:
            means[name] = value
    return means
