"""Results of evals/recall.py as numbers, text, JSON values and a figure.

Shapes: N documents, A answers of a document (padded with NaN), W variants of attention; L MoBA layers, H query heads.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from data.synthetic import SyntheticSource
from evals.position_loss import plain
from evals.routing_numbers import model_hit_rate
from evals.statistics import Estimate, clustered_mean, wilson
from evals.style import color, marker, save
from evals.swap import VARIANTS
from moba.kinds import AttentionSpec, Routing

MIN_BLOCKS = 32
MAX_SEEN = 1 / 8
EVIDENCE = ("hit", "snr", "candidates")


@dataclass(frozen=True, eq=False)
class Gates:
    """What the gates do with the block of an answer's evidence, at the query that has to find it; of far answers only
    does it mean something."""

    specs: list[AttentionSpec]
    """[L]"""
    layers: list[int]
    """[L] index of each MoBA layer in the model."""
    hit_LHNA: np.ndarray
    """1 where the block was picked, else 0."""
    snr_LHNA: np.ndarray
    """Score of the block over the mean of the others, in sqrt(2) standard deviations of theirs."""
    candidates_LHNA: np.ndarray
    """Number of blocks that compete."""

    def rows(self, far_NA: np.ndarray) -> list[dict[str, Any]]:
        """One row per layer and head, as JSON values: means over the far answers, and the hit rate that FlashMoBA's
        model expects from the mean ratio alone."""
        rows = []
        for place, (layer, spec) in enumerate(zip(self.layers, self.specs)):
            assert spec.routing is not None
            picks = spec.routing.top_k - 1 - spec.routing.first_blocks
            for head in range(self.hit_LHNA.shape[1]):
                values = (getattr(self, f"{name}_LHNA")[place, head] for name in EVIDENCE)
                hit, snr, candidates = (mean_of_answers(value_NA, far_NA) for value_NA in values)
                known = hit.count > 0 and np.isfinite(snr.mean)
                model = float(model_hit_rate(float(snr.mean), float(candidates.mean), picks)) if known else None
                rows.append(
                    {
                        "layer": layer,
                        "head": head,
                        "hit": plain([hit.mean])[0],
                        "hit_interval_95": plain(RecallReport.interval(hit)),
                        "snr": plain([snr.mean])[0],
                        "snr_se": plain([snr.se])[0],
                        "candidates": plain([candidates.mean])[0],
                        "picks": picks,
                        "model_hit": model,
                    }
                )
        return rows


def mean_of_answers(values_NA: np.ndarray, chosen_NA: np.ndarray) -> Estimate:
    """Mean of the chosen answers that have a value, documents as clusters."""
    known_NA = chosen_NA & np.isfinite(values_NA)
    sums_N = np.where(known_NA, values_NA, 0).sum(1)
    return clustered_mean(sums_N, known_NA.sum(1), list(range(len(sums_N))))


@dataclass(frozen=True, eq=False)
class RecallReport:
    """The answers of one model in one task."""

    source: SyntheticSource
    variants: tuple[str, ...]
    correct_WNA: np.ndarray
    """[W, N, A] 1 where the whole answer is right, else 0."""
    nll_WNA: np.ndarray
    """[W, N, A] mean loss of the answer, nats per token."""
    distance_NA: np.ndarray
    """[N, A] tokens between an answer and its evidence."""
    blocks_back_NA: np.ndarray | None
    """[N, A] blocks between them; None if no layer is MoBA."""
    routing: Routing | None
    """The first MoBA layer's."""
    is_first_NA: np.ndarray | None = None
    """bool [N, A] evidence in the document's first_blocks, which every query attends to; None: nowhere."""
    gates: Gates | None = None
    """None if no layer is MoBA."""

    @property
    def gate_matters(self) -> bool | None:
        """Whether the setting tests the gate: at least MIN_BLOCKS blocks, of which at most a share of MAX_SEEN is
        attended; None without MoBA."""
        if self.routing is None:
            return None
        num_blocks = self.source.config.length // self.routing.block_size
        return num_blocks >= MIN_BLOCKS and self.routing.top_k <= MAX_SEEN * num_blocks

    @property
    def far_NA(self) -> np.ndarray:
        """bool [N, A]: answers that only the gate can reach; all without MoBA."""
        known = np.isfinite(self.distance_NA)
        if self.blocks_back_NA is None or self.routing is None:
            return known
        far_NA = known & (self.blocks_back_NA >= self.routing.top_k)
        return far_NA if self.is_first_NA is None else far_NA & ~self.is_first_NA

    @property
    def _far(self) -> str:
        assert self.routing is not None
        first = self.routing.first_blocks
        behind = f", behind the first {first}" if first else ""
        return f"evidence at least {self.routing.top_k} blocks back{behind}"

    def accuracy(self, name: str, chosen_NA: np.ndarray | None = None) -> Estimate:
        """Share of right answers of a variant, documents as clusters; of the `chosen` ones."""
        return self._mean(self.correct_WNA[self.variants.index(name)], chosen_NA)

    def _mean(self, values_NA: np.ndarray, chosen_NA: np.ndarray | None) -> Estimate:
        return mean_of_answers(values_NA, np.isfinite(values_NA) if chosen_NA is None else chosen_NA)

    def rows(self) -> list[dict[str, Any]]:
        """One row per variant, as JSON values."""
        rows = []
        for w, name in enumerate(self.variants):
            row: dict[str, Any] = {"attention": name}
            for what, chosen in (("all", np.isfinite(self.distance_NA)), ("far", self.far_NA)):
                found = self.accuracy(name, chosen)
                row[what] = {
                    "accuracy": plain([found.mean])[0],
                    "se": plain([found.se])[0],
                    "interval_95": plain(self.interval(found)),
                    "nll": plain([self._mean(self.nll_WNA[w], chosen).mean])[0],
                    "answers": int(found.count),
                }
            rows.append(row)
        return rows

    @staticmethod
    def interval(found: Estimate) -> tuple[float, float]:
        """The 95 % interval of an accuracy: Wilson's, with the effective number of independent answers from its
        clustered error (the number of documents, where all are right or all wrong)."""
        if not found.count:
            return 0.0, 1.0
        share, se = float(found.mean), float(found.se)
        worth = share * (1 - share) / se**2 if se > 0 else float(found.clusters)
        return wilson(share, min(worth, float(found.count)))

    def summary(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "task": asdict(self.source.config),
            "num_documents": len(self.distance_NA),
            "far": None if self.routing is None else self._far,
            "gate_matters": self.gate_matters,
            "variants": self.rows(),
            "evidence": None if self.gates is None else self.gates.rows(self.far_NA),
        }


def table(reports: Mapping[str, RecallReport]) -> str:
    """The accuracies as text: one line per task and variant."""
    lines = [f"{'task':<12}{'attention':<10}{'right':>7}  {'95 %':>15}{'far':>8}  {'95 %':>15}{'nll':>9}"]
    for task, report in reports.items():
        for row in report.rows():
            cells = []
            for what in ("all", "far"):
                value, (low, high) = row[what]["accuracy"], row[what]["interval_95"]
                known = value is not None
                cells += [f"{value:>7.3f}", f"{low:.3f} to {high:.3f}"] if known else [" " * 7, ""]
            right, bounds, far, far_bounds = cells
            nll = row["all"]["nll"]
            name = f"{task:<12}{row['attention']:<10}"
            lines.append(f"{name}{right}  {bounds:>15} {far}  {far_bounds:>15}{nll:>9.3f}")
        if report.gate_matters is False:
            lines.append(
                f"{task}: too few blocks to say something about the gate (at least {MIN_BLOCKS}, of which top_k is at "
                f"most {MAX_SEEN:.0%})"
            )
    return "\n".join(lines)


def draw_recall(reports: Mapping[str, RecallReport], path: Path) -> None:
    """Draws, for each task, the accuracy of every variant with its 95 % interval, and over the distance."""
    figure = Figure(figsize=(max(5.0, 3.2 * len(reports)), 6.5), layout="constrained")
    for column, (task, report) in enumerate(reports.items()):
        bars, lines = figure.add_subplot(2, len(reports), column + 1), None
        for w, name in enumerate(report.variants):
            found = report.accuracy(name, report.far_NA)
            low, high = report.interval(found)
            height = float(np.nan_to_num(found.mean))
            error = np.nan_to_num([[height - low], [high - height]]).clip(min=0)
            bars.bar(w, height, yerr=error, color=color(_place(name)), ecolor="0.35", capsize=3)
        bars.set_xticks(range(len(report.variants)), report.variants, fontsize="x-small")
        note = "" if report.gate_matters is not False else "\n(too few blocks to judge the gate)"
        far = "all answers" if report.routing is None else f"evidence {report.routing.top_k}+ blocks back"
        bars.set_title(f"{task}: {far}{note}", fontsize="small")
        lines = figure.add_subplot(2, len(reports), len(reports) + column + 1)
        _over_distance(report, lines)
        for axes in (bars, lines):
            axes.set_ylim(0, 1.02)
            axes.grid(alpha=0.3)
    figure.supylabel("share of right answers", fontsize="small")
    save(figure, path)


def _over_distance(report: RecallReport, axes) -> None:
    edges = np.unique(np.nanquantile(report.distance_NA, np.linspace(0, 1, 7)))
    for name in report.variants:
        points = []
        for low, high in itertools.pairwise(edges):
            inside = (report.distance_NA >= low) & (report.distance_NA <= high)
            points.append(((low + high) / 2, report.accuracy(name, inside).mean))
        if points:
            axes.plot(*zip(*points), color=color(_place(name)), marker=marker(_place(name)), markersize=3, label=name)
    if len(edges) > 1:
        axes.legend(fontsize="x-small")
    axes.set_xlabel("tokens back to the evidence", fontsize="small")


def _place(name: str) -> int:
    return VARIANTS.index(name)
