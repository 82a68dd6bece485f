"""Puts runs side by side in one HTML file that needs nothing else: tables, figures, and the conventions behind them.

Everything is read from the run directories (metrics.jsonl and position_loss/), so that a report can be made on any
machine they were copied to, during a run as well as after it.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conf.numbers import format_count, format_length
from evals.comparison import column, plot_losses, plot_positions, plot_speed
from evals.position_loss import Evaluation, load_evaluation
from evals.statistics import half_width
from train.metrics import FILE_NAME, read_metrics
from train.progress import clock

END_SHARE = 0.05  # "at the end" is the mean over this part of a run's or a stage's tokens


class ReportError(ValueError):
    """A directory that no report can be made from; the message says what is missing."""


@dataclass(frozen=True)
class Run:
    """What a run directory says."""

    name: str
    """Short, and unlike the names of the other runs of the report."""
    folder: Path
    device: Mapping[str, Any]
    """The newest `run` record."""
    stages: list[dict[str, Any]]
    train: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    held_out: Evaluation | None
    """The newest evaluation."""


def read_run(folder: Path | str, name: str | None = None) -> Run:
    """The run in `folder`. ReportError if there is none, it has not logged anything yet, or its log is damaged."""
    folder = Path(folder)
    path = folder / FILE_NAME
    if not path.is_file():
        what = "has no metrics.jsonl" if folder.is_dir() else "is not a directory"
        raise ReportError(f"{folder} {what}; give run directories, such as runs/quickstart")
    try:
        records = read_metrics(path)
    except ValueError as error:
        raise ReportError(str(error)) from error
    kinds: dict[str, list[dict[str, Any]]] = {kind: [] for kind in ("run", "stage", "train", "eval")}
    for record in records:
        kinds.setdefault(record["kind"], []).append(record)
    if not kinds["train"]:
        raise ReportError(f"{path} has no train line yet; wait for the run's first log interval")
    evaluations = {record["tokens"]: record for record in kinds["eval"]}  # one that was repeated counts once
    return Run(
        name=name or folder.resolve().name,
        folder=folder,
        device=kinds["run"][-1] if kinds["run"] else {},
        stages=kinds["stage"],
        train=kinds["train"],
        evaluations=list(evaluations.values()),
        held_out=newest_evaluation(folder / "position_loss"),
    )


def newest_evaluation(folder: Path) -> Evaluation | None:
    """The held-out evaluation of most tokens: those with a .json beside them are evaluations, the others training
    losses."""
    found = []
    for path in folder.glob("*.npz"):
        beside = path.with_suffix(".json")
        if beside.exists():
            found.append((json.loads(beside.read_text(encoding="utf-8")).get("tokens", 0), path))
    return load_evaluation(max(found)[1]) if found else None


def unique_names(folders: Sequence[Path]) -> list[str]:
    """The shortest endings of the paths that tell them apart: the folder's name, else with its parents."""
    parts = [path.resolve().parts for path in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-length:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    raise ReportError("the same run directory was given twice")


def write_report(folders: Sequence[Path | str], to: Path | str) -> Path:
    """Writes report.html into `to` (made if missing), and the figures it shows into to/figures; returns its path.

    Several runs are compared with the last one. ReportError for what is missing, before anything is written.
    """
    folders = [Path(folder) for folder in folders]
    runs = [read_run(folder, name) for folder, name in zip(folders, unique_names(folders))]
    to = Path(to)
    figures = draw_figures(runs, to / "figures")
    path = to / "report.html"
    path.write_text(_page(runs, figures), encoding="utf-8")
    return path


def draw_figures(runs: Sequence[Run], to: Path) -> list[Path]:
    """Draws what the runs have data for as PNG files in `to`; returns their paths in the order of the report."""
    train = {run.name: run.train for run in runs}
    boundaries = stage_boundaries(runs)
    figures = [to / "report_loss.png"]
    plot_losses(train, figures[-1], boundaries)
    if all(np.isfinite(column(run.train, "trailing_loss")).any() for run in runs):
        figures.append(to / "report_trailing_loss.png")
        title = "Trailing training loss (last bucket of full-length documents or windows)"
        plot_losses(train, figures[-1], boundaries, "trailing_loss", title)
    curves = {run.name: run.held_out for run in runs if run.held_out is not None}
    if curves:
        figures.append(to / "report_position.png")
        plot_positions(curves, figures[-1])
    figures.append(to / "report_speed.png")
    plot_speed(train, figures[-1], boundaries)
    return figures


def stage_boundaries(runs: Sequence[Run]) -> list[tuple[int, str]]:
    """(tokens, name) of each stage that begins; with its run's name where the runs' stages differ."""
    own = [[(stage["tokens"], stage["stage"]) for stage in run.stages] for run in runs]
    if all(stages == own[0] for stages in own):
        return own[0]
    return [(tokens, f"{run.name}: {name}") for run, stages in zip(runs, own) for tokens, name in stages if tokens > 0]


# ---------------------------------------------------------------------------------------------------------- the page

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 14px; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: right; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child, td.text { text-align: left; }
img { max-width: 100%; display: block; margin: 1rem 0; }
.note { color: #555; font-size: 13px; }
"""


def _page(runs: Sequence[Run], figures: Sequence[Path]) -> str:
    title = html.escape(" / ".join(run.name for run in runs))
    images = "\n".join(_image(path) for path in figures)
    convention = next((run.device["convention"] for run in runs if "convention" in run.device), "")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style></head><body>
<h1>{title}</h1>
{_table(_RUN_COLUMNS, [_run_row(run) for run in runs])}
<p class="note">Losses are nats a token. At the end: mean over the last {END_SHARE:.0%} of the tokens. Held-out: the
newest evaluation; trailing: last bucket of documents of full length, +- a 95 % interval, documents as clusters.</p>
<h2>Stages</h2>
{_table(_STAGE_COLUMNS, [row for run in runs for row in _stage_rows(run)])}
<p class="note">Attended: share of the causal (query, key) pairs. {html.escape(convention)}</p>
{images}
</body></html>
"""


def _image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}">'


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    body = "\n".join(
        "<tr>" + "".join(f"<td{_kind(cell)}>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


def _kind(cell: str) -> str:
    """Numbers to the right, words to the left."""
    return "" if re.match(r"[-+]?[\d.]|$", cell) else ' class="text"'


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
    spread = f" +- {half_width(error, held_out['documents']):.3f}" if error is not None else ""
    count = run.device.get("num_devices", 1)
    return (
        run.name,
        format_count(last["tokens"]),
        clock(last["wall_seconds"]),
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
        train = [record for record in run.train if record["stage"] == stage["stage"]]
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
    """The mean of a rate over the time it was measured in, its first interval (start-up) left out if there are more."""
    records = records[1:] or records
    values, seconds = column(records, name), column(records, "seconds")
    known = np.isfinite(values) & np.isfinite(seconds)
    return float(np.average(values[known], weights=seconds[known])) if known.any() else None


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
