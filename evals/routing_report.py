"""Results of evals/routing.py as numbers, text and JSON values.

Shapes: N documents, L MoBA layers, H query heads, P buckets of positions, E octaves of distance, Y cells of a map.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evals.position_loss import plain
from evals.statistics import Estimate, clustered_mean, half_width
from moba.kinds import AttentionSpec
from moba.kinds.plan_file import entries_of, plan_of

SHARES = ("captured", "oracle", "local", "random", "own")
# Statistics kept per head. Shares are of full attention's probability.
HEAD = {
    "captured_all": "captured share, every routed query, from two log-sum-exps",
    "captured": "captured share, sampled queries (so are the rest of the shares)",
    "oracle": "share in the own block, the first ones and the best others within top_k",
    "local": "share in the own block, the first ones and the latest others within top_k",
    "random": "share in the own block, the first ones and others at random within top_k, on average",
    "own": "share in the own block",
    "regret": "oracle - captured: what the router loses; sparsity loses 1 - oracle",
    "recall": "share of the oracle's history blocks behind the first that were picked",
    "hit": "share of queries whose best history block behind the first was picked",
    "margin": "gap between the last picked and the first dropped score, in standard deviations of the scores",
    "snr": "score of the best block over the mean of the others, in sqrt(2) standard deviations of theirs",
    "output_error": "norm of (sparse - full output) over the norm of the full output",
    "load_entropy": "entropy of the picks relative to eligibility: 1 even, 0 all on one block",
    "max_load": "largest load relative to an even router's",
    "dead_share": "share of the blocks that no query picked",
}


@dataclass(frozen=True, eq=False)
class RoutingReport:
    """Routing statistics. Means over documents, each of equal weight."""

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
    """[N, L, (picks, mass), E] share of the selected blocks, and of the past blocks' probability, at 2^e to 2^(e + 1) -
    1 blocks back; without the first blocks, which are always attended."""
    maps_LH2YY: np.ndarray
    """[L, H, (picks, mass), query cell, key cell]: share of queries that attend to a block of the cell, and mean
    probability in the cell; cells are equal parts of the document."""
    candidates: float
    """Mean number of blocks that a sampled query selects from."""
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
            "plan": entries_of(self.specs),
            "clusters": self.clusters,
            "heads": {name: [plain(row) for row in self.head(name).mean] for name in HEAD},
            "heads_se": {name: [plain(row) for row in self.head(name).se] for name in HEAD},
        }

    @classmethod
    def load(cls, path: Path) -> RoutingReport:
        """The report whose .json and .npz launch/evaluate.py wrote."""
        record = json.loads(path.read_text(encoding="utf-8"))
        with np.load(path.with_suffix(".npz")) as arrays:
            kept = {name: arrays[name] for name in ("shares_NLPS", "edges", "distance_NL2E", "maps_LH2YY")}
            heads = {name: arrays[f"heads_{name}"] for name in HEAD}
        specs = list(plan_of(record["plan"]))
        return cls(record["layers"], specs, heads, candidates=record["candidates"], clusters=record["clusters"], **kept)

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays of the .npz."""
        return {
            "shares_NLPS": self.shares_NLPS,
            "edges": self.edges,
            "distance_NL2E": self.distance_NL2E,
            "maps_LH2YY": self.maps_LH2YY.astype(np.float32),
            **{f"heads_{name}": values for name, values in self.heads_NLH.items()},
        }

    def table(self) -> str:
        """The overall means as text."""
        lines = []
        for name in HEAD:
            found = self.overall(name)
            width = half_width(found.se, found.freedom)
            error = f" +- {width:.4f}" if np.isfinite(width) else ""
            lines.append(f"{name:>13} {found.mean:7.4f}{error:<11}  {HEAD[name]}")
        return "\n".join(lines)


def _over_documents(values_NX: np.ndarray, clusters: Sequence[str]) -> Estimate:
    known = np.isfinite(values_NX)
    return clustered_mean(np.where(known, values_NX, 0), known, clusters)
