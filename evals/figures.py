"""Draws PNG figures: loss by position, its heat map over training, and losses over tokens.

Each function takes data and a path. The figure itself says what a bucket, an error bar and "trailing" mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from conf.numbers import format_count, format_length
from evals.statistics import half_width
from evals.style import LOSS, POSITION, look, save
from train.record.position_loss import PositionCurve

Boundaries = Sequence[tuple[int, str]]  # (tokens at which a stage starts, its name)


def plot_curves(
    curves: Mapping[str, PositionCurve],
    path: Path | str,
    title: str = "Loss by position",
    *,
    dense_up_to: int | None = None,
) -> None:
    """Draws bucket means with 95 % intervals, one line per curve, and each curve's trailing loss as a star.

    Curves may have different lengths. Where an interval is missing, fewer than two documents were counted.
    `dense_up_to`: position up to which the sparse attention drops nothing (block size x top k), marked.
    """
    assert curves
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for i, (label, curve) in enumerate(curves.items()):
        centres = (curve.edges[:-1] + curve.edges[1:]) / 2
        style = look(i, len(curves))
        axes.errorbar(
            centres,
            curve.mean,
            yerr=interval(curve.se, curve.interval_freedom),
            capsize=2,
            elinewidth=0.9,
            label=f"{label}: {_trailing_text(curve)}",
            **style,
        )
        axes.plot(centres[-1], curve.trailing.value, marker="*", markersize=11, color=style["color"], mec="black")
    longest = max(curve.max_length for curve in curves.values())
    shortest_bucket, longest_bucket = (f(_bucket_size(c) for c in curves.values()) for f in (min, max))
    size = f"{shortest_bucket}" if shortest_bucket == longest_bucket else f"{shortest_bucket} to {longest_bucket}"
    axes.axvspan(longest - longest_bucket, longest, color="0.92", zorder=0)
    mark_dense(axes, dense_up_to, longest)
    axes.set_xlim(0, longest * 1.01)
    length_axis(axes.xaxis, longest)
    axes.set_xlabel(f"{POSITION}, in buckets of {size}")
    axes.set_ylabel(LOSS)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.supxlabel(
        "Bars and +-: 95 % intervals, documents or windows as clusters. Star: trailing loss, the last bucket\n"
        "(shaded) of only those that reach the full length. A bucket's mean (dot) counts all its tokens.",
        fontsize="x-small",
    )
    save(figure, path)


def plot_heatmap(
    curves: Sequence[tuple[int, PositionCurve]],
    path: Path | str,
    boundaries: Boundaries = (),
    title: str = "Loss by position over training",
) -> None:
    """Draws loss by context position (upwards) and training tokens (to the right), a column per curve.

    `curves` are (tokens seen at its end, curve) in order; a column reaches back to the end of the one before. Lengths
    may change on the way. Colours span the 2nd to 90th percentile of the losses, or the first steps would wash out
    the rest.
    """
    assert curves
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    losses = np.concatenate([curve.mean for _, curve in curves])
    finite = losses[np.isfinite(losses)]
    low, high = np.percentile(finite, [2, 90]) if len(finite) else (1.0, 2.0)
    norm = LogNorm(max(low, 1e-3), max(high, low * 1.01, 2e-3))
    start, mesh = 0, None
    for tokens, curve in curves:
        mesh = axes.pcolormesh(
            [start, tokens], curve.edges, curve.mean[:, None], norm=norm, cmap="viridis", rasterized=True
        )
        start = tokens
    assert mesh is not None
    longest = max(curve.max_length for _, curve in curves)
    axes.set_ylim(0, longest)
    axes.set_xlim(0, start)
    length_axis(axes.yaxis, longest)
    token_axis(axes)
    mark_stages(axes, boundaries)
    axes.set_ylabel(POSITION)
    axes.set_title(title)
    label = "loss (nats per token; colours from the 2nd to the 90th percentile)"
    colorbar = figure.colorbar(mesh, ax=axes, extend="both", label=label)
    colorbar.ax.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    colorbar.ax.yaxis.set_minor_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    save(figure, path)


def plot_history(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    path: Path | str,
    boundaries: Boundaries = (),
    title: str = "Loss over training",
    ylabel: str = LOSS,
) -> None:
    """Draws one line per series `(tokens, values)` over training tokens, with the stages marked; NaN leaves a gap.

    The axis cuts off the first steps of a run from scratch, where they are far above the rest.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for i, (label, (tokens, values)) in enumerate(series.items()):
        style = look(i, len(series))
        style["marker"] = style["marker"] if len(tokens) < 40 else None
        axes.plot(tokens, values, label=label, **style)
    values = np.concatenate([np.asarray(values, dtype=float) for _, values in series.values()])
    values = values[np.isfinite(values)]
    if len(values) >= 20:
        low, typical, high = values.min(), np.percentile(values, 90), values.max()
        axes.set_ylim(low - 0.05 * (typical - low), min(high, typical + (typical - low)))
    axes.set_xlim(left=0)
    token_axis(axes)
    mark_stages(axes, boundaries)
    axes.set_ylabel(ylabel)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    save(figure, path)


def interval(se: np.ndarray, freedom: np.ndarray) -> np.ndarray:
    """Half-width of the 95 % interval; 0, which draws no bar, where there is none."""
    return np.nan_to_num(half_width(se, freedom), nan=0.0)


def mark_dense(axes, dense_up_to: int | None, longest: int) -> None:
    """A dotted line at block size x top k, up to which sparse attention is full attention."""
    if dense_up_to is not None and dense_up_to < longest:
        label = f"no block is dropped up to {format_length(dense_up_to)}"
        axes.axvline(dense_up_to, color="0.4", linestyle=":", linewidth=1.2, label=label)


def _bucket_size(curve: PositionCurve) -> int:
    return int(np.diff(curve.edges).max())


def _trailing_text(curve: PositionCurve) -> str:
    """`trailing 1.234 +- 0.056 (16 clusters)`: the 95 % interval, and how many documents or windows it rests on."""
    value, se, _, clusters = curve.trailing
    if not np.isfinite(value):
        return f"no document reaches {curve.max_length}"
    width = float(half_width(se, curve.trailing_interval_freedom))
    error = f" +- {width:.3f}" if np.isfinite(width) else ""
    return f"trailing {value:.3f}{error} ({clusters:.0f} clusters)"


def length_axis(axis, longest: int) -> None:
    """Ticks at eighths of the length, all in binary K where they are whole numbers of it, else all in tokens."""
    step = max(1, longest // 8)
    unit, suffix = (1024, "K") if step % 1024 == 0 else (1, "")
    axis.set_ticks(np.arange(0, longest + 1, step))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / unit:g}{suffix if x else ''}"))


def token_axis(axes) -> None:
    """Training tokens along x, in decimal units."""
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: format_count(tokens)))
    axes.set_xlabel("training tokens")


def mark_stages(axes, boundaries: Boundaries) -> None:
    """A dashed line with the stage's name where each stage starts, as far as the axis reaches."""
    left, right = axes.get_xlim()
    for tokens, name in boundaries:
        if tokens > right:  # of another run: its name, outside the axes, would shrink them
            continue
        if tokens > 0:
            axes.axvline(tokens, color="black", linestyle="--", linewidth=1)
        before = tokens > left + 0.6 * (right - left)  # a name must not run over the right edge
        axes.annotate(
            name,
            (tokens, 1),
            xycoords=("data", "axes fraction"),
            xytext=(-4 if before else 4, -4),
            textcoords="offset points",
            ha="right" if before else "left",
            va="top",
            in_layout=False,
            fontsize="small",
            zorder=5,
            bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 1},
        )
