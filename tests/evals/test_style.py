"""evals/style.py: colours that stay apart for colour-blind readers, and titles that stay inside their figures."""

import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from evals.figures import mark_stages
from evals.style import LINES, MARKERS, PALETTE, add_legend, look, save

# Linear RGB as somebody without one kind of cone sees it: Vienot, Brettel and Mollon 1999 (protan, deutan).
BLIND = {
    "protanopia": [[0.10889, 0.89111, 0.0], [0.10889, 0.89111, 0.0], [0.00447, -0.00447, 1.0]],
    "deuteranopia": [[0.29031, 0.70969, 0.0], [0.29031, 0.70969, 0.0], [-0.02197, 0.02197, 1.0]],
}


def lab(colour, kind):
    """CIE L*a*b* (D65) of a colour as somebody with this colour blindness sees it."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(BLIND[kind]) @ linear, 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = np.cbrt(np.array(to_xyz) @ seen / [0.9505, 1.0, 1.089] + 1e-9)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("kind", BLIND)
def test_the_first_colours_can_be_parted(kind):
    """Catches matplotlib's own colours, of which red and green, and purple and blue, become one: 15 units of L*a*b* are
    plainly different, 2 just so."""

    def nearest(colours):
        return min(np.linalg.norm(lab(a, kind) - lab(b, kind)) for a, b in itertools.combinations(colours, 2))

    assert nearest(PALETTE[:5]) > 18 > 15 > nearest(["#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd"])


def test_lines_differ_by_more_than_colour_and_the_lower_ones_are_wider():
    """Catches two lines of one marker and kind, and a line that vanishes where the next one covers it."""
    looks = [look(i, 4) for i in range(4)]
    assert len({(one["marker"], one["linestyle"], one["color"]) for one in looks}) == 4
    assert len(set(MARKERS)) == len(MARKERS) and len(set(map(str, LINES))) == len(LINES)
    assert all(a["linewidth"] > b["linewidth"] for a, b in itertools.pairwise(looks))


def test_titles_stay_inside_the_figure(tmp_path):
    """Catches a title or caption that is cut off at the edge of its file."""
    figure = Figure(figsize=(4, 3), layout="constrained")
    axes = figure.subplots(1, 2)
    words = "a run of a name that is as long as users make them, and what was measured"
    texts = [figure.suptitle(words), figure.supxlabel(words), axes[1].set_title(words, fontsize="small")]
    save(figure, tmp_path / "new" / "figure.png")
    renderer = FigureCanvasAgg(figure).get_renderer()
    for text in texts:
        extent = text.get_window_extent(renderer)
        assert extent.x0 >= 0 and extent.x1 <= figure.bbox.width, text.get_text()
        assert " ".join(text.get_text().split()) == words
    assert "\n" not in axes[0].get_title() and (tmp_path / "new" / "figure.png").stat().st_size > 1000


def test_names_of_stages_and_long_legends_leave_room_for_the_curves():
    """Catches the name of a late stage that runs over the right edge or squeezes the panel, and a legend of long names
    that hides the curves."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 100], [0, 1], label="a run of a name that is as long as users make them, seed 0")
    mark_stages(axes, [(0, "sparse"), (95, "a run of a name that is as long as users: full")])
    add_legend(axes)
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    assert all(text.get_window_extent(renderer).x1 <= axes.bbox.x1 for text in axes.texts)
    assert axes.get_legend().get_window_extent(renderer).x0 >= axes.bbox.x1
    assert axes.bbox.width > 0.4 * figure.bbox.width
