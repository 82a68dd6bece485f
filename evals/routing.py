"""Routing of each MoBA layer and head on held-out documents: the share of full attention's probability it captures,
that of the best blocks, which blocks it selects, and how well FlashMoBA's signal-to-noise model explains its hit rate.

All in one forward pass per document: at each layer `observe` gets the queries, keys and values of the attention. The
captured share of every query is exact, exp(lse of the sparse attention - lse of the full one). What needs the
probability of single blocks (oracle, recall, margin, SNR) is exact too, for `queries` evenly spaced queries. Means are
over routed queries only, those that drop some block: before position B * k sparse attention is full attention.

Shapes: N documents, L MoBA layers, H query heads, M blocks, C sampled queries, P buckets of positions, E octaves of
distance, Y cells of a map.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conf.numbers import format_length
from data.packing import Batch
from evals.context import Context
from evals.page import image, table
from evals.protocol import Eval, Job, Result
from evals.routing_figures import figures
from evals.routing_numbers import picked_blocks, sampled_queries, whole_document
from evals.routing_report import HEAD, SHARES, RoutingReport
from moba.documents import Documents
from moba.gates import select
from moba.kinds import AttentionSpec
from moba.layer import MoBAAttention
from moba.routing import BlockLayout
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


@torch.no_grad()
def diagnose(context: Context, documents: Sequence[tuple[str, Batch]], *, queries: int = 256) -> RoutingReport:
    """The RoutingReport of a model's MoBA layers, on every rank.

    `documents` are (id, batch of one document, all of one length). `queries` are sampled from each document and layer.
    ValueError if no layer is MoBA, or sparse attention equals full attention at this length.
    """
    model = context.model
    seq_len = documents[0][1].tokens.numel()
    layers = [i for i, spec in enumerate(model.attention) if spec.routing is not None]
    specs = [model.attention[i] for i in layers]
    routings = [spec.routing for spec in specs if spec.routing is not None]
    if not specs:
        raise ValueError("no layer of the model is MoBA here; choose an attention such as attention=512x3")
    for routing in routings:
        if routing.top_k - routing.first_blocks == 1:
            beside = f" and the first {routing.first_blocks}" if routing.first_blocks else " alone"
            raise ValueError(f"top_k={routing.top_k} routes nothing: each query attends to its own block{beside}")
    if any(spec.is_dense_at(seq_len) for spec in specs):
        reach = max(routing.block_size * routing.top_k for routing in routings)
        raise ValueError(
            f"nothing is routed: {specs[0]} is full attention up to {reach} tokens, documents have {seq_len}"
        )
    sums = _Sums(len(documents), layers, specs, model.config.num_heads, seq_len, context.device, queries)
    for index, counts in context.share(len(documents), "routing"):
        batch = documents[index][1].to(context.device)
        assert batch.tokens.numel() == seq_len and batch.cu_seqlens.numel() == 2
        with observed(model, layers, sums.observer(index if counts else None)):
            model.logits(batch.tokens, batch.positions, batch.documents, rows=batch.tokens.new_zeros(1))
    return sums.report([context.cluster_of(name) for name, _ in documents], context.reduce)


@contextmanager
def observed(model: Decoder, layers: Sequence[int], observe: Callable):
    """Calls observe(position among the layers, layer, q, k, v) with the inputs of each of these layers' attention."""
    every = [module for module in model.modules() if isinstance(module, MoBAAttention)]  # one per layer
    modules = [every[i] for i in layers]
    for place, module in enumerate(modules):

        def see(layer, q, k, v, documents, place=place):
            observe(place, layer.spec, q, k, v, documents)

        module.observer = see
    try:
        yield
    finally:
        for module in modules:
            module.observer = None


class _Sums:
    """Accumulators on the device; each document's rows are written by one rank."""

    def __init__(self, num_documents, layers, specs, num_heads, seq_len, device, queries):
        self.layers, self.specs, self.queries, self.seq_len = layers, specs, queries, seq_len
        self.cells = min(MAX_CELLS, -(-seq_len // max(spec.routing.block_size for spec in specs)))
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
        """An observer that adds one document; None counts nothing."""

        def observe(place: int, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> None:
            if document is not None:
                self._add(document, place, spec, q, k, v, documents)

        return observe

    def _add(
        self, document: int, place: int, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, documents: Documents
    ) -> None:
        assert spec.routing is not None
        layout = documents.layout(spec.routing.block_size)
        selection = select(spec.routing, q, k, documents=documents)
        found = whole_document(q, k, v, spec, selection, documents)
        rows = routed_queries(layout, spec.routing.top_k, self.queries)
        parts = []
        for part in rows.split(max(1, MASS_ELEMENTS // (q.shape[1] * k.shape[0]))):
            mass = block_mass(q, k, layout, part)
            parts.append(sampled_queries(q, k, mass, selection[:, part], layout, part, spec.routing))
            first = spec.routing.first_blocks
            self._place(document, place, mass, selection[:, part], layout, part, parts[-1], first)
        for name in parts[0]:
            found[name] = torch.cat([values[name] for values in parts], dim=1).nanmean(dim=1)
        found["regret"] = found["oracle"] - found["captured"]
        self.heads[:, document, place] = torch.stack([found[name].double() for name in HEAD])
        self._map_picks(place, selection, layout)

    def _place(self, document, place, mass: BlockMass, selection_HCK, layout, rows, shares, first: int) -> None:
        """Adds what depends on position: shares by bucket, distances (of all but the first blocks), the map of
        probability."""
        bucket_C = rows * NUM_BUCKETS // self.seq_len
        means_CS = torch.stack([shares[name] for name in SHARES], -1).mean(0).double()
        self.shares[document, place].index_add_(0, bucket_C, means_CS)
        self.counts[document, place].index_add_(0, bucket_C, torch.ones_like(bucket_C, dtype=torch.float64))
        own_C1 = layout.query_block_T[rows, None]
        back_CM = (own_C1 - torch.arange(layout.num_blocks, device=rows.device)).clamp(min=1)
        octave_CM = back_CM.double().log2().floor().long().clamp(max=NUM_OCTAVES - 1)
        picked_HCM, free_CM = picked_blocks(selection_HCK, layout.num_blocks, first), mass.free(first)
        for kind, weight_HCM in enumerate((picked_HCM, mass.history_HCM * free_CM)):
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
            [free_CM.sum().double(), torch.tensor(float(len(rows)), dtype=torch.float64, device=rows.device)]
        )

    def _map_picks(self, place: int, selection_HTK: Tensor, layout: BlockLayout) -> None:
        """Adds how often the queries of each cell selected a block of each cell, their own block included."""
        num_heads, num_tokens, _ = selection_HTK.shape
        cell_T = torch.arange(num_tokens, device=selection_HTK.device) * self.cells // num_tokens
        cell_HTK = self._cell_of_block(layout)[selection_HTK.clamp(min=0).long()]
        index_HTK = cell_T[:, None] * self.cells + cell_HTK
        counts = torch.zeros(num_heads, self.cells**2, dtype=torch.float64, device=cell_T.device)
        counts.scatter_add_(1, index_HTK.flatten(1), (selection_HTK >= 0).double().flatten(1))
        self.maps[place, :, 0] += counts.view(num_heads, self.cells, self.cells)
        self.rows[place, 0].index_add_(0, cell_T, torch.ones_like(cell_T, dtype=torch.float64))

    def _cell_of_block(self, layout: BlockLayout) -> Tensor:
        """The cell of each block, int64 [M]."""
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


def run(job: Job) -> Result:
    """Diagnoses the current attention's routing on held-out documents."""
    documents, queries = job.held_out(), job.integer("queries", 256)
    title = f"{job.title}: routing at {format_length(job.seq_len)}, {len(documents)} documents"
    job.say(title)
    return result(diagnose(job.context, documents, queries=queries), title, queries)


def result(report: RoutingReport, title: str, queries: int) -> Result:
    """The report as files and text; `queries` of each document and layer were sampled."""
    return Result(
        length=int(report.edges[-1]),
        record={"queries": queries, **report.summary()},
        text=report.table(),
        numbers={name: float(report.overall(name).mean) for name in HEAD},
        arrays=report.arrays(),
        figures=figures(report, title),
    )


def page(record: Mapping[str, Any], path: Path) -> str:
    """The means of all heads, and the figures."""
    rows = [
        (name, "" if value["mean"] is None else f"{value['mean']:.4f}", record["columns"][name])
        for name, value in record["overall"].items()
    ]
    drawn = [path.with_name(f"{path.stem}_{part}.png") for part in ("curves", "heads", "maps")]
    return table(("mean of all heads", "", ""), rows) + "\n".join(image(figure) for figure in drawn if figure.is_file())


EVAL = Eval(
    name="routing",
    about="what the gate of each MoBA layer and head picks, and what it misses.",
    run=run,
    keys={"queries": "queries of each document and layer whose blocks are measured one by one (default 256)"},
    heading="Routing",
    page=page,
)
