"""What the router of each MoBA layer and head does on held-out documents: how much of full attention it captures, how
much the best blocks would, whom it picks, and how well FlashMoBA's signal-to-noise model explains its hits.

All in one forward pass a document: at each layer the queries, keys and values that the attention is about to use are
handed to `observe`. The captured share of every query is exact, exp(lse of the sparse attention - lse of the full
one). What needs the mass of single blocks (oracle, recall, margin, SNR) is exact too, for `queries` evenly spaced
queries. Every mean is over routed queries alone, those for which some block has to be dropped: before position B * k
sparse attention is full attention, and would flatter.

Shapes: N documents, L MoBA layers, H query heads, M blocks, C sampled queries, P buckets of positions, E octaves of
distance, Y cells of a map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.packing import Batch
from evals.position_loss import plain
from evals.results import write_json
from evals.routing_numbers import picked_blocks, sampled_queries, whole_document
from evals.statistics import Estimate, clustered_mean, half_width
from moba.gates import select
from moba.layer import MoBAAttention
from moba.routing import BlockLayout
from moba.spec import AttentionSpec
from moba.stats import (
    MASS_ELEMENTS,
    BlockMass,
    block_mass,
    routed_queries,
)
from train.model.decoder import Decoder

MAX_CELLS = 64
NUM_BUCKETS = 16
NUM_OCTAVES = 16
SHARES = ("captured", "oracle", "local", "random", "own")
# What is kept of each head. Shares are of full attention's probability.
HEAD = {
    "captured_all": "captured share, every routed query, from two log-sum-exps",
    "captured": "captured share, sampled queries (so are the rest of the shares)",
    "oracle": "share in the own block and the best top_k - 1",
    "local": "share in the own block and the latest top_k - 1",
    "random": "share in the own block and top_k - 1 at random, on average",
    "own": "share in the own block",
    "regret": "oracle - captured: what the router loses; sparsity loses 1 - oracle",
    "recall": "share of the oracle's history blocks that were picked",
    "hit": "share of queries whose best history block was picked",
    "margin": "gap between the last picked and the first dropped score, in standard deviations of the scores",
    "snr": "score of the best block over the mean of the others, in sqrt(2) standard deviations of theirs",
    "output_error": "norm of (sparse - full output) over the norm of the full output",
    "load_entropy": "entropy of the picks relative to eligibility: 1 even, 0 all on one block",
    "max_load": "largest load relative to an even router's",
    "dead_share": "share of the blocks that no query picked",
}


@dataclass(frozen=True, eq=False)
class RoutingReport:
    """What was found. Means over documents, each of equal weight."""

    layers: list[int]
    """[L] index of each MoBA layer in the model."""
    specs: list[AttentionSpec]
    """[L]"""
    heads_NLH: dict[str, np.ndarray]
    """HEAD name -> [N, L, H]."""
    shares_NLPS: np.ndarray
    """[N, L, P, SHARES] by bucket of position, mean over heads and sampled queries; NaN where none was sampled."""
    edges: np.ndarray
    """[P + 1] bucket edges, in tokens."""
    distance_NL2E: np.ndarray
    """[N, L, (picks, mass), E] share of the picks, and of the history's probability, at 2^e to 2^(e + 1) - 1 blocks
    back."""
    maps_LH2YY: np.ndarray
    """[L, H, (picks, mass), query cell, key cell]: share of queries that picked a block of the cell, and mean
    probability in the cell; cells are equal parts of the document."""
    candidates: float
    """Mean number of blocks that a sampled query could pick from."""
    clusters: list[str]
    """[N]"""

    def head(self, name: str) -> Estimate:
        """[L, H] mean over documents, with its clustered error."""
        return _over_documents(self.heads_NLH[name], self.clusters)

    def overall(self, name: str) -> Estimate:
        """Mean over documents of the mean over layers and heads."""
        return _over_documents(np.nanmean(self.heads_NLH[name], axis=(1, 2)), self.clusters)

    def by_position(self) -> Estimate:
        """[P, SHARES] mean over documents and layers."""
        return _over_documents(self.shares_NLPS.mean(axis=1), self.clusters)

    def summary(self) -> dict[str, Any]:
        """Plain JSON values: overall means and those of each head."""
        overall = {name: self.overall(name) for name in HEAD}
        return {
            "unit": "shares of full attention's probability; means over routed queries, then documents",
            "num_documents": len(self.clusters),
            "num_clusters": len(set(self.clusters)),
            "columns": HEAD,
            "candidates": self.candidates,
            "overall": {name: dict(zip(("mean", "se"), plain([e.mean, e.se]))) for name, e in overall.items()},
            "layers": self.layers,
            "specs": [str(spec) for spec in self.specs],
            "heads": {name: [plain(row) for row in self.head(name).mean] for name in HEAD},
            "heads_se": {name: [plain(row) for row in self.head(name).se] for name in HEAD},
        }

    def save(self, folder: Path, stem: str, **info: Any) -> Path:
        """Writes `stem`.json and .npz into `folder` and returns the path of the json; figures are evals/
        routing_figures.py's."""
        path = write_json(folder / f"{stem}.json", {**info, **self.summary()})
        np.savez_compressed(
            folder / f"{stem}.npz",
            shares_NLPS=self.shares_NLPS,
            edges=self.edges,
            distance_NL2E=self.distance_NL2E,
            maps_LH2YY=self.maps_LH2YY.astype(np.float32),
            **{f"heads_{name}": values for name, values in self.heads_NLH.items()},
        )
        return path

    def table(self) -> str:
        """The overall means as text."""
        lines = []
        for name in HEAD:
            found = self.overall(name)
            width = half_width(found.se, found.clusters)
            error = f" +- {width:.4f}" if np.isfinite(width) else ""
            lines.append(f"{name:>13} {found.mean:7.4f}{error:<11}  {HEAD[name]}")
        return "\n".join(lines)


def _over_documents(values_NX: np.ndarray, clusters: Sequence[str]) -> Estimate:
    known = np.isfinite(values_NX)
    return clustered_mean(np.where(known, values_NX, 0), known, clusters)


@torch.no_grad()
def diagnose(
    model: Decoder,
    documents: Sequence[tuple[str, Batch]],
    *,
    device: torch.device | str,
    queries: int = 256,
    cluster_of: Callable[[str], str] = str,
    rank: int = 0,
    world_size: int = 1,
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    watch: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> RoutingReport:
    """The RoutingReport of a model's MoBA layers, on every rank.

    `documents` are (id, batch of one document, all of one length); ranks share them out as evals.position_loss.evaluate
    does. `queries` are sampled from each document and layer. ValueError if no layer is MoBA, or sparse attention is
    full at this length.
    """
    seq_len = documents[0][1].tokens.numel()
    layers = [i for i, spec in enumerate(model.attention) if spec.kind == "moba"]
    specs = [model.attention[i] for i in layers]
    if not specs:
        raise ValueError("no layer of the model is MoBA here; choose an attention such as attention=512x3")
    if any(spec.top_k == 1 for spec in specs):
        raise ValueError("top_k=1 routes nothing: each query attends to its own block alone")
    if any(spec.is_dense_at(seq_len) for spec in specs):
        reach = max(spec.block_size * spec.top_k for spec in specs)
        raise ValueError(
            f"nothing is routed: {specs[0]} is full attention up to {reach} tokens, documents have {seq_len}"
        )
    sums = _Sums(len(documents), layers, specs, model.config.num_heads, seq_len, device, queries)
    for start in watch(range(0, len(documents), world_size)):
        index = start + rank
        batch = documents[index if index < len(documents) else 0][1].to(device)
        assert batch.tokens.numel() == seq_len and batch.cu_seqlens.numel() == 2
        with _observed(model, layers, sums.observer(index if index < len(documents) else None)):
            model.logits(batch.tokens, batch.positions, batch.cu_seqlens, rows=batch.tokens.new_zeros(1))
    return sums.report([cluster_of(name) for name, _ in documents], reduce)


@contextmanager
def _observed(model: Decoder, layers: Sequence[int], observe: Callable):
    """Hands what each of these layers' attention gets to observe(position among the layers, layer, q, k, v)."""
    modules: list[MoBAAttention] = [model.model.layers[i].self_attn for i in layers]
    for place, module in enumerate(modules):

        def see(layer, q, k, v, cu_seqlens, place=place):
            observe(place, layer.spec, q, k, v)

        module.observer = see
    try:
        yield
    finally:
        for module in modules:
            module.observer = None


class _Sums:
    """What is added up, on the device; each document's rows are written by one rank."""

    def __init__(self, num_documents, layers, specs, num_heads, seq_len, device, queries):
        self.layers, self.specs, self.queries, self.seq_len = layers, specs, queries, seq_len
        self.cells = min(MAX_CELLS, -(-seq_len // max(spec.block_size for spec in specs)))
        shape = (num_documents, len(layers))
        zeros = {"dtype": torch.float64, "device": device}
        self.heads = torch.zeros(len(HEAD), *shape, num_heads, **zeros)
        self.shares = torch.zeros(*shape, NUM_BUCKETS, len(SHARES), **zeros)
        self.counts = torch.zeros(*shape, NUM_BUCKETS, **zeros)
        self.distance = torch.zeros(*shape, 2, NUM_OCTAVES, **zeros)
        self.maps = torch.zeros(len(layers), num_heads, 2, self.cells, self.cells, **zeros)
        self.rows = torch.zeros(len(layers), 2, self.cells, **zeros)
        self.candidates = torch.zeros(2, **zeros)

    def observer(self, document: int | None) -> Callable:
        """Adds one document; None counts nothing."""

        def observe(place: int, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> None:
            if document is not None:
                self._add(document, place, spec, q, k, v)

        return observe

    def _add(self, document: int, place: int, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> None:
        layout = BlockLayout.build(spec.block_size, q.shape[0], k.shape[0], device=q.device)
        selection = select(spec.gate, q, k, spec.block_size, spec.top_k)
        found = whole_document(q, k, v, spec, selection, layout)
        rows = routed_queries(layout, spec.top_k, self.queries)
        parts = []
        for part in rows.split(max(1, MASS_ELEMENTS // (q.shape[1] * k.shape[0]))):
            mass = block_mass(q, k, layout, part)
            parts.append(sampled_queries(q, k, mass, selection[:, part], layout, part, spec))
            self._place(document, place, mass, selection[:, part], layout, part, parts[-1])
        for name in parts[0]:
            found[name] = torch.cat([values[name] for values in parts], dim=1).nanmean(dim=1)
        found["regret"] = found["oracle"] - found["captured"]
        self.heads[:, document, place] = torch.stack([found[name].double() for name in HEAD])
        self._map_picks(place, selection, layout)

    def _place(self, document, place, mass: BlockMass, selection_HCK, layout, rows, shares) -> None:
        """Where in the document: shares by bucket, distances, the map of probability."""
        bucket_C = rows * NUM_BUCKETS // self.seq_len
        means_CS = torch.stack([shares[name] for name in SHARES], -1).mean(0).double()
        self.shares[document, place].index_add_(0, bucket_C, means_CS)
        self.counts[document, place].index_add_(0, bucket_C, torch.ones_like(bucket_C, dtype=torch.float64))
        own_C1 = layout.query_block_T[rows, None]
        back_CM = (own_C1 - torch.arange(layout.num_blocks, device=rows.device)).clamp(min=1)
        octave_CM = back_CM.double().log2().floor().long().clamp(max=NUM_OCTAVES - 1)
        picked_HCM = picked_blocks(selection_HCK, layout.num_blocks)
        for kind, weight_HCM in enumerate((picked_HCM, mass.history_HCM)):
            self.distance[document, place, kind].index_add_(
                0, octave_CM.flatten(), weight_HCM.sum(0).flatten().double()
            )
        cell_C, cell_M = rows * self.cells // self.seq_len, self._cell_of_block(layout)
        by_cell_HCY = torch.zeros(*mass.own_HC.shape, self.cells, dtype=torch.float64, device=rows.device)
        by_cell_HCY.index_add_(2, cell_M, mass.history_HCM.double())
        by_cell_HCY.scatter_add_(
            2,
            cell_M[layout.query_block_T[rows]].expand(len(by_cell_HCY), -1)[..., None],
            mass.own_HC.double()[..., None],
        )
        self.maps[place, :, 1].index_add_(1, cell_C, by_cell_HCY)
        self.rows[place, 1].index_add_(0, cell_C, torch.ones_like(cell_C, dtype=torch.float64))
        self.candidates += torch.stack(
            [mass.candidates_CM.sum().double(), torch.tensor(float(len(rows)), dtype=torch.float64, device=rows.device)]
        )

    def _map_picks(self, place: int, selection_HTK: Tensor, layout: BlockLayout) -> None:
        """Adds how often the queries of each cell picked a block of each cell, the own one included."""
        num_heads, num_tokens, _ = selection_HTK.shape
        cell_T = torch.arange(num_tokens, device=selection_HTK.device) * self.cells // num_tokens
        cell_HTK = self._cell_of_block(layout)[selection_HTK.clamp(min=0).long()]
        index_HTK = cell_T[:, None] * self.cells + cell_HTK
        counts = torch.zeros(num_heads, self.cells**2, dtype=torch.float64, device=cell_T.device)
        counts.scatter_add_(1, index_HTK.flatten(1), (selection_HTK >= 0).double().flatten(1))
        self.maps[place, :, 0] += counts.view(num_heads, self.cells, self.cells)
        self.rows[place, 0].index_add_(0, cell_T, torch.ones_like(cell_T, dtype=torch.float64))

    def _cell_of_block(self, layout: BlockLayout) -> Tensor:
        """int64 [M]"""
        return (layout.start_M * self.cells // self.seq_len).clamp(max=self.cells - 1)

    def report(self, clusters: list[str], reduce: Callable[[Tensor], Tensor]) -> RoutingReport:
        """The report of all ranks' documents."""
        names = ("heads", "shares", "counts", "distance", "maps", "rows", "candidates")
        heads, shares, counts, distance, maps, rows, candidates = (
            reduce(getattr(self, name)).cpu().numpy() for name in names
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            return RoutingReport(
                layers=self.layers,
                specs=self.specs,
                heads_NLH=dict(zip(HEAD, heads)),
                shares_NLPS=shares / counts[..., None],
                edges=np.arange(NUM_BUCKETS + 1) * self.seq_len / NUM_BUCKETS,
                distance_NL2E=distance / distance.sum(axis=-1, keepdims=True),
                maps_LH2YY=maps / rows[:, None, :, :, None],
                candidates=float(candidates[0] / candidates[1]),
                clusters=clusters,
            )
