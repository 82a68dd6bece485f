"""Two evaluations compared document by document: the difference by position, its error, and what more documents buy.

Documents differ far more from each other than two models do on one of them, so paired differences resolve gaps that the
two curves cannot. The error does not cover the training seed, which may move a model by more.

Shapes: N shared documents, B buckets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from evals.bands import no_band, simultaneous_factor
from evals.position_loss import Evaluation, plain
from evals.statistics import Estimate, clustered_mean, clusters_needed, half_width


@dataclass(frozen=True, eq=False)
class Difference:
    """A loss minus a reference's, by position."""

    edges: np.ndarray
    """int64 [B + 1], as of PositionCurve."""
    by_bucket: Estimate
    """[B] mean difference in nats per token, its error, and the documents and clusters it rests on."""
    factor: float
    """Half-width of the simultaneous band in standard errors; NaN without a band."""
    no_band: str | None
    """Why there is none."""
    num_documents: int
    """Shared documents; 0 where the two were not evaluated on the same ones, and their errors had to be added."""

    @property
    def paired(self) -> bool:
        """True if the same documents were compared."""
        return self.num_documents > 0

    @property
    def sd(self) -> np.ndarray:
        """[B] standard deviation of the clusters' differences."""
        return self.by_bucket.se * np.sqrt(self.by_bucket.clusters)

    def interval(self) -> np.ndarray:
        """[B] half-width of each bucket's own 95 % interval; NaN where none has nominal coverage."""
        return half_width(self.by_bucket.se, self.by_bucket.freedom)

    def band(self) -> np.ndarray:
        """[B] half-width of the simultaneous 95 % band; NaN where there is none."""
        return self.by_bucket.se * self.factor

    def summary(self, gap: float | None = None) -> dict[str, Any]:
        """Plain JSON values; with `gap` also the clusters needed to see a difference of that size in each bucket."""
        found = {
            "unit": "nats per token, run minus reference",
            "paired": self.paired,
            "num_documents": self.num_documents,
            "edges": self.edges.tolist(),
            "difference": plain(self.by_bucket.mean),
            "se": plain(self.by_bucket.se),
            "interval_95": plain(self.interval()),
            "band_95": plain(self.band()),
            "no_band": self.no_band,
            "sd_of_clusters": plain(self.sd),
            "clusters": plain(self.by_bucket.clusters),
            "freedom": plain(self.by_bucket.freedom),
        }
        if gap is not None:
            for name, power in (("needed_for_interval", 0.5), ("needed_for_80_percent_power", 0.8)):
                found[name] = [clusters_needed(sd, gap, power) if np.isfinite(sd) else None for sd in self.sd.tolist()]
            found["gap"] = gap
        return found


def difference(run: Evaluation, reference: Evaluation) -> Difference:
    """`run` minus `reference`; ValueError if their lengths, buckets or cohorts differ, or they share one document only.

    Documents are the same if their evaluated tokens are. With no shared document at all the curves are subtracted and
    their errors added, which is far less sharp; `paired` says so.
    """
    if not np.array_equal(run.curve.edges, reference.curve.edges) or run.cohort != reference.cohort:
        sides = [f"{len(e.curve.edges) - 1} buckets up to {e.curve.max_length}, {e.cohort}" for e in (run, reference)]
        raise ValueError(f"the evaluations do not fit together: {sides[0]} against {sides[1]}; evaluate both alike")
    rows = {key: i for i, key in enumerate(reference.document_keys)}
    shared = [(i, rows[key]) for i, key in enumerate(run.document_keys) if key in rows]
    if len(shared) == 1:
        raise ValueError("the evaluations share one document only; a difference needs two or more")
    if not shared:
        a, b = run.curve, reference.curve
        freedom, clusters = np.minimum(a.interval_freedom, b.interval_freedom), np.minimum(a.clusters, b.clusters)
        se = np.hypot(a.se, b.se)
        both = Estimate(a.mean - b.mean, se, a.count + b.count, clusters, freedom, np.full(len(se), np.nan))
        return Difference(a.edges, both, math.nan, "the documents differ", 0)
    ours, theirs = (list(side) for side in zip(*shared))
    gap_NB = run.document_loss[ours] - reference.document_loss[theirs]
    known_NB = np.isfinite(gap_NB)
    clusters = [run.document_clusters[i] for i in ours]
    sums_NB = np.where(known_NB, gap_NB, 0)
    found = clustered_mean(sums_NB, known_NB, clusters)
    has_any = found.clusters > 0
    why = no_band(found.clusters[has_any], found.largest_share[has_any])
    factor = math.nan if why else simultaneous_factor(sums_NB, known_NB, clusters, found)
    return Difference(run.curve.edges, found, factor, why, len(shared))
