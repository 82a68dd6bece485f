"""Draws a dashboard's panels from offline wandb files: python tests/draw_panels.py <run directory> <png>."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path
from textwrap import wrap

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from matplotlib import colormaps
from matplotlib.figure import Figure
from wandb_files import history

from conf.numbers import format_count
from evals.style import look, save
from train.record.series import PANELS

COLUMNS = 4


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
            style = {"color": colormaps["viridis"](number / len(names))} if many else look(number, len(names))
            style |= {"drawstyle": "steps-post"} if section == "schedule" else {}
            axes.plot(*zip(*points[name]), **style, label=name.partition("/")[2])
        shades = f" (dark: {names[0].partition('/')[2]}, bright: {names[-1].partition('/')[2]})" if many else ""
        axes.set_title("\n".join(wrap(f"{section}: {panel.title}{shades}", 48)), fontsize=8)
        axes.set_ylabel(panel.y, fontsize=7)
        axes.xaxis.set_major_formatter(lambda tokens, _: format_count(tokens))
        axes.set_yscale("log" if panel.log_y and min(v for n in names for _, v in points[n]) > 0 else "linear")
        axes.tick_params(which="both", labelsize=7)
        axes.grid(alpha=0.3)
        if len(names) > 1 and not many:
            axes.legend(fontsize=6)
    figure.supxlabel("training tokens", fontsize=9)
    save(figure, to)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
