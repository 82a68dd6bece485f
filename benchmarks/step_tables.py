"""What benchmarks/step_profile.py makes of its measurements: results.json, a table and a figure of stacked bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.common import heading, row_table, write
from benchmarks.kernel_kinds import KINDS
from conf.numbers import format_length
from evals.style import color, save

COLORS = [color(i) for i in (0, 1, 2, 6, 4, 7)]
HATCHES = ("", "//", "", "..", "", "")
LONGEST = 6


def publish(record: Mapping, to: Path) -> str:
    """Writes results.json, table.md and figure.png; returns the table's text."""
    if any("milliseconds" in row for row in record["rows"]):
        draw(record, to / "figure.png")
    return write(record, table(record), to)


def table(record: Mapping) -> list[str]:
    """Markdown: where it was measured, a row per variant, and what took longest."""
    setting = record["setting"]
    lengths = {key: format_length(setting[key]) for key in ("seq_len", "batch_tokens")}
    about = (
        f"Sequences of {lengths['seq_len']}, {lengths['batch_tokens']} tokens per step, one document of "
        f"the full length per sequence. Medians over {setting['steps']} steps after {setting['warmup']}. "
        f"Milliseconds by kind are sums of kernels in {setting['profiled']} further steps (benchmarks/kernel_kinds.py "
        "says what belongs to a kind); idle: the share of the time in which no kernel ran, in other steps. start: from "
        "the start of the process to the first step; caches of compiled code are empty for the first run of a model. "
    )
    lines = heading({**record, "convention": about + record["convention"]})
    lines += row_table({key: row[key] for key in row if key != "longest"} for row in record["rows"])
    for kind in ("attention", "elementwise", "other"):
        lines += ["", f"Longest of {kind}, ms per step:", ""]
        for row in record["rows"]:
            kernels = row.get("longest", {}).get(kind, [])
            names = "; ".join(f"{name} {ms:.1f}" for name, ms in kernels[:LONGEST] if ms >= 0.1)
            lines += [f"- {row['variant']} ({row['attention']}): {names}"] if names else []
    return lines


def draw(record: Mapping, path: Path) -> None:
    """A bar per variant, of the milliseconds of each kind of kernel on top of each other, and a tick where the step
    ended. Options that all variants have stand in the title."""
    rows = [row for row in record["rows"] if "milliseconds" in row]
    options = [row["variant"].split("/")[2:] for row in rows]
    common = [option for option in options[0] if all(option in own for own in options)]
    figure = Figure(figsize=(11, 2 + 0.6 * len(rows)), layout="constrained")
    axes = figure.subplots()
    left = np.zeros(len(rows))
    for kind, colour, hatch in zip(KINDS, COLORS, HATCHES):
        widths = np.array([row["milliseconds"][kind] for row in rows])
        axes.barh(range(len(rows)), widths, left=left, color=colour, hatch=hatch, edgecolor="white", label=kind)
        left += widths
    ends = [max(row["step_milliseconds"], end) for row, end in zip(rows, left)]
    for place, (row, end) in enumerate(zip(rows, ends)):
        axes.plot([row["step_milliseconds"]] * 2, [place - 0.4, place + 0.4], color="black", linewidth=1.5)
        axes.annotate(f" {row['tokens_per_second']:,.0f} tokens/s", (end, place), va="center", fontsize="small")
    names = [", ".join(row["variant"].split("/")[:2]) for row in rows]
    axes.set_yticks(range(len(rows)), [_under(*both, common) for both in zip(names, options)])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(ends))
    axes.set_xlabel("milliseconds per step (black: the step as measured without a profiler)")
    figure.legend(loc="outside lower center", fontsize="small", ncols=len(KINDS))
    length = format_length(record["setting"]["seq_len"])
    about = f"{record['device']}, documents of {length}, commit {(record['commit'] or 'unknown')[:7]}"
    lines = ["Where a training step's time goes", about, *([", ".join(common)] if common else [])]
    figure.suptitle("\n".join(lines), fontsize="medium")
    save(figure, path)


def _under(name: str, options: Sequence[str], common: Sequence[str]) -> str:
    """The name, and below it the options that are not common to all."""
    own = ", ".join(option.rpartition("attention.")[2] for option in options if option not in common)
    return f"{name}\n{own}" if own else name
