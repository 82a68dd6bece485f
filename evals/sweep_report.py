"""Results of evals/sweep.py as numbers, text, JSON values and a figure.

Shapes: S settings, full attention first; N documents; B buckets; L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

from conf.numbers import format_length
from evals.page import image
from evals.page import table as html_table
from evals.protocol import Result
from evals.recall_report import RecallReport
from evals.statistics import clustered_mean, half_width
from evals.style import LINES, MARKERS, color, save
from evals.swap import DENSE, document_mean, with_error
from moba.kinds.moba import MEAN


class Setting(NamedTuple):
    """A size of MoBA, in the order of its key in the ledger; with block size 0 another attention, whose name is in
    `gate`."""

    block_size: int
    top_k: int
    gate: str
    first_blocks: int

    def __str__(self) -> str:
        if self == FULL or not self.block_size:
            return self.gate or DENSE
        return f"{format_length(self.block_size)}x{self.top_k}{self.kind}"

    @property
    def kind(self) -> str:
        """Its options besides its sizes."""
        first = f"+{self.first_blocks}" if self.first_blocks else ""
        return first + (f" {self.gate}" if self.gate != MEAN else "")


FULL = Setting(0, 0, "", 0)
TICKS = [mantissa * 10.0**power for power in range(-5, 0) for mantissa in (1, 2, 3, 5, 7)] + [1.0]
DODGE = 1.012
"""Factor between the abscissas of lines of one block size."""


@dataclass(frozen=True, eq=False)
class SweepReport:
    """Losses and right answers of one set of weights under each setting."""

    settings: list[Setting]
    attended_S: np.ndarray
    """[S] attended share of the causal pairs of a full-length document, over all layers."""
    losses_SNB: np.ndarray
    """[S, N, B] mean loss of each document in each bucket, nats per token."""
    captured_SNL: np.ndarray | None
    """[S, N, L] share of full attention's probability that the selected blocks of each layer hold, if it was asked
    for."""
    clusters: list[str]
    right_SN: Mapping[str, np.ndarray]
    """By recall task, or kind of probe: [S, N, 3] right answers, answers, and summed nats of its documents."""
    probes: Sequence[str]
    """The keys of right_SN that are probes in the documents of the losses."""
    seq_len: int
    title: str

    def rows(self) -> list[dict[str, Any]]:
        """One row per setting, as JSON values."""
        rows = []
        for s, setting in enumerate(self.settings):
            row: dict[str, Any] = {"attention": str(setting)}
            if setting != FULL:
                row |= setting._asdict()
            row["attended_share"] = float(self.attended_S[s])
            mean_SN, trailing_SN = np.nanmean(self.losses_SNB, axis=2), self.losses_SNB[:, :, -1]
            for what, values_SN in (("loss", mean_SN), ("trailing", trailing_SN)):
                row[what] = document_mean(values_SN[s], self.clusters)
                row[f"{what}_minus_full"] = document_mean(values_SN[s] - values_SN[0], self.clusters)
            if self.captured_SNL is not None:
                row["captured"] = document_mean(self.captured_SNL[s].mean(1), self.clusters)
                row["captured_by_layer"] = self.captured_SNL[s].mean(0).tolist()
            row["recall"] = {task: self._right(task, found_SN3[s]) for task, found_SN3 in self.right_SN.items()}
            rows.append(row)
        return rows

    def _right(self, task: str, found_N3: np.ndarray) -> dict[str, Any]:
        """The share of right answers and their loss, and the differences from full attention on the same documents."""
        full_N3 = self.right_SN[task][0]
        right_N, count_N, nats_N = found_N3.T
        clusters = self.clusters if task in self.probes else [str(i) for i in range(len(found_N3))]
        share = clustered_mean(right_N, count_N, clusters)
        gap = clustered_mean(right_N - full_N3[:, 0], count_N, clusters)
        width = float(half_width(gap.se, gap.freedom))
        asked_N = np.where(count_N > 0, count_N, np.nan)
        return {
            "right": float(share.mean),
            "interval_95": list(RecallReport.interval(share)),
            "minus_full": {"mean": float(gap.mean), "interval_95": width if np.isfinite(width) else None},
            "nats": document_mean(nats_N / asked_N, clusters),
            "nats_minus_full": document_mean((nats_N - full_N3[:, 2]) / asked_N, clusters),
        }

    def table(self) -> str:
        """A line per setting."""
        tasks = list(self.right_SN)
        lines = [
            f"{'attention':<20}{'attended':>9}{'loss':>9}{'minus full':>20}{'trailing':>10}{'minus full':>20}"
            + ("" if self.captured_SNL is None else f"{'captured':>10}")
            + "".join(f"{task:>12}{'minus full':>20}" for task in tasks)
        ]
        for row in self.rows():
            cells = f"{row['attention']:<20}{row['attended_share']:>9.1%}{row['loss']['mean']:>9.4f}"
            cells += f"{with_error(row['loss_minus_full']):>20}{row['trailing']['mean']:>10.4f}"
            cells += f"{with_error(row['trailing_minus_full']):>20}"
            cells += f"{row['captured']['mean']:>10.3f}" if "captured" in row else ""
            for task in tasks:
                found = row["recall"][task]
                cells += f"{found['right']:>12.3f}{with_error(found['minus_full']):>20}"
            lines.append(cells)
        return "\n".join(lines)

    def summary(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "unit": "nats per token; differences from full attention document by document; shares from 0 to 1",
            "seq_len": self.seq_len,
            "num_documents": len(self.clusters),
            "num_clusters": len(set(self.clusters)),
            "settings": self.rows(),
        }

    def result(self) -> Result:
        """The report as files and text."""
        rows = self.rows()
        return Result(
            length=self.seq_len,
            record=self.summary(),
            text=self.table(),
            numbers={f"trailing_minus_full_{row['attention']}": row["trailing_minus_full"]["mean"] for row in rows[1:]},
            arrays={
                "document_loss": self.losses_SNB,
                "document_clusters": np.array(self.clusters),
                **({} if self.captured_SNL is None else {"captured": self.captured_SNL}),
                **{f"right_{task}": x for task, x in self.right_SN.items()},
            },
            figures={"": self.draw},
        )

    def draw(self, path: Path) -> None:
        """Draws the gap of the trailing loss, and right answers, over the attended share: a colour per block size, a
        line style per gate."""
        rows, tasks = self.rows(), list(self.right_SN)
        figure = Figure(figsize=(7 * (1 + len(tasks)) + 2, 5), layout="constrained")
        grid = figure.subplots(1, 1 + len(tasks), squeeze=False)[0]
        for axes, task in zip(grid, [None, *tasks]):
            for label, shift, style, own in self._lines():
                means, below, above = np.array([self._value(rows[s], task) for s in own]).T
                shares = self.attended_S[own] * shift
                bars = np.nan_to_num([below, above])
                axes.errorbar(shares, means, yerr=bars, label=label, capsize=2, **{"markersize": 4} | style)
                for s, share, mean in zip(own, shares, means):
                    if not self.settings[s].block_size:
                        continue
                    axes.annotate(
                        str(self.settings[s].top_k),
                        (share, mean),
                        xytext=(3, 4),
                        textcoords="offset points",
                        fontsize=7,
                        color=style["color"],
                    )
            axes.axhline(self._value(rows[0], task)[0], color="0.3", linewidth=1, linestyle=":", label="full attention")
            axes.set_xscale("log")
            known = sorted({round(float(share), 3) for share in self.attended_S[1:]})
            inside = [tick for tick in TICKS if known and known[0] <= tick <= known[-1]]
            axes.xaxis.set_major_locator(FixedLocator(TICKS if len(inside) > 1 else known))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xlabel("attended share of the causal pairs (numbers: top_k)")
            axes.set_ylabel("trailing loss minus full (nats per token)" if task is None else "right answers")
            axes.set_title("Trailing loss" if task is None else f"Retrieval: {task}", fontsize="medium")
            axes.grid(alpha=0.3)
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
        figure.suptitle(f"What k is worth: {self.title}, {format_length(self.seq_len)} tokens", fontsize="medium")
        figure.supxlabel("Bars: 95 %, documents as clusters; losses paired with full attention's", fontsize="x-small")
        save(figure, path)

    def _lines(self) -> list[tuple[str, float, dict[str, Any], list[int]]]:
        """(label, factor on the abscissa, style, settings by attended share) of each line."""
        sizes = sorted({setting.block_size for setting in self.settings[1:] if setting.block_size})
        kinds = list(dict.fromkeys(setting.kind for setting in self.settings[1:] if setting.block_size))
        lines = []
        for i, size in enumerate(sizes):
            for j, kind in enumerate(kinds):
                own = [s for s, one in enumerate(self.settings) if (one.block_size, one.kind) == (size, kind)]
                if own:
                    own.sort(key=lambda s: self.attended_S[s])
                    style = {"color": color(i), "linestyle": LINES[j % 5], "marker": MARKERS[j % 8]}
                    label = f"blocks of {format_length(size)}{',' if kind else ''}{_in_words(kind)}"
                    lines.append((label, DODGE ** (j - (len(kinds) - 1) / 2), style, own))
        for s, setting in enumerate(self.settings[1:], 1):
            if not setting.block_size:
                style = {"color": f"C{len(lines) % 10}", "linestyle": "none", "marker": "*", "markersize": 9}
                lines.append((str(setting), 1.0, style, [s]))
        return lines

    @staticmethod
    def _value(row: Mapping[str, Any], task: str | None) -> tuple[float, float, float]:
        """A setting's value, and the lower and upper lengths of its error bar; NaN without one."""
        if task is not None:
            found = row["recall"][task]
            low, high = found["interval_95"]
            return found["right"], max(0.0, found["right"] - low), max(0.0, high - found["right"])
        found = row["trailing_minus_full"]
        width = np.nan if found["interval_95"] is None else found["interval_95"]
        return found["mean"], width, width


def _in_words(kind: str) -> str:
    first, _, gate = kind.partition(" ")
    words = [f"{first[1:]} first seen" if first else "", f"{gate} gate" if gate else ""]
    return (" " + ", ".join(filter(None, words))) if kind else ""


def page(record: Mapping[str, Any], path: Path) -> str:
    """The table and the figure."""
    tasks: Sequence[str] = list(record["settings"][0]["recall"])
    has_captured = "captured" in record["settings"][0]
    rows = []
    for row in record["settings"]:
        cells = [row["attention"], f"{row['attended_share']:.1%}"]
        for what in ("loss", "trailing"):
            cells += [f"{row[what]['mean']:.4f}", with_error(row[f"{what}_minus_full"])]
        cells += [f"{row['captured']['mean']:.3f}"] if has_captured else []
        for task in tasks:
            found = row["recall"][task]
            cells += [f"{found['right']:.3f}", with_error(found["minus_full"])]
        rows.append(cells)
    columns = ["attention", "attended", "loss", "minus full", "trailing", "minus full"]
    columns += ["captured"] if has_captured else []
    columns += [text for task in tasks for text in (f"{task}: right", "minus full")]
    return html_table(columns, rows) + image(path.with_suffix(".png"))
