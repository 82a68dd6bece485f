"""What the gate study shows: means with their errors, one table, one figure, from the records of its results.json."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from conf.numbers import format_length
from evals.figures import save
from evals.probes import TASKS
from evals.statistics import clustered_mean, half_width, wilson

FULL = "full"
GATES = {
    "mean": ("mean", 0),
    "mean+first": ("mean", 1),
    "latest+first": ("local", 1),
    "oracle+first": ("oracle", 1),
    "random+first": ("random", 1),
}
"""Name -> (gate, first_blocks) of the MoBA layers."""


# -------------------- numbers


def mean_of(values: np.ndarray, clusters: Sequence[str]) -> dict[str, float | None]:
    """Mean and 95 % half-width (None for one cluster) as JSON values."""
    found = clustered_mean(values, np.ones(len(values)), clusters)
    width = half_width(found.se, found.freedom)
    return {"mean": float(found.mean), "interval_95": float(width) if np.isfinite(width) else None}


def loss_summary(found: dict[str, Any], full: dict[str, Any]) -> dict[str, Any]:
    """The trailing loss and its difference from full attention's, document by document."""
    gap = mean_of(found["values"] - full["values"], found["clusters"])
    trailing = mean_of(found["values"], found["clusters"])
    return {
        "num_documents": len(found["ids"]),
        "trailing": trailing,
        "minus_full": gap,
        "documents": dict(zip(found["ids"], found["values"].tolist())),
        "text": f"{trailing['mean']:.4f}, minus full {with_error(gap)}",
    }


def retrieval_summary(found: dict[str, Any], full: dict[str, Any]) -> dict[str, Any]:
    """For each task the share of right answers and the nats, overall and by depth, and the difference from full."""
    tasks: dict[str, Any] = {}
    for task in TASKS:
        of_task = np.array([name == task for name in found["tasks"]])
        right, nats = found["right"][of_task], found["nats"][of_task]
        clusters = [c for c, own in zip(found["clusters"], of_task) if own]
        depths = np.array(found["depths"])[of_task]
        tasks[task] = {
            "num_probes": len(right),
            "right": float(right.mean()),
            "right_wilson_95": wilson(float(right.mean()), len(right)),
            "right_minus_full": mean_of(right.astype(float) - full["right"][of_task], clusters),
            "nats": mean_of(nats, clusters),
            "nats_minus_full": mean_of(nats - full["nats"][of_task], clusters),
            "right_by_depth": {f"{d:.3f}": float(right[depths == d].mean()) for d in np.unique(depths)},
        }
    text = ", ".join(f"{name} {one['right']:.0%} ({one['nats']['mean']:.2f} nats)" for name, one in tasks.items())
    return {"tasks": tasks, "text": text}


def with_error(value: dict[str, float | None]) -> str:
    """+1.234 +- 0.056"""
    return f"{value['mean']:+.3f}" + ("" if value["interval_95"] is None else f" +- {value['interval_95']:.3f}")


# -------------------- what is shown


def rows(results: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any] | None]]:
    """(settings, loss record or None, retrieval record or None) of each gate, by length, size and budget."""
    names = ("length", "block_size", "top_k", "gate")
    found: dict[tuple, dict[str, Any]] = {}
    for record in results["records"]:
        found.setdefault(tuple(record.get(name, 0) for name in names), {})[record["part"]] = record
    order = [FULL, *GATES]
    for key in sorted(found, key=lambda key: (*key[:3], order.index(key[3]))):
        parts = found[key]
        yield next(iter(parts.values())), parts.get("loss"), parts.get("retrieval")


def table(results: dict[str, Any]) -> str:
    """One Markdown table, with what it was measured on and how."""
    heads = ["length", "MoBA", "budget", "gate", "trailing loss", "minus full", "of mean's gap"]
    heads += [f"{task}{what}" for task in TASKS for what in (" right", " nats")]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    gap_of_mean: dict[tuple, float] = {}
    for what, loss, retrieval in rows(results):
        is_full, sizes = what["gate"] == FULL, (what["length"], what.get("block_size"), what.get("top_k"))
        cells = [format_length(what["length"]), "" if is_full else f"{sizes[1]}x{sizes[2]}"]
        cells += ["1" if is_full else what["budget"], what["gate"]]
        if loss is None:
            cells += [""] * 3
        else:
            gap = loss["minus_full"]["mean"]
            if what["gate"] == "mean":
                gap_of_mean[sizes] = gap
            cells += [f"{loss['trailing']['mean']:.4f}", "" if is_full else with_error(loss["minus_full"])]
            cells += [f"{gap / gap_of_mean[sizes]:.0%}" if gap_of_mean.get(sizes, 0) > 0 else ""]
        for task in TASKS:
            one = None if retrieval is None else retrieval["tasks"][task]
            cells += ["", ""] if one is None else [f"{one['right']:.0%}", f"{one['nats']['mean']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    documents = max((record.get("num_documents", 0) for record in results["records"]), default=0)
    cut = "" if results["finished"] else " Not finished."
    about = (
        f"{results['model']} ({results['precision']}, native length {format_length(results['native_length'])}), not "
        f"trained for this; up to {documents} documents of {results['data']}. {results['machine']}, commit "
        f"{results['commit']}.{cut} {results['convention']}"
    )
    return "\n".join([*lines, "", about])


def draw(results: dict[str, Any], path: Path) -> None:
    """Loss above full attention's, and right answers, over the budget: a column a length and block size."""
    found = [row for row in rows(results) if row[0]["gate"] != FULL]
    columns = sorted({(what["length"], what["block_size"]) for what, _, _ in found})
    if not columns:
        return
    figure = Figure(figsize=(max(5, 3.2 * len(columns)), 9), layout="constrained")
    panels = figure.subplots(1 + len(TASKS), len(columns), squeeze=False, sharex=True, sharey="row")
    for column, (length, block_size) in enumerate(columns):
        here = [row for row in found if (row[0]["length"], row[0]["block_size"]) == (length, block_size)]
        for i, gate in enumerate(GATES):
            of_gate = [row for row in here if row[0]["gate"] == gate]
            draw_gate([axes[column] for axes in panels], of_gate, gate, f"C{i}")
        for task, axes in zip(TASKS, panels[1:, column]):
            for what, _, retrieval in rows(results):
                if what["gate"] == FULL and what["length"] == length and retrieval is not None:
                    axes.axhline(retrieval["tasks"][task]["right"], color="black", linestyle="--", label=FULL)
        panels[0, column].set_title(f"{format_length(length)}, blocks of {block_size}", fontsize="medium")
        panels[0, column].axhline(0, color="black", linestyle="--", linewidth=1)
        panels[-1, column].set_xlabel("budget")
    for axes, name in zip(panels[:, 0], ("trailing loss minus full (nats)", *(f"{task}: right" for task in TASKS))):
        axes.set_ylabel(name)
    for axes in panels.flat:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: str(Fraction(x).limit_denominator(64))))
        axes.grid(alpha=0.3)
    panels[0, 0].legend(fontsize="small")
    figure.supxlabel(
        f"{results['model']}, not trained with MoBA; bars: 95 % intervals, paired by document.\n"
        f"{results['machine']}\ncommit {results['commit'][:12]}",
        fontsize="x-small",
    )
    save(figure, path)


def draw_gate(panels: Sequence[Any], found: Sequence[tuple], gate: str, color: str) -> None:
    """One gate's lines in the panels of a column: the loss, then each task."""
    style = {"color": color, "marker": "o", "markersize": 4, "label": gate}
    points = [(float(Fraction(what["budget"])), loss["minus_full"]) for what, loss, _ in found if loss is not None]
    if points:
        x, gaps = zip(*sorted(points, key=lambda point: point[0]))
        errors = [gap["interval_95"] or 0 for gap in gaps]
        panels[0].errorbar(x, [gap["mean"] for gap in gaps], yerr=errors, capsize=2, **style)
    for task, axes in zip(TASKS, panels[1:]):
        points = sorted((float(Fraction(what["budget"])), r["tasks"][task]["right"]) for what, _, r in found if r)
        if points:
            axes.plot(*zip(*points), **style)
