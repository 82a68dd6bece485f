"""Compares runs in one self-contained HTML file: tables, figures, and their conventions.

Everything is read from the run directories, so a report can be made on any machine they are copied to, during a run as
well as after it.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conf.files import Count, parse_object, read_text
from conf.numbers import format_count, format_length
from conf.words import first_line
from evals.comparison import (
    column,
    plot_held_out,
    plot_losses,
    plot_positions,
    plot_routing_history,
    plot_speed,
)
from evals.page import folded, image, note, page, table
from evals.paired import difference
from evals.protocol import Eval
from evals.results import commit
from evals.run_files import REMEDY, ReportError, Run, read_run, unique_names
from evals.statistics import half_width
from evals.table import EVALS
from train.record.progress import clock

__all__ = ["ReportError", "read_runs", "write_report"]

END_SHARE = 0.05  # "at the end" is the mean over this part of a run's or a stage's tokens


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """What the report shows of these run directories. ReportError for what is missing."""
    return [read_run(folder, name) for folder, name in zip(folders, unique_names(folders))]


def write_report(runs: Sequence[Run], to: Path) -> Path:
    """Writes report.html into the directory `to`, and the figures it shows into to/figures; returns its path. Several
    runs are compared with the last one."""
    figures = draw_figures(runs, to / "figures")
    path = to / "report.html"
    path.write_text(page(" / ".join(run.name for run in runs), _sections(runs, figures)), encoding="utf-8")
    return path


def draw_figures(runs: Sequence[Run], to: Path) -> dict[str, Path]:
    """Draws the figures that the runs have data for as PNG files in `to`: name -> path."""
    train = {run.name: run.train for run in runs}
    boundaries = stage_boundaries(runs)
    figures = {
        name: to / f"report_{name}.png" for name in ("loss", "trailing_loss", "held_out", "position", "route", "speed")
    }
    for path in figures.values():  # of an earlier report, of other runs
        path.unlink(missing_ok=True)
    plot_losses(train, figures["loss"], boundaries)
    if all(np.isfinite(column(run.train, "trailing_loss")).any() for run in runs):
        title = "Trailing training loss (last bucket of full-length documents or windows)"
        plot_losses(train, figures["trailing_loss"], boundaries, "trailing_loss", title)
    evaluations = {run.name: run.evaluations for run in runs if run.evaluations}
    if evaluations:
        plot_held_out(evaluations, figures["held_out"], boundaries)
    curves = {run.name: run.held_out for run in runs if run.held_out is not None}
    if curves:
        plot_positions(curves, figures["position"])
    routed = {name: records for name, records in evaluations.items() if any("route/captured" in r for r in records)}
    if routed:
        plot_routing_history(routed, figures["route"], boundaries)
    plot_speed(train, figures["speed"], boundaries)
    return {name: path for name, path in figures.items() if path.is_file()}


def stage_boundaries(runs: Sequence[Run]) -> list[tuple[int, str]]:
    """(tokens, name) of each stage's start; with its run's name where the runs' stages differ."""
    own = [[(stage["tokens"], stage["stage"]) for stage in run.stages] for run in runs]
    if all(stages == own[0] for stages in own):
        return own[0]
    return [(tokens, f"{run.name}: {name}") for run, stages in zip(runs, own) for tokens, name in stages if tokens > 0]


# ---------------------------------------------------------------------------------------------------------- the page


def _sections(runs: Sequence[Run], figures: Mapping[str, Path]) -> list[tuple[str, str]]:
    def show(*names: str) -> str:
        return "\n".join(image(figures[name]) for name in names if name in figures)

    convention = next((run.device["convention"] for run in runs if "convention" in run.device), "")
    results = {name: _results(runs, one) for name, one in EVALS.items() if one.page is not None}
    routing = show("route") + results.pop("routing")
    return [
        ("Runs", _runs(runs)),
        ("Loss over tokens", show("loss", "trailing_loss", "held_out")),
        ("Loss by position", show("position") + _paired(runs)),
        *((EVALS[name].heading, found) for name, found in results.items()),
        (EVALS["routing"].heading, routing),
        ("Stages", _stages(runs)),
        ("Speed and memory", show("speed") + note(f"{convention} {_eval_cost(runs)}")),
        ("Plans", "\n".join(folded(run.name, run.plan) for run in runs if run.plan)),
    ]


def _runs(runs: Sequence[Run]) -> str:
    text = (
        f"Losses in nats per token. At the end: mean over the last {END_SHARE:.0%} of the tokens. Held-out: the newest "
        "evaluation; trailing: last bucket of documents of full length, +- a 95 % interval, documents as clusters. "
        f"Commit of this report: {commit() or 'unknown'}."
    )
    return table(_RUN_COLUMNS, [_run_row(run) for run in runs]) + note(text)


def _stages(runs: Sequence[Run]) -> str:
    rows = [row for run in runs for row in _stage_rows(run)]
    return table(_STAGE_COLUMNS, rows) + note("Attended: share of the causal (query, key) pairs.")


def _paired(runs: Sequence[Run]) -> str:
    """A table of each run minus the last one, on the documents both were evaluated on."""
    measured = [(run, run.held_out) for run in runs if run.held_out is not None]
    if len(measured) < 2:
        return ""
    *others, (reference, reference_held_out) = measured
    rows = []
    for run, held_out in others:
        try:
            found = difference(held_out, reference_held_out)
        except ValueError as error:
            rows.append((f"{run.name} - {reference.name}", str(error)))
            continue
        first, last = (
            f"{found.by_bucket.mean[b]:+.4f} +- {found.interval()[b]:.4f}" for b in (0, len(found.edges) - 2)
        )
        how = f"{found.num_documents} documents in common" if found.paired else "other documents, errors added"
        gap = abs(float(found.by_bucket.mean[-1]))
        needed = found.summary(gap)["needed_for_80_percent_power"][-1] if gap else None
        rows.append((f"{run.name} - {reference.name}", first, last, how, str(needed or "")))
    columns = ("difference", "first bucket", "last bucket", "measured on", "documents to see the last with 80 % power")
    return table(columns, rows) + note("95 % intervals over documents; another seed of training would move them too.")


def _results(runs: Sequence[Run], one: Eval) -> str:
    """The results of an eval in the runs' evals/ folders, as HTML."""
    assert one.page is not None
    parts = []
    for run in runs:
        for path in run.results[one.name]:
            record = _result(path)
            what = f"{run.name} at {format_count(record['tokens'])} tokens, {record['attention']}"
            origin = f"{path.name}: commit {record['commit'] or 'unknown'}, {record['device']}, {record['date']}"
            try:
                shown = one.page(record, path)
            except (KeyError, TypeError, IndexError, ValueError) as error:
                raise ReportError(f"{path} is no result of {one.name} ({first_line(error)}). {REMEDY}") from error
            parts.append(f"<h3>{html.escape(what)}</h3>\n{shown}\n{note(origin)}")
    return "\n".join(parts)


@dataclass(frozen=True)
class _Provenance:
    """The fields of every result that a report reads (evals/results.py)."""

    tokens: Count
    attention: str
    device: str
    date: str
    commit: str | None = None


def _result(path: Path) -> dict[str, Any]:
    """A result's .json. ReportError if it is invalid."""
    text = read_text(path, error=ReportError, remedy=REMEDY)
    return parse_object(text, _Provenance, where=path, error=ReportError, remedy=REMEDY)


def _eval_cost(runs: Sequence[Run]) -> str:
    """Time of the evaluations during training."""
    parts = []
    for run in runs:
        seconds = [record["seconds"] for record in run.evaluations if record.get("seconds") is not None]
        if seconds:
            share = sum(seconds) / max(run.train[-1].get("wall_seconds", 0.0), 1e-9)
            parts.append(f"{run.name}: {len(seconds)} evaluations took {sum(seconds):.0f} s, {share:.1%} of the run.")
    return " ".join(parts)


_RUN_COLUMNS = (
    "run",
    "tokens",
    "time",
    "loss at the end",
    "held-out loss",
    "held-out trailing",
    "device",
    "skipped steps",
)


def _run_row(run: Run) -> tuple[str, ...]:
    last = run.train[-1]
    held_out = run.evaluations[-1] if run.evaluations else {}
    error = held_out.get("trailing_se")
    freedom = held_out.get("trailing_freedom") or held_out.get("documents", 0) - 1
    width = math.nan if error is None else float(half_width(error, freedom))
    spread = f" +- {width:.3f}" if math.isfinite(width) else ""
    count = run.device.get("num_devices", 1)
    return (
        run.name,
        format_count(last["tokens"]),
        clock(last.get("wall_seconds", 0.0)),
        _number(_at_end(run.train, "loss"), ".3f"),
        _number(held_out.get("loss"), ".3f"),
        _number(held_out.get("trailing_loss"), ".3f") + spread,
        f"{count} x {run.device.get('device', 'unknown')}",
        str(last.get("skipped_steps", 0)),
    )


_STAGE_COLUMNS = (
    "stage",
    "tokens",
    "length",
    "attention",
    "attended",
    "loss at its end",
    "tokens/s",
    "TFLOP/s",
    "MFU",
    "MFU dense-equivalent",
    "peak GiB",
)


def _stage_rows(run: Run) -> list[tuple[str, ...]]:
    rows = []
    for stage in run.stages:
        train = [record for record in run.train if record.get("stage") == stage["stage"]]
        if train:
            rows.append(_stage_row(f"{run.name}: {stage['stage']}", stage, train))
    return rows


def _stage_row(name: str, stage: Mapping[str, Any], train: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    mean = {key: _by_time(train, key) for key in ("tokens_per_second", "tflops", "mfu", "mfu_dense_equivalent")}
    peak = column(train, "peak_memory_gib")
    return (
        name,
        format_count(train[-1]["tokens"] - stage["tokens"]),
        format_length(stage["seq_len"]),
        stage["attention"],
        _number(_by_time(train, "attended_share"), ".1%"),
        _number(_at_end(train, "loss"), ".3f"),
        format_count(mean["tokens_per_second"]) if mean["tokens_per_second"] is not None else "",
        _number(mean["tflops"], ".3g"),
        _number(mean["mfu"], ".1%"),
        _number(mean["mfu_dense_equivalent"], ".1%"),
        _number(float(np.nanmax(peak)) if np.isfinite(peak).any() else None, ".1f"),
    )


def _at_end(records: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """The mean of a column over the last END_SHARE of these records."""
    values = column(records[-max(1, round(END_SHARE * len(records))) :], name)
    return float(np.nanmean(values)) if np.isfinite(values).any() else None


def _by_time(records: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """The time-weighted mean of a speed, without its first interval (start-up) if there are more."""
    records = records[1:] or records
    values, seconds = column(records, name), column(records, "seconds")
    known = np.isfinite(values) & np.isfinite(seconds)
    return float(np.average(values[known], weights=seconds[known])) if known.any() else None


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
