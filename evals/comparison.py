"""Draws runs together: loss over tokens, loss by position and speed, with the gap to a reference run.

The reference is the last run given, so that `launch/report.py runs/moba runs/full` shows what MoBA costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from conf.numbers import format_count
from evals.figures import Boundaries, interval, length_axis, mark_dense, mark_stages, token_axis
from evals.paired import difference
from evals.position_loss import Evaluation
from evals.style import LOSS, POSITION, add_legend, color, look, marker, save

Records = Sequence[Mapping[str, Any]]
MOST_BANDS = 2  # more would overlap
SMOOTHING = 40  # a smoothed value is the mean of about a fortieth of the points


def column(records: Records, name: str) -> np.ndarray:
    """float64 [N]: one column of metrics records, NaN where it is null or missing."""
    values = [record.get(name) for record in records]
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def smooth(tokens: np.ndarray, values: np.ndarray, boundaries: Boundaries = ()) -> np.ndarray:
    """float64 [N]: the mean of the values around each, fewer at the ends, none from beyond a stage boundary.

    An average across the boundary would hide the effect of the switch.
    """
    reach = len(values) // (2 * SMOOTHING)
    kernel = np.ones(2 * reach + 1)
    cuts = np.unique(np.searchsorted(tokens, [start for start, _ in boundaries], side="right"))
    parts = []
    for part in np.split(values, cuts[(cuts > 0) & (cuts < len(values))]):
        total, count = (np.convolve(x, kernel)[reach : reach + len(part)] for x in (part, np.ones(len(part))))
        parts.append(total / count)
    return np.concatenate(parts)


def plot_losses(
    runs: Mapping[str, Records],
    path: Path | str,
    boundaries: Boundaries = (),
    name: str = "loss",
    title: str = "Training loss",
) -> None:
    """Draws a column of `train` records over tokens, faint as logged and bold smoothed; with two runs or more also each
    run's gap to the last one at equal tokens."""
    figure, axes, below = _panels(len(runs) > 1)
    reference = _points(list(runs.values())[-1], name)
    extents = [(np.inf, -np.inf)]
    for i, (label, records) in enumerate(runs.items()):
        tokens, values = _points(records, name)
        if len(tokens) == 0:
            continue
        smoothed = smooth(tokens, values, boundaries)
        style = look(i, len(runs)) | {"marker": None}
        axes.plot(tokens, values, color=color(i), alpha=0.25, linewidth=0.8)
        axes.plot(tokens, smoothed, label=f"{label} (at the end {smoothed[-1]:.3f})", **style)
        low, typical = np.percentile(smoothed, [0, 90])
        extents.append((low - 0.3 * (typical - low), typical + 0.5 * (typical - low)))
        if below is not None and i < len(runs) - 1 and len(reference[0]):
            shared = tokens[(tokens >= reference[0][0]) & (tokens <= reference[0][-1])]
            gap = np.interp(shared, tokens, values) - np.interp(shared, *reference)
            below.plot(shared, gap, color=color(i), alpha=0.25, linewidth=0.8)
            below.plot(shared, smooth(shared, gap, boundaries), **style)
    low, high = min(low for low, _ in extents), max(high for _, high in extents)
    if high > low:  # the first steps from random weights would flatten all that follows
        axes.set_ylim(low, high)
    if below is not None:
        _gap_axis(below, list(runs))
    axes.set_xlim(left=0)
    mark_stages(axes, boundaries)
    axes.set_ylabel(LOSS)
    axes.set_title(title)
    token_axis(below or axes)
    _finish(figure, axes, path)


def plot_positions(runs: Mapping[str, Evaluation], path: Path | str, dense_up_to: int | None = None) -> None:
    """Draws held-out loss by position; with two runs or more also each run's gap to the last one, bucket by bucket.

    Where both runs were evaluated on the same documents the gap is paired by document (evals/paired.py), far sharper
    than the spread of documents; otherwise both curves' errors are added. Bars are 95 % intervals of one bucket; the
    shaded band, drawn for up to two gaps, is simultaneous over buckets. Runs with other buckets, or with only one
    shared document, have no gap. `dense_up_to`: block size x top k, marked.
    """
    figure, axes, below = _panels(len(runs) > 1)
    reference, extents = list(runs.values())[-1], [0.0]
    for i, (label, run) in enumerate(runs.items()):
        curve, style = run.curve, look(i, len(runs))
        centres = (curve.edges[:-1] + curve.edges[1:]) / 2
        text = f"{label}: trailing {curve.trailing.value:.3f}" if np.isfinite(curve.trailing.value) else label
        errors = interval(curve.se, curve.interval_freedom) if below is None else None
        axes.errorbar(centres, curve.mean, yerr=errors, label=text, capsize=2, **style)
        gap = _gap(run, reference) if i < len(runs) - 1 else None
        if below is not None and gap is not None:
            same = f"{gap.num_documents} documents" if gap.paired else "documents differ"
            same += "" if gap.no_band is None else ", no band"
            mean, bars, band = gap.by_bucket.mean, np.nan_to_num(gap.interval()), np.nan_to_num(gap.band())
            extents += [np.nanmin(mean - 1.5 * bars), np.nanmax(mean + 1.5 * bars)]
            aside = centres + (i - (len(runs) - 2) / 2) * np.diff(curve.edges).min() / 12  # bars beside each other
            below.errorbar(aside, mean, yerr=bars, label=f"{label}, {same}", capsize=2, **(style | {"linewidth": 1.3}))
            if len(runs) <= MOST_BANDS + 1:
                below.fill_between(centres, mean - band, mean + band, color=color(i), alpha=0.15, linewidth=0)
    longest = max(run.curve.max_length for run in runs.values())
    mark_dense(axes, dense_up_to, longest)
    if below is not None:
        _gap_axis(below, list(runs))
        if max(extents) > min(extents):  # with few documents the band would flatten everything
            below.set_ylim(min(extents), max(extents))
        below.axvline(dense_up_to or np.nan, color="0.4", linestyle=":", linewidth=1.2)
        add_legend(below)
    length_axis((below or axes).xaxis, longest)
    (below or axes).set_xlabel(POSITION)
    axes.set_ylabel(LOSS)
    bars = "bars: 95 % interval of a bucket" + (", band: of all at once" if 1 < len(runs) <= MOST_BANDS + 1 else "")
    what = "" if below is None else ", and its difference, document by document"
    axes.set_title(f"Held-out loss by position{what}\n({bars}; documents as clusters)", fontsize="medium")
    _finish(figure, axes, path)


def _gap(run: Evaluation, reference: Evaluation) -> Any:
    """The Difference of two runs, or None where they cannot be compared."""
    try:
        return difference(run, reference)
    except ValueError:
        return None


def plot_held_out(runs: Mapping[str, Records], path: Path | str, boundaries: Boundaries = ()) -> None:
    """Draws the held-out trailing loss of `eval` records over training tokens, with its 95 % band."""
    figure, axes, _ = _panels(False)
    for i, (label, records) in enumerate(runs.items()):
        tokens, values = _points(records, "trailing_loss")
        known = [record for record in records if record.get("trailing_loss") is not None]
        freedom = column(known, "trailing_freedom")  # older runs have only the number of documents
        freedom = np.where(np.isnan(freedom), column(known, "documents") - 1, freedom)
        width = interval(column(known, "trailing_se"), freedom)
        axes.plot(tokens, values, label=label, **look(i, len(runs)))
        axes.fill_between(tokens, values - width, values + width, alpha=0.15, linewidth=0, color=color(i))
    axes.set_xlim(left=0)
    mark_stages(axes, boundaries)
    axes.set_ylabel(LOSS)
    axes.set_title("Held-out trailing loss over training (band: 95 %, documents as clusters)")
    token_axis(axes)
    _finish(figure, axes, path)


def plot_routing_history(runs: Mapping[str, Records], path: Path | str, boundaries: Boundaries = ()) -> None:
    """Draws the share of full attention that the gate captured over training, beside that of the best and of random
    blocks."""
    figure, axes, _ = _panels(False)
    kinds = {"captured": ("picked by the gate", "-"), "oracle_share": ("best", "--"), "random_share": ("random", ":")}
    for i, (label, records) in enumerate(runs.items()):
        for name, (what, line) in kinds.items():
            tokens, values = _points(records, f"route/{name}")
            axes.plot(tokens, values, line, color=color(i), marker=marker(i), ms=3, label=f"{label}: {what}")
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.02)
    mark_stages(axes, boundaries)
    axes.set_ylabel("share of full attention's probability")
    axes.set_title("What the selected blocks hold (mean over MoBA layers and heads, first held-out document)")
    token_axis(axes)
    _finish(figure, axes, path)


def plot_speed(runs: Mapping[str, Records], path: Path | str, boundaries: Boundaries = ()) -> None:
    """Draws tokens/s of the run and MFU of attended pairs, or their TFLOP/s of one device where a run has no MFU; and
    the peak of device memory, where it is known."""
    with_memory = any(np.isfinite(column(records, "peak_memory_gib")).any() for records in runs.values())
    figure = Figure(figsize=(8, 8 if with_memory else 6), layout="constrained")
    upper, lower, *memory = figure.subplots(3 if with_memory else 2, 1, sharex=True)
    has_mfu = all(np.isfinite(column(records, "mfu")).any() for records in runs.values())
    for i, (label, records) in enumerate(runs.items()):
        tokens, speed = _points(records, "tokens_per_second")
        upper.plot(tokens, speed, **(look(i, len(runs)) | {"marker": None}), label=label)
        tokens, rate = _points(records, "mfu" if has_mfu else "tflops")
        lower.plot(tokens, 100 * rate if has_mfu else rate, **(look(i, len(runs)) | {"marker": None}))
        for axes in memory:
            tokens, peak = _points(records, "peak_memory_gib")
            axes.plot(tokens, peak, **(look(i, len(runs)) | {"marker": None}))
            axes.set_ylabel("peak memory (GiB)")
    upper.set_title("Speed of training; FLOPs of attended pairs; evaluations and checkpoints not timed")
    upper.set_ylabel("tokens/s, all devices")
    lower.set_ylabel("MFU (%)" if has_mfu else "TFLOP/s of one device")
    for axes in (upper, lower, *memory):
        axes.set_ylim(0, 1.08 * axes.dataLim.y1)
        axes.grid(alpha=0.3)
    upper.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
    upper.set_xlim(left=0)
    mark_stages(upper, boundaries)
    mark_stages(lower, [(tokens, "") for tokens, _ in boundaries])
    token_axis(memory[0] if memory else lower)
    _finish(figure, upper, path)


def _points(records: Records, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, values) of a column, without its nulls."""
    tokens, values = column(records, "tokens"), column(records, name)
    known = np.isfinite(values)
    return tokens[known], values[known]


def _panels(with_gap: bool) -> tuple[Figure, Any, Any]:
    """A figure with one panel, or with a lower one for gaps (else None)."""
    figure = Figure(figsize=(8, 6.5 if with_gap else 5), layout="constrained")
    if not with_gap:
        return figure, figure.add_subplot(), None
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1))
    return figure, upper, lower


def _gap_axis(axes: Any, labels: list[str]) -> None:
    axes.axhline(0.0, color="black", linewidth=0.8)
    axes.set_title(f"minus {labels[-1]}", fontsize="medium")
    axes.set_ylabel("difference (nats per token)")
    axes.grid(alpha=0.3)


def _finish(figure: Figure, axes: Any, path: Path | str) -> None:
    axes.grid(alpha=0.3)
    add_legend(axes)
    save(figure, path)
