"""Results of evals/ruler.py as numbers, text, JSON values and heat maps.

Shapes: A arms, T tasks, L lengths, N samples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from conf.numbers import format_length
from evals.answering import ABOUT_ARMS
from evals.page import image, note
from evals.page import table as html_table
from evals.protocol import Result
from evals.ruler_data import STAND_IN
from evals.statistics import wilson
from evals.style import save

THRESHOLD = 85.6
"""Percent: Llama-2-7B's score at 4K. A length is effective if the average of all tasks is above (RULER, section 4)."""
AVERAGE = "average"


@dataclass(frozen=True, eq=False)
class RulerReport:
    """The scores of one model."""

    tasks: list[str]
    all_tasks: list[str]
    """All tasks of the package."""
    arms: list[str]
    lengths: list[int]
    scores_ATLN: np.ndarray
    """float64, percent of each sample; 0 where there is none."""
    counts_TL: list[list[int]]
    """Samples; 0 where the task does not fit the length."""
    stand_in: list[str]
    """Tasks whose sentences were not split as NVIDIA's are."""
    title: str
    dense_up_to: int | None

    @classmethod
    def load(cls, path: Path) -> RulerReport:
        """The report whose .json and .npz launch/evaluate.py wrote; its tasks count as all of the package."""
        record = json.loads(path.read_text(encoding="utf-8"))
        arms = list(record["scores"])
        tasks = [name for name in record["scores"][arms[0]] if name != AVERAGE]
        with np.load(path.with_suffix(".npz")) as arrays:
            scores, counts = arrays["scores"], arrays["counts"].tolist()
        title = f"{record['run'] or record['checkpoint']}, {record['attention']}"
        stand_in = list(record["not_exact"])
        return cls(tasks, tasks, arms, record["lengths"], scores, counts, stand_in, title, record["dense_up_to"])

    @property
    def means_ATL(self) -> np.ndarray:
        """Percent; NaN where there is no sample."""
        counts_TL = np.array(self.counts_TL, dtype=np.float64)
        with np.errstate(invalid="ignore"):
            return self.scores_ATLN.sum(-1) / counts_TL

    @property
    def averages_AL(self) -> np.ndarray:
        """Plain means over the tasks; NaN where one is missing."""
        return self.means_ATL.mean(axis=1)

    def effective_length(self, arm: str) -> int | None:
        """The largest length whose average is over THRESHOLD, 0 without one; None unless all tasks were run."""
        averages_L = self.averages_AL[self.arms.index(arm)]
        if set(self.tasks) != set(self.all_tasks) or np.isnan(averages_L).all():
            return None
        return max((n for n, average in zip(self.lengths, averages_L) if average > THRESHOLD), default=0)

    def rows(self, arm: str) -> list[tuple[str, list[dict[str, Any] | None]]]:
        """(task or AVERAGE, a cell per length) as JSON values; None where the task does not fit. Intervals are 95 %
        Wilson intervals over samples (for the average: over all samples), conservative for scores between 0 and 100."""
        a = self.arms.index(arm)
        totals_L = np.array(self.counts_TL).sum(axis=0)
        tables = [*zip(self.tasks, self.means_ATL[a], self.counts_TL), (AVERAGE, self.averages_AL[a], totals_L)]
        return [(name, [_cell(mean, int(n)) for mean, n in zip(means, counts)]) for name, means, counts in tables]

    def summary(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "unit": "percent",
            "arms": ABOUT_ARMS,
            "lengths": self.lengths,
            "scores": {arm: dict(self.rows(arm)) for arm in self.arms},
            "effective_length": {arm: self.effective_length(arm) for arm in self.arms},
            "effective_threshold": THRESHOLD,
            "not_exact": dict.fromkeys(self.stand_in, STAND_IN),
        }

    def notes(self) -> list[str]:
        """Caveats."""
        return _notes(self.summary())

    def table(self) -> str:
        """The scores as text: a line per task, a column per length."""
        width = max(map(len, (*self.tasks, "niah_multikey_1"))) + 2
        lines = []
        for arm in self.arms:
            lines.append(f"{arm:<{width}}" + "".join(f"{format_length(length):>8}" for length in self.lengths))
            for name, cells in self.rows(arm):
                marked = name + "*" * (name in self.stand_in)
                lines.append(f"{marked:<{width}}" + "".join(f"{_text(cell):>8}" for cell in cells))
        return "\n".join([*lines, *self.notes()])

    def result(self, seed: int) -> Result:
        """The report as files and text."""
        averages = {
            f"{arm}_{format_length(length)}": float(value)
            for arm, averages_L in zip(self.arms, self.averages_AL)
            for length, value in zip(self.lengths, averages_L)
            if np.isfinite(value)
        }
        return Result(
            length=max(self.lengths),
            record=self.summary(),
            text=self.table(),
            numbers=averages,
            arrays={"scores": self.scores_ATLN, "counts": np.array(self.counts_TL)},
            figures={"": self.draw},
            seed=seed,
        )

    def draw(self, path: Path) -> None:
        """Draws a heat map of tasks over lengths, one panel per arm, the average at the foot."""
        names = [*(name + "*" * (name in self.stand_in) for name in self.tasks), AVERAGE]
        size = (1.8 + (0.8 + 0.75 * len(self.lengths)) * len(self.arms), 1.6 + 0.36 * len(names))
        figure = Figure(figsize=(max(5.0, size[0]), size[1]), layout="constrained")
        grid = figure.subplots(1, len(self.arms), squeeze=False, sharey=True)[0]
        mesh = None
        for a, (arm, axes) in enumerate(zip(self.arms, grid)):
            values_TL = np.vstack([self.means_ATL[a], self.averages_AL[a : a + 1]])
            mesh = axes.imshow(np.ma.masked_invalid(values_TL), cmap="cividis", vmin=0, vmax=100, aspect="auto")
            for (t, l), value in np.ndenumerate(values_TL):
                text = "-" if np.isnan(value) else f"{value:.1f}"
                axes.text(l, t, text, ha="center", va="center", color="white" if value <= 50 else "black", fontsize=8)
            axes.axhline(len(self.tasks) - 0.5, color="white", linewidth=2)
            axes.set_xticks(range(len(self.lengths)), [format_length(length) for length in self.lengths])
            axes.set_title(arm, fontsize="small")
        grid[0].set_yticks(range(len(names)), names)
        assert mesh is not None
        figure.colorbar(mesh, ax=list(grid), label=f"score (%; mean of {np.max(self.counts_TL)} samples)")
        dense = "" if self.dense_up_to is None else f"; no block is dropped up to {format_length(self.dense_up_to)}"
        star = "\n* not NVIDIA-exact: sentence splitting" if self.stand_in else ""
        figure.supxlabel(f"context length (tokens{dense}){star}", fontsize="small")
        figure.suptitle(f"RULER: {self.title}", fontsize="medium")
        save(figure, path)


def _cell(mean: float, number: int) -> dict[str, Any] | None:
    if np.isnan(mean):
        return None
    interval = [100 * bound for bound in wilson(float(mean) / 100, number)]
    return {"score": round(float(mean), 2), "interval_95": interval, "samples": number}


def _text(cell: Mapping[str, Any] | None) -> str:
    return "-" if cell is None else f"{cell['score']:.1f}"


def _notes(record: Mapping[str, Any]) -> list[str]:
    notes = []
    for arm, length in record["effective_length"].items():
        if length is not None:
            shortest = format_length(min(record["lengths"]))
            found = format_length(length) if length else f"none (below {shortest}, the shortest here)"
            notes.append(f"effective length, {arm}: {found} (largest with an average over {THRESHOLD} %)")
        else:
            notes.append(f"effective length, {arm}: not known, it needs all 13 tasks")
    if record["not_exact"]:
        notes.append(f"* {STAND_IN}, nor is an average that has them")
    if any(cell is None for scores in record["scores"].values() for cells in scores.values() for cell in cells):
        notes.append("-: the task does not fit the length with this tokenizer, so there is no average")
    return notes


def page(record: Mapping[str, Any], path: Path) -> str:
    """A table per arm, and the heat maps."""
    parts = []
    for arm, scores in record["scores"].items():
        rows = []
        for name, cells in scores.items():
            shown = []
            for cell in cells:
                bounds = "" if cell is None else " ({:.0f} to {:.0f})".format(*cell["interval_95"])
                shown.append(_text(cell) + bounds)
            rows.append((name + "*" * (name in record["not_exact"]), *shown))
        lengths = [f"{format_length(length)} (%)" for length in record["lengths"]]
        parts.append(html_table((f"{arm}: task", *lengths), rows))
    return "\n".join([*parts, *map(note, _notes(record)), image(path.with_suffix(".png"))])
