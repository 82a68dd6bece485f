"""Scaling laws over finished runs: L = a C^b for the mean loss, the trailing loss and each range of positions.

As in the MoBA paper's section 3.1 and Table 3, but C counts model FLOPs with attended pairs
(train/record/throughput.py), beside the dense equivalent, which counts every causal pair, as the paper does for MoBA
and full attention alike. Unit PFLOP/s-days, so a is the loss at C = 1.

A series is runs of several sizes with the same attention: one curve. Intervals are bootstrapped over held-out
documents, with the same draws for all runs, where every run kept the losses of the same documents: they cover the
choice of documents, not the training seed. Otherwise runs are bootstrapped.

Shapes: R runs, X ranges (mean, trailing, buckets), N documents, D bootstrap draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from conf.build import ConfigError
from conf.files import read_text
from conf.numbers import format_count, format_length
from conf.schema import RunConfig
from conf.trajectory import to_dict
from conf.validate import from_yaml
from conf.words import listed, show
from data.tokenizer import load_tokenizer
from evals.position_loss import Evaluation, plain
from evals.run_files import ReportError, read_run, unique_names
from evals.statistics import clustered_sums
from train.model.sizes import embedding_rows, matmul_flops_per_token, num_parameters
from train.record.metrics import FILE_NAME, read_metrics
from train.schedule import build_schedule

UNIT = 1e15 * 86400
"""FLOPs of a PFLOP/s-day."""
AXES = {"attended": "training FLOPs, attended pairs", "dense": "dense equivalent: every causal pair"}
SIZES, DRAWS, FEWEST_CLUSTERS, SEED = 3, 2000, 4, 0
MEAN, TRAILING = "mean", "trailing"


@dataclass(frozen=True, eq=False)
class Point:
    """One finished run."""

    name: str
    series: str
    """Its attention, in words independent of model size."""
    full_layers: int
    """Layers with full attention at its end."""
    num_layers: int
    size: int
    """Parameters without embeddings."""
    tokens: int
    compute: Mapping[str, float]
    """By AXES, PFLOP/s-days."""
    losses: Mapping[str, float]
    """MEAN and TRAILING of its last evaluation, nats per token."""
    history: Sequence[tuple[Mapping[str, float], float, float]]
    """(compute, mean, trailing) of its evaluations."""
    held_out: Evaluation | None
    """Its last evaluation, if its documents were kept."""
    config: RunConfig

    @property
    def label(self) -> str:
        """Its size as text: `1.5B`."""
        return format_count(self.size)


@dataclass(frozen=True, eq=False)
class Fit:
    """L = a C^b over one series; each field is float64 [X]."""

    a: np.ndarray
    b: np.ndarray
    """Negative where more compute helps."""
    a_low: np.ndarray
    a_high: np.ndarray
    b_low: np.ndarray
    b_high: np.ndarray
    """95 %."""

    def at(self, compute: np.ndarray | float, x: int) -> np.ndarray:
        """The loss of range x."""
        return self.a[x] * np.asarray(compute) ** self.b[x]


def power_law(compute_R: np.ndarray, losses_RX: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(a, b) of the least squares of log L = log a + b log C; losses may have more trailing dimensions."""
    x_R = np.log(compute_R) - np.log(compute_R).mean()
    y_RX = np.log(losses_RX)
    b_X = np.tensordot(x_R, y_RX, 1) / (x_R**2).sum()
    return np.exp(y_RX.mean(0) - b_X * np.log(compute_R).mean()), b_X


def read_points(folders: Sequence[Path]) -> list[Point]:
    """The runs. ReportError naming those that are missing, unfinished or do not fit together."""
    points = [_read(folder, name) for folder, name in zip(folders, unique_names(folders))]
    _check(points)
    return points


def _read(folder: Path, name: str) -> Point:
    run = read_run(folder, name)
    path = folder / "config.yaml"
    try:
        config = from_yaml(read_text(path, error=ReportError), path)
    except ConfigError as error:
        raise ReportError(str(error)) from error
    schedule, total = build_schedule(config), build_schedule(config).total_tokens
    if not run.evaluations or run.evaluations[-1]["tokens"] < total or run.train[-1]["tokens"] < total:
        seen = run.evaluations[-1]["tokens"] if run.evaluations else 0
        raise ReportError(
            f"{folder} was evaluated up to {seen:,} of its {total:,} tokens: a fit takes finished runs with eval.* on"
        )
    held_out, last = run.held_out, run.evaluations[-1]
    rows = embedding_rows(config.model, load_tokenizer(config.data.tokenizer).vocab_size)
    tokens_S, *flops = training_flops(read_metrics(folder / FILE_NAME), matmul_flops_per_token(config.model, rows))

    def compute(at: int) -> dict[str, float]:
        return {axis: float(np.interp(at, tokens_S, of_S)) / UNIT for axis, of_S in zip(AXES, flops)}

    known = [one for one in run.evaluations if one.get("loss") and one.get("trailing_loss") and one["tokens"] > 0]
    return Point(
        name=name,
        series=series_name(config),
        full_layers=sum(spec.is_dense_at(schedule.stages[-1].seq_len) for spec in schedule.stages[-1].attention),
        num_layers=config.model.num_layers,
        size=num_parameters(config.model, rows)["non_embedding"],
        tokens=total,
        compute=compute(total),
        losses={MEAN: last["loss"], TRAILING: last["trailing_loss"]},
        history=[(compute(one["tokens"]), one["loss"], one["trailing_loss"]) for one in known],
        held_out=held_out,
        config=config,
    )


def training_flops(
    records: Sequence[Mapping[str, Any]], matmul_flops: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, FLOPs with attended pairs, with every causal pair) so far, at the end of each log interval; zeros first.

    FLOPs per token of an interval times the tokens since the last one, so that a resume in the middle of an interval
    loses nothing. `matmul_flops`: a token's, without attention.
    """
    sums, devices = [(0, 0.0, 0.0)], 1
    for record in records:
        if record["kind"] == "run":
            devices = record.get("num_devices") or 1
        if record["kind"] == "train" and record.get("tflops") and record["tokens"] > sums[-1][0]:
            tokens, attended, dense = sums[-1]
            new = record["tokens"] - tokens
            of_pairs = record["tflops"] * 1e12 * devices / record["tokens_per_second"] - matmul_flops
            attended += new * (matmul_flops + of_pairs)
            dense += new * (matmul_flops + of_pairs / record["attended_share"])
            sums.append((record["tokens"], attended, dense))
    tokens_S, attended_S, dense_S = np.array(sums, dtype=np.float64).T
    return tokens_S, attended_S, dense_S


def series_name(config: RunConfig) -> str:
    """The attention of a run's stages, in words independent of model depth."""
    total, parts = build_schedule(config).total_tokens, []
    for stage, own in zip(build_schedule(config).stages, config.schedule.stages.values()):
        kinds = list(dict.fromkeys(map(str, stage.attention)))
        if own.attention.pattern is not None:
            name = f"{'/'.join(kinds)} as {own.attention.pattern}"
        else:
            name = kinds[0] + (f" with last {own.attention.full_last} full" if own.attention.full_last else "")
        if parts and parts[-1][0] == name:
            parts[-1] = (name, parts[-1][1] + stage.tokens)
        else:
            parts.append((name, stage.tokens))
    if len(parts) == 1:
        return parts[0][0]
    return " then ".join(f"{name} ({tokens / total:.0%})" for name, tokens in parts)


NO_MATTER = ("cache_dir", "num_workers", "seed", "validation")


def _check(points: Sequence[Point]) -> None:
    """ReportError where runs have different data, or a series has too few sizes."""
    first, problems = points[0], []
    for other in points[1:]:
        ours, theirs = to_dict(first.config)["data"], to_dict(other.config)["data"]
        differ = [key for key in ours if key not in NO_MATTER and ours[key] != theirs[key]]
        if differ:
            key = differ[0]
            said = f"data.{key}: {show(ours[key])} -> {show(theirs[key])}"
            problems.append(f"{first.name} and {other.name} were trained on different data ({said})")
        elif first.held_out is not None and other.held_out is not None:
            if not np.array_equal(first.held_out.curve.edges, other.held_out.curve.edges):
                lengths = [format_length(one.held_out.curve.max_length) for one in (first, other) if one.held_out]
                problems.append(f"{first.name} and {other.name} were evaluated at different lengths, {listed(lengths)}")
            elif sorted(first.held_out.document_keys) != sorted(other.held_out.document_keys):
                problems.append(f"{first.name} and {other.name} were evaluated on different documents")
    for series in dict.fromkeys(point.series for point in points):
        own = [point for point in points if point.series == series]
        if len({point.size for point in own}) < SIZES:
            sizes = listed(f"{point.name} ({point.label})" for point in own)
            problems.append(f"{series!r} has fewer than {SIZES} sizes of model: {sizes}; a power law takes {SIZES}")
    if problems:
        raise ReportError("; ".join(problems))


@dataclass(frozen=True, eq=False)
class Scaling:
    """Runs of one set of data, and the fits of their series."""

    points: Sequence[Point]

    @cached_property
    def series(self) -> list[str]:
        """Names of the series, in the order of the runs."""
        return list(dict.fromkeys(point.series for point in self.points))

    def of(self, series: str) -> list[Point]:
        """Its runs, by compute."""
        return sorted((p for p in self.points if p.series == series), key=lambda p: p.compute["attended"])

    @cached_property
    def documents(self) -> tuple[np.ndarray, list[str]] | None:
        """([R, N, B] mean loss of each document in each bucket, its cluster), rows in the order of `points`; None
        unless all runs kept theirs and there are at least FEWEST_CLUSTERS."""
        evaluations = [point.held_out for point in self.points if point.held_out is not None]
        first = evaluations[0] if evaluations else None
        if first is None or len(evaluations) < len(self.points):
            return None
        if len(set(first.document_clusters)) < FEWEST_CLUSTERS:
            return None
        rows = [[one.document_keys.index(key) for key in first.document_keys] for one in evaluations]
        return np.stack([one.document_loss[row] for one, row in zip(evaluations, rows)]), first.document_clusters

    @property
    def ranges(self) -> list[str]:
        """Names of the ranges: MEAN, TRAILING, and the buckets where documents were kept."""
        if self.documents is None or self.points[0].held_out is None:
            return [MEAN, TRAILING]
        edges = self.points[0].held_out.curve.edges.tolist()
        return [MEAN, TRAILING, *(f"{format_length(a)}-{format_length(b)}" for a, b in pairwise(edges))]

    @property
    def drawn(self) -> str:
        """What intervals are based on, in words."""
        if self.documents is None:
            return "draws of the runs of a series (their documents' losses were not kept, or are too few)"
        return (
            f"draws of {len(set(self.documents[1]))} clusters of held-out documents, the same for all runs; another "
            "seed of training would move the fits too"
        )

    @cached_property
    def losses_RX(self) -> np.ndarray:
        """[R, X], rows in the order of `points`."""
        if self.documents is None:
            return np.array([[point.losses[name] for name in (MEAN, TRAILING)] for point in self.points])
        return self._document_draws(np.ones((1, len(set(self.documents[1])))))[:, 0]

    def _document_draws(self, times_DC: np.ndarray) -> np.ndarray:
        """[R, D, X] losses where each cluster of documents is weighted by times_DC."""
        assert self.documents is not None
        loss_RNB, clusters = self.documents
        known_RNB = np.isfinite(loss_RNB)
        found = []
        for loss_NB, known_NB in zip(loss_RNB, known_RNB):
            sums_CB, counts_CB = clustered_sums(np.where(known_NB, loss_NB, 0), known_NB, clusters)
            sums_DB, counts_DB = times_DC @ sums_CB, times_DC @ counts_CB
            with np.errstate(invalid="ignore", divide="ignore"):
                buckets_DB = sums_DB / counts_DB
                mean_D = sums_DB.sum(1) / counts_DB.sum(1)
            found.append(np.column_stack([mean_D, buckets_DB[:, -1], buckets_DB]))
        return np.stack(found)

    @cached_property
    def _drawn_RDX(self) -> np.ndarray | None:
        """[R, D, X] losses under bootstrap draws of documents, the same for every fit."""
        if self.documents is None:
            return None
        clusters = len(set(self.documents[1]))
        times_DC = np.random.default_rng(SEED).multinomial(clusters, np.full(clusters, 1 / clusters), DRAWS)
        return self._document_draws(times_DC.astype(np.float64))

    def draws(self, series: str, axis: str) -> tuple[np.ndarray, np.ndarray]:
        """(a, b) of each draw, [D, X]."""
        rows = [i for i, point in enumerate(self.points) if point.series == series]
        compute_R = np.array([self.points[i].compute[axis] for i in rows])
        if self._drawn_RDX is not None:
            return power_law(compute_R, self._drawn_RDX[rows])
        generator, found = np.random.default_rng(SEED), []
        while len(found) < DRAWS:
            drawn = generator.integers(len(rows), size=len(rows))
            if len(set(compute_R[drawn])) > 1:
                found.append(power_law(compute_R[drawn], self.losses_RX[rows][drawn]))
        a_DX, b_DX = (np.stack(side) for side in zip(*found))
        return a_DX, b_DX

    def fit(self, series: str, axis: str) -> Fit:
        """The fit of a series over one of AXES."""
        rows = [i for i, point in enumerate(self.points) if point.series == series]
        a_X, b_X = power_law(np.array([self.points[i].compute[axis] for i in rows]), self.losses_RX[rows])
        intervals = [np.quantile(side, (0.025, 0.975), axis=0) for side in self.draws(series, axis)]
        return Fit(a_X, b_X, *intervals[0], *intervals[1])

    def exponent_gap(self, series: str, reference: str, axis: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(difference of the exponents, low, high), [X]; of the same draws where documents were drawn."""
        ours, theirs = self.fit(series, axis), self.fit(reference, axis)
        gap_DX = self.draws(series, axis)[1] - self.draws(reference, axis)[1]
        low_X, high_X = np.quantile(gap_DX, (0.025, 0.975), axis=0)
        return ours.b - theirs.b, low_X, high_X

    def table(self, axis: str) -> str:
        """The fits as the paper's Table 3: a row per range, a column per series."""
        fits = {series: self.fit(series, axis) for series in self.series}
        lines = [
            f"L = a x C^b, C in PFLOP/s-days ({AXES[axis]})",
            "| positions | " + " | ".join(f"{series}: L = a x C^b | b, 95 %" for series in self.series) + " |",
            "|---" * (1 + 2 * len(self.series)) + "|",
        ]
        for x, name in enumerate(self.ranges):
            cells = [f"{f.a[x]:.3f} x C^{f.b[x]:.3f} | {f.b_low[x]:.3f} to {f.b_high[x]:.3f}" for f in fits.values()]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def text(self) -> str:
        """Both tables, the exponents' differences, and what intervals are based on."""
        lines = [self.table(axis) + "\n" for axis in AXES]
        reference = self.series[-1]
        for series in self.series[:-1]:
            for x, name in enumerate((MEAN, TRAILING)):
                gap, low, high = (side[x] for side in self.exponent_gap(series, reference, "attended"))
                lines.append(f"b of {series} - {reference}, {name}: {gap:+.4f} (95 %: {low:+.4f} to {high:+.4f})")
        return "\n".join([*lines, f"95 %: {self.drawn}"])

    def summary(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "unit": "nats per token; C in PFLOP/s-days",
            "form": "L = a C^b",
            "axes": AXES,
            "intervals": f"95 %, percentiles of {DRAWS} {self.drawn}",
            "ranges": self.ranges,
            "runs": [
                {
                    "name": point.name,
                    "series": point.series,
                    "non_embedding_parameters": point.size,
                    "full_layers": point.full_layers,
                    "num_layers": point.num_layers,
                    "tokens": point.tokens,
                    "pflops_days": dict(point.compute),
                    "pflops_days_6nd": 6 * point.size * point.tokens / UNIT,
                    "losses": plain(self.losses_RX[i]),
                }
                for i, point in enumerate(self.points)
            ],
            "fits": {
                axis: {series: self._fit_summary(self.fit(series, axis)) for series in self.series} for axis in AXES
            },
            "exponent_minus_last_series": {
                axis: {
                    series: dict(zip(("mean", "low", "high"), map(plain, self.exponent_gap(series, reference, axis))))
                    for series in self.series[:-1]
                    for reference in self.series[-1:]
                }
                for axis in AXES
            },
        }

    @staticmethod
    def _fit_summary(fit: Fit) -> dict[str, Any]:
        return {name: plain(values) for name, values in vars(fit).items()}
