"""Draws scaling fits: losses over compute with the fitted lines, and losses over the number of full-attention layers.

The first has the format of the MoBA paper's figure 3 (training curves that end in the points of the fit), the second of
its figure 5b (MoBA alone at the left, full attention at the right, layer-wise hybrids between).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from evals.scaling import AXES, MEAN, TRAILING, Scaling
from evals.style import LOSS, color, look, marker, save

TITLES = {MEAN: "mean held-out loss", TRAILING: "trailing held-out loss"}


def plot_scaling(scaling: Scaling, path: Path) -> None:
    """A row per axis of compute, a column per loss; on log-log axes, where a power law is a straight line."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    grid = figure.subplots(len(AXES), 2, squeeze=False, sharey="col")
    for row, axis in zip(grid, AXES):
        for x, (axes, name) in enumerate(zip(row, TITLES)):
            for i, series in enumerate(scaling.series):
                _series(axes, scaling, series, axis, x, i)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
            axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.tick_params(axis="both", which="minor", labelsize="x-small")
            axes.set_title(TITLES[name], fontsize="medium")
            axes.set_xlabel(f"PFLOP/s-days ({AXES[axis]})")
            axes.set_ylabel(LOSS)
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")
    points = [scaling.losses_RX[:, x] for x in range(2)]
    for x, values in enumerate(points):  # or the first evaluations would set the scale
        low, high = np.log(values.min()), np.log(values.max())
        spread = max(high - low, 0.02)
        grid[0][x].set_ylim(np.exp(low - 0.35 * spread), np.exp(high + 0.6 * spread))
    figure.supxlabel(
        f"Thin: evaluations during training. Dots: finished runs, whose fit is dashed (shaded: 95 %, {scaling.drawn})",
        fontsize="x-small",
        wrap=True,
    )
    save(figure, path)


def _series(axes, scaling: Scaling, series: str, axis: str, x: int, i: int) -> None:
    style: dict[str, Any] = {"color": color(i)}
    own = scaling.of(series)
    for point in own:
        curve = [(compute[axis], *losses) for compute, *losses in point.history]
        axes.plot([c for c, *_ in curve], [losses[x] for _, *losses in curve], alpha=0.35, linewidth=1, **style)
    compute = np.array([point.compute[axis] for point in own])
    rows = [list(scaling.points).index(point) for point in own]
    axes.plot(compute, scaling.losses_RX[rows, x], marker(i), markersize=5, **style)
    fit = scaling.fit(series, axis)
    label = f"{series}: {fit.a[x]:.3f} x C^{fit.b[x]:.3f}"
    line = np.geomspace(compute.min() / 1.3, compute.max() * 1.3, 50)
    axes.plot(line, fit.at(line, x), "--", linewidth=1.4, label=label, **style)
    a_DX, b_DX = scaling.draws(series, axis)
    low, high = np.quantile(a_DX[:, x, None] * line ** b_DX[:, x, None], (0.025, 0.975), axis=0)
    axes.fill_between(line, low, high, alpha=0.12, linewidth=0, **style)


def plot_layers(scaling: Scaling, path: Path) -> None:
    """Losses over the number of layers that are full at the end, a line per size: fewest at the left, all at the
    right."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    grid = figure.subplots(1, 2)
    order = sorted(scaling.series, key=lambda s: min(p.full_layers / p.num_layers for p in scaling.of(s)))
    for x, (axes, name) in enumerate(zip(grid, TITLES)):
        sizes = sorted({point.size for point in scaling.points})
        for i, size in enumerate(sizes):
            places, values = [], []
            for place, series in enumerate(order):
                rows = [r for r, p in enumerate(scaling.points) if p.size == size and p.series == series]
                if rows:
                    places.append(place)
                    values.append(scaling.losses_RX[rows, x].mean())
            label = next(point.label for point in scaling.points if point.size == size)
            axes.plot(places, values, label=f"{label} parameters without embeddings", **look(i, len(sizes)))
            for place, value in zip(places, values):
                axes.annotate(f"{value:.3f}", (place, value), xytext=(0, 5), textcoords="offset points", fontsize=7)
        axes.set_xticks(range(len(order)), [_ticks(scaling, series) for series in order], fontsize="small")
        axes.set_xlim(-0.4, len(order) - 0.6)
        axes.margins(y=0.12)
        axes.set_title(TITLES[name], fontsize="medium")
        axes.set_ylabel(LOSS)
        axes.grid(alpha=0.3)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize="x-small")
    figure.supxlabel("attention in training, and layers that attend to everything at its end", fontsize="small")
    save(figure, path)


def _ticks(scaling: Scaling, series: str) -> str:
    """The series, and its number of full layers."""
    counts = sorted({(point.full_layers, point.num_layers) for point in scaling.of(series)})
    share = {full / layers for full, layers in counts}
    text = {0.0: "no layer", 1.0: "all layers"}.get(next(iter(share))) if len(share) == 1 else None
    text = text or "/".join(str(full) for full in sorted({full for full, _ in counts})) + " layers"
    return series.replace(" then ", "\nthen ").replace(" with ", "\nwith ") + f"\n{text} full"
