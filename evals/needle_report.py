"""Results of evals/needle.py as numbers, text, JSON values and heat maps.

Shapes: S scores, F forms, A arms, L lengths, D depths, N samples.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from conf.numbers import format_length
from evals.answering import ABOUT_ARMS, HYBRID
from evals.page import image, note
from evals.page import table as html_table
from evals.protocol import Result
from evals.recall_report import RecallReport
from evals.statistics import Estimate, clustered_mean, wilson
from evals.style import save
from evals.swap import DENSE, OWN

SCORES = ("exact", "ranked")
WORDS = {"exact": "exact match", "ranked": "ranked first of 10"}


@dataclass(frozen=True, eq=False)
class NeedleReport:
    """The answers of one model."""

    forms: list[str]
    arms: list[str]
    lengths: list[int]
    depths: list[float]
    right_SFALDN: np.ndarray
    """float64: 1 where right, else 0."""
    title: str
    dense_up_to: int | None
    """B * k of the attention in force."""

    @classmethod
    def load(cls, path: Path) -> NeedleReport:
        """The report whose .json and .npz launch/evaluate.py wrote."""
        record = json.loads(path.read_text(encoding="utf-8"))
        forms, arms = list(record["cells"]), list(next(iter(record["cells"].values())))
        cells = record["cells"][forms[0]][arms[0]]
        lengths, depths = (list(dict.fromkeys(cell[key] for cell in cells)) for key in ("length", "depth"))
        with np.load(path.with_suffix(".npz")) as arrays:
            right = arrays["right"]
        title = f"{record['run'] or record['checkpoint']}, {record['attention']}"
        return cls(forms, arms, lengths, depths, right, title, record["dense_up_to"])

    def share(self, score: int, form: int, arm: int, length: int | None) -> Estimate:
        """Share of right answers at a length, or at all; the depths of a sample, which share their text, are one
        cluster."""
        right_LDN = self.right_SFALDN[score, form, arm]
        chosen_LDN = right_LDN if length is None else right_LDN[length : length + 1]
        texts_XD = chosen_LDN.swapaxes(1, 2).reshape(-1, len(self.depths))
        counts_X = np.full(len(texts_XD), len(self.depths))
        return clustered_mean(texts_XD.sum(1), counts_X, [str(i) for i in range(len(texts_XD))])

    def rows(self) -> Iterator[tuple[str, str, int | None, dict[str, tuple[float, float, float]]]]:
        """(form, arm, length or None for all, score -> (share, low, high)); 95 % intervals."""
        for f, form in enumerate(self.forms):
            for a, arm in enumerate(self.arms):
                for place, length in ((None, None), *enumerate(self.lengths)):
                    found = {}
                    for s, score in enumerate(SCORES):
                        estimate = self.share(s, f, a, place)
                        found[score] = (float(estimate.mean), *RecallReport.interval(estimate))
                    yield form, arm, length, found

    def cells(self, form: int, arm: int) -> list[dict[str, Any]]:
        """One row per length and depth, as JSON values."""
        cells = []
        for l, length in enumerate(self.lengths):
            for d, depth in enumerate(self.depths):
                cell: dict[str, Any] = {"length": length, "depth": depth}
                for s, score in enumerate(SCORES):
                    right_N = self.right_SFALDN[s, form, arm, l, d]
                    share = float(right_N.mean())
                    interval = list(wilson(share, len(right_N)))
                    cell[score] = {"right": int(right_N.sum()), "share": share, "interval_95": interval}
                cells.append(cell)
        return cells

    def summary(self) -> dict[str, Any]:
        """Plain JSON values."""
        shares = [
            {"form": form, "arm": arm, "length": length}
            | {score: {"share": share, "interval_95": [low, high]} for score, (share, low, high) in found.items()}
            for form, arm, length, found in self.rows()
        ]
        return {
            "unit": "shares of right answers, from 0 to 1; depth in percent",
            "arms": ABOUT_ARMS,
            "scores": WORDS,
            "samples": self.right_SFALDN.shape[-1],
            "shares": shares,
            "cells": {
                form: {arm: self.cells(f, a) for a, arm in enumerate(self.arms)} for f, form in enumerate(self.forms)
            },
        }

    def table(self) -> str:
        """The shares in percent as text: a line per form, arm and length, and one for all of several lengths."""
        width = max(8, *(len(arm) + 2 for arm in self.arms))
        lines = [
            f"{'form':<11}{'arm':<{width}}{'length':>8}"
            + "".join(f"{f'{score} %':>12}{'95 %':>13}" for score in SCORES)
        ]
        for form, arm, length, found in self.rows():
            if length is None and len(self.lengths) == 1:
                continue  # the same numbers twice
            cells = [f"{100 * share:>12.1f}{_bounds(low, high):>13}" for share, low, high in found.values()]
            lines.append(
                f"{form:<11}{arm:<{width}}{'all' if length is None else format_length(length):>8}" + "".join(cells)
            )
        return "\n".join(lines)

    def result(self, seed: int) -> Result:
        """The report as files and text; one figure per form."""
        totals = [row for row in self.rows() if row[2] is None]
        return Result(
            length=max(self.lengths),
            record=self.summary(),
            text=self.table(),
            numbers={
                f"{form}_{arm}_{score}": share
                for form, arm, _, found in totals
                for score, (share, _, _) in found.items()
            },
            arrays={"right": self.right_SFALDN},
            figures={f"_{form}": partial(self.draw, f) for f, form in enumerate(self.forms)},
            seed=seed,
        )

    def draw(self, form: int, path: Path) -> None:
        """Draws the heat maps of a form: a row of panels per score, one panel per arm."""
        rows, columns = len(SCORES), len(self.arms)
        width, height = max(2.2, 1.2 + 0.66 * len(self.lengths)), max(2.2, 1.0 + 0.36 * len(self.depths))
        figure = Figure(figsize=(max(4.5, width * columns + 1), height * rows + 1), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        samples = self.right_SFALDN.shape[-1]
        mesh = None
        for s, score in enumerate(SCORES):
            for a, arm in enumerate(self.arms):
                axes = grid[s][a]
                share_DL = self.right_SFALDN[s, form, a].mean(-1).T
                mesh = axes.imshow(100 * share_DL, cmap="cividis", vmin=0, vmax=100, aspect="auto")
                for (d, l), share in np.ndenumerate(share_DL):
                    low, high = wilson(float(share), samples)
                    color = "black" if share > 0.5 else "white"
                    axes.text(l, d - 0.16, f"{100 * share:.0f}", ha="center", va="center", color=color, fontsize=8)
                    axes.text(l, d + 0.24, _bounds(low, high), ha="center", va="center", color=color, fontsize=5.5)
                about = f"{arm} (answer with {DENSE})" if arm == HYBRID else arm
                axes.set_title(f"{about}\n{WORDS[score]}", fontsize="small")
                self._mark_dense(axes, arm)
        grid[0][0].set_xticks(range(len(self.lengths)), [format_length(length) for length in self.lengths])
        grid[0][0].set_yticks(range(len(self.depths)), [f"{depth:g}" for depth in self.depths])
        assert mesh is not None
        figure.colorbar(mesh, ax=grid, label=f"right answers (% of {samples} samples; below: 95 % Wilson interval)")
        dense, own = "", [arm for arm in self.arms if arm in (OWN, HYBRID)]
        if self.dense_up_to is not None and own:
            dense = f"; under {' and '.join(own)} no block is dropped up to {format_length(self.dense_up_to)}"
        figure.supxlabel(f"context length (tokens{dense})", fontsize="small")
        figure.supylabel("depth of the needle (% of the text before it)", fontsize="small")
        figure.suptitle(f"Needle in a haystack, {self.forms[form]}: {self.title}", fontsize="medium")
        save(figure, path)

    def _mark_dense(self, axes, arm: str) -> None:
        """A dotted line after the lengths at which the attention in force equals full attention; other arms may have
        another such length."""
        if self.dense_up_to is None or arm not in (OWN, HYBRID):
            return
        dense = sum(length <= self.dense_up_to for length in self.lengths)
        if 0 < dense < len(self.lengths):
            axes.axvline(dense - 0.5, color="white", linestyle=":", linewidth=1.8)


def _bounds(low: float, high: float) -> str:
    return f"{100 * low:.0f} to {100 * high:.0f}"


def page(record: Mapping[str, Any], path: Path) -> str:
    """The shares over all lengths, and the heat maps."""
    rows = []
    for row in record["shares"]:
        length = "all" if row["length"] is None else format_length(row["length"])
        cells = []
        for score in SCORES:
            low, high = row[score]["interval_95"]
            cells.append(f"{100 * row[score]['share']:.1f} ({_bounds(low, high)})")
        rows.append((row["form"], row["arm"], length, *cells))
    figures = [image(path.with_name(f"{path.stem}_{form}.png")) for form in record["cells"]]
    about = f"{record['samples']} samples per length and depth; 95 % intervals, a text with all its depths as one draw."
    columns = ("form", "arm", "length", *(f"{WORDS[score]} (%)" for score in SCORES))
    return "\n".join([html_table(columns, rows), note(about), *figures])
