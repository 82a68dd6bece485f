"""Figures of a RoutingReport: heat maps by layer and head, shares by position, distances, hit rates against the
signal-to-noise model, and the blocks that single heads select."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from evals.figures import interval, length_axis
from evals.routing_numbers import model_hit_rate
from evals.routing_report import SHARES, RoutingReport
from evals.style import color, look, marker, save

HEAT_MAPS = {
    "captured_all": "captured share",
    "regret": "regret: oracle - captured",
    "recall": "recall of the oracle's blocks",
    "output_error": "output error",
    "load_entropy": "entropy of the load",
    "snr": "signal to noise",
}
PARTS = (color(0), color(5), color(1), "0.85")
LABELS = {
    "captured": "picked by the gate",
    "oracle": "best blocks",
    "local": "latest",
    "random": "random",
    "own": "own block alone",
}


def figures(report: RoutingReport, title: str = "") -> dict[str, Callable[[Path], None]]:
    """The figures of a Result: `_heads`, `_curves` and `_maps`."""
    drawn = {"_heads": _draw_heads, "_curves": draw_curves, "_maps": _draw_maps}
    return {ending: partial(draw, report, title=title) for ending, draw in drawn.items()}


def _draw_heads(report: RoutingReport, path: Path, title: str) -> None:
    figure = Figure(figsize=(11, 2.2 + 0.5 * min(len(report.layers), 16)), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(2, 3).flat, HEAT_MAPS.items()):
        values_LH = report.head(name).mean
        image = axes.imshow(values_LH, aspect="auto", cmap="viridis", interpolation="nearest")
        axes.set_title(label, fontsize="small")
        axes.set_yticks(range(len(report.layers)), report.layers)
        axes.set_xticks(range(values_LH.shape[1]))
        axes.tick_params(labelsize="x-small")
        if values_LH.size <= 64:
            digits = 2 if np.nanmax(np.abs(values_LH)) >= 0.1 else 4
            middle = (np.nanmin(values_LH) + np.nanmax(values_LH)) / 2
            for (y, x), value in np.ndenumerate(values_LH):
                color = "white" if value <= middle else "black"
                axes.text(x, y, f"{value:.{digits}f}", ha="center", va="center", fontsize="x-small", color=color)
        figure.colorbar(image, ax=axes).ax.tick_params(labelsize="x-small")
    figure.supxlabel("head", fontsize="small")
    figure.supylabel("layer", fontsize="small")
    figure.suptitle(title, fontsize="medium")
    save(figure, path)


def draw_curves(report: RoutingReport, path: Path, title: str) -> None:
    """Shares by position and distance, hit rates against the model, and where the probability goes by layer."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    (position, distance), (hits, layers) = figure.subplots(2, 2)
    _by_position(report, position)
    _by_distance(report, distance)
    _hits(report, hits)
    _by_layer(report, layers)
    for axes in (position, distance, hits, layers):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small", ncols=2)
    figure.suptitle(title, fontsize="medium")
    save(figure, path)


def draw_layers(report: RoutingReport, path: Path, title: str) -> None:
    """The lower half of the curves, which needs only the means of each head."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    hits, layers = figure.subplots(1, 2)
    _hits(report, hits)
    _by_layer(report, layers)
    for axes in (hits, layers):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small", ncols=2)
    figure.suptitle(title, fontsize="medium")
    save(figure, path)


def _by_position(report: RoutingReport, axes) -> None:
    found = report.by_position()
    centres = (report.edges[:-1] + report.edges[1:]) / 2
    for i, name in enumerate(SHARES):
        width = interval(found.se[:, i], found.freedom[:, i])
        axes.errorbar(
            centres, found.mean[:, i], yerr=width, label=LABELS[name], capsize=2, **look(i, 2), elinewidth=0.9
        )
    length_axis(axes.xaxis, int(report.edges[-1]))
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("position (routed queries only)")
    axes.set_ylabel("share of full attention")
    axes.set_title("What a budget of k blocks holds (bars: 95 %, documents)", fontsize="small")


def _by_distance(report: RoutingReport, axes) -> None:
    mean_2E = np.nanmean(report.distance_NL2E, axis=(0, 1))
    last = int(np.flatnonzero(mean_2E.sum(0) > 0).max())
    octaves = np.arange(last + 1)
    for i, (label, offset) in enumerate((("picks", -0.2), ("full attention's probability", 0.2))):
        axes.bar(octaves + offset, mean_2E[i, : last + 1], width=0.4, color=color(i), label=label)
    names = [f"{2**e}" if e == 0 else f"{2**e}-{2 ** (e + 1) - 1}" for e in octaves]
    axes.set_xticks(octaves, names, fontsize="x-small")
    axes.set_ylim(0, 1.2 * mean_2E.max())  # room for the legend
    axes.set_xlabel("blocks back")
    axes.set_ylabel("share of the history")
    axes.set_title("How far back: the gate, and what it should follow", fontsize="small")


def _hits(report: RoutingReport, axes) -> None:
    """Each head's hit rate over its signal-to-noise ratio; the model's curve for top_k and the mean number of
    candidates."""
    snr_LH, hit_LH = report.head("snr").mean, report.head("hit").mean
    for i, layer in enumerate(report.layers):
        few = len(report.layers) <= 8
        shade = color(i) if few else colormaps["viridis"](i / (len(report.layers) - 1))
        shape = marker(i) if few else "o"
        axes.scatter(snr_LH[i], hit_LH[i], s=14, color=shade, marker=shape, label=f"layer {layer}" if few else None)
    low, high = min(0.0, float(np.nanmin(snr_LH))), max(3.0, float(np.nanmax(snr_LH)))
    grid = np.linspace(low, high, 100)
    routings = [spec.routing for spec in report.specs if spec.routing is not None]
    for picks in sorted({routing.top_k - 1 - routing.first_blocks for routing in routings}):
        label = f"model: {picks} of {report.candidates:.0f} blocks"
        axes.plot(grid, model_hit_rate(grid, report.candidates, picks), color="black", linewidth=1.2, label=label)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("signal to noise of the best block's score")
    axes.set_ylabel("best block picked")
    shades = "" if len(report.layers) <= 8 else " (dark: first layers, bright: last)"
    axes.set_title(f"Hits of each head against FlashMoBA's model{shades}", fontsize="small")


def _by_layer(report: RoutingReport, axes) -> None:
    bottom = np.zeros(len(report.layers))
    own, captured, oracle = (np.nanmean(report.head(name).mean, axis=1) for name in ("own", "captured", "oracle"))
    parts = (("own block", own), ("picked by the gate", captured - own), ("lost by the gate", oracle - captured))
    for i, (label, height) in enumerate((*parts, ("lost to sparsity", 1 - oracle))):
        looks = {"color": PARTS[i], "edgecolor": "white", "linewidth": 0.4}
        axes.bar(range(len(report.layers)), height, bottom=bottom, label=label, **looks)
        bottom = bottom + height
    step = -(-len(report.layers) // 16)  # more labels would run into each other
    axes.set_xticks(range(0, len(report.layers), step), report.layers[::step])
    axes.set_ylim(0, 1.35)  # room for the legend
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.set_xlabel("layer")
    axes.set_ylabel("share of full attention")
    axes.set_title("Where the probability goes (mean over heads)", fontsize="small")


def _draw_maps(report: RoutingReport, path: Path, title: str) -> None:
    """Selected blocks beside probability, for the heads with the least, the median and the largest regret."""
    regret_LH = report.head("regret").mean
    order = np.argsort(regret_LH, axis=None)
    chosen = {"least": order[0], "median": order[len(order) // 2], "largest": order[-1]}
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    panels, image = figure.subplots(2, len(chosen)), None
    for column, (which, index) in enumerate(chosen.items()):
        layer, head = np.unravel_index(index, regret_LH.shape)
        for row, what in enumerate(("picks of the gate", "full attention")):
            axes, values_YY = panels[row, column], report.maps_LH2YY[layer, head, row]
            image = axes.imshow(np.where(values_YY > 0, values_YY, np.nan), norm=LogNorm(1e-3, 1), cmap="magma_r")
            axes.set_title(
                f"layer {report.layers[layer]} head {head}, {which} regret {regret_LH[layer, head]:.3f}\n{what}",
                fontsize="small",
            )
            axes.tick_params(labelsize="x-small")
    assert image is not None
    figure.colorbar(image, ax=panels, label="picks: share of the queries; attention: mean probability", shrink=0.7)
    cells = report.maps_LH2YY.shape[-1]
    figure.supxlabel(f"keys, in {cells} equal parts of the document", fontsize="small")
    figure.supylabel("queries", fontsize="small")
    figure.suptitle(title, fontsize="medium")
    save(figure, path)
