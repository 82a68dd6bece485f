"""Style of figures: colours that colour-blind readers can distinguish, each with its own marker and line style, so that
nothing depends on colour alone; and files in which no title is cut off.

pyplot's global state is never used, so that figures can be drawn in a training process, on any thread, without a
display.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F")
"""Okabe and Ito's, without yellow, which is faint on white, and a grey."""
MARKERS = "osD^vPX*"
LINES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
LOSS = "loss (nats per token)"
POSITION = "context position (tokens)"
LONGEST_INSIDE = 40  # characters of a label
SHORTEST = 24  # shorter texts are not wrapped


def color(i: int) -> str:
    """The colour of a figure's i-th series."""
    return PALETTE[i % len(PALETTE)]


def marker(i: int) -> str:
    """The marker of a figure's i-th series."""
    return MARKERS[i % len(MARKERS)]


def look(i: int, number: int = 1) -> dict[str, Any]:
    """Arguments of plot() for the i-th of `number` lines. Lower lines are wider than those above, which are dashed, so
    that a covered line stays visible."""
    width = 1.3 + 0.7 * max(0, min(number, 5) - 1 - i)
    style = {"color": color(i), "marker": marker(i), "markersize": 3.5, "linewidth": width}
    return style | {"linestyle": LINES[i % len(LINES)]}


def add_legend(axes: Axes) -> None:
    """A legend, if anything has a label: inside the panel, or beside it where names are too long."""
    labels = axes.get_legend_handles_labels()[1]
    if labels and max(map(len, labels)) <= LONGEST_INSIDE:
        axes.legend(fontsize="small")
    elif labels:
        short = [textwrap.fill(label, LONGEST_INSIDE) for label in labels]
        axes.legend(
            axes.get_legend_handles_labels()[0], short, fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1)
        )


def save(figure: Figure, path: Path | str) -> None:
    """Writes the figure as PNG; creates the directory. Titles wider than the figure are wrapped."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    for _ in range(3):  # a title in two lines changes the layout of all
        if not _break_texts(figure):
            break
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _break_texts(figure: Figure) -> bool:
    """Wraps texts that cross the figure's left or right edge; True if there were any."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    found = False
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        said = text.get_text()
        if not text.get_visible() or text.get_rotation() or len(said) < SHORTEST:
            continue
        extent, room = text.get_window_extent(renderer), figure.bbox.width
        if extent.x0 >= 0 and extent.x1 <= room:
            continue
        # As wide as it can be around its place.
        middle = (extent.x0 + extent.x1) / 2
        share = min(0.98, 1.96 * min(middle, room - middle) / extent.width)
        longest = max(map(len, said.split("\n")))
        width = max(SHORTEST // 2, int(share * longest))
        broken = "\n".join(textwrap.fill(line, width) for line in said.split("\n"))
        found |= broken != said
        text.set_text(broken)
    return found
