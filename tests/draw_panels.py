"""Draws a dashboard's panels from offline wandb files: python tests/draw_panels.py <run directory> <png>."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from matplotlib import colormaps
from matplotlib.figure import Figure
from wandb_files import history

from train.record.series import PANELS

COLUMNS = 6


def draw(run_dir: Path, to: Path) -> None:
    """One picture of every panel that the run has series for, in the order of the sections."""
    points = defaultdict(list)
    for row in history(run_dir):
        for name, value in row.items():
            if isinstance(value, (int, float)):
                points[name].append((row["tokens"], value))
    shown = []
    for section, panels in PANELS.items():
        for panel in panels:
            names = [n for n in sorted(points) if n in panel.series or (panel.regex and re.search(panel.regex, n))]
            if names:
                shown.append((section, panel, names))
    rows = -(-len(shown) // COLUMNS)
    figure = Figure(figsize=(3.4 * COLUMNS, 2.4 * rows), layout="constrained")
    for place, (section, panel, names) in enumerate(shown):
        axes = figure.add_subplot(rows, COLUMNS, place + 1)
        many = len(names) > 6
        for number, name in enumerate(names):
            color = colormaps["viridis"](number / len(names)) if many else f"C{number}"
            step = {"drawstyle": "steps-post"} if section == "schedule" else {}
            label = name.partition("/")[2]
            axes.plot(*zip(*points[name]), marker=".", markersize=3, linewidth=1, color=color, label=label, **step)
        axes.set_title(f"{section}: {panel.title}", fontsize=7)
        axes.set_ylabel(panel.y, fontsize=6)
        axes.set_yscale("log" if panel.log_y and min(v for n in names for _, v in points[n]) > 0 else "linear")
        axes.tick_params(which="both", labelsize=6)
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend(fontsize=4 if many else 5, ncols=2 if many else 1)
    figure.supxlabel("tokens", fontsize=8)
    figure.savefig(to, dpi=100)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
