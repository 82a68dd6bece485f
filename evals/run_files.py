"""Reads run directories, for comparisons: records, plan, evaluations and results."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.files import Count, read_json, read_text
from evals.position_loss import Evaluation, load_evaluation
from evals.table import EVALS
from train.record.metrics import FILE_NAME, read_metrics


class ReportError(ValueError):
    """A directory that no report can be made from; the message says what is missing."""


REMEDY = "Remove it, or evaluate again"


@dataclass(frozen=True)
class _Evaluated:
    """The field of an evaluation's .json that says how new it is."""

    tokens: Count = 0


@dataclass(frozen=True)
class Run:
    """The contents of a run directory."""

    name: str
    """Short, and unique within the report."""
    folder: Path
    device: Mapping[str, Any]
    """The newest `run` record."""
    stages: list[dict[str, Any]]
    train: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    held_out: Evaluation | None
    """The newest evaluation."""
    plan: str
    """The plan printed at the start; empty if it was not kept."""
    results: dict[str, list[Path]]
    """Name of an eval with a page -> its .json files of the newest checkpoint."""


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
    evaluations = {record["tokens"]: record for record in kinds["eval"]}  # a repeated one counts once
    return Run(
        name=name or folder.resolve().name,
        folder=folder,
        device=kinds["run"][-1] if kinds["run"] else {},
        stages=kinds["stage"],
        train=kinds["train"],
        evaluations=list(evaluations.values()),
        held_out=newest_evaluation(folder / "position_loss"),
        plan=read_text(folder / "plan.txt", error=ReportError) if (folder / "plan.txt").is_file() else "",
        results={name: newest_results(folder / "evals", name) for name, one in EVALS.items() if one.page is not None},
    )


def newest_evaluation(folder: Path) -> Evaluation | None:
    """The held-out evaluation of most tokens: an .npz with a .json is an evaluation, others are training losses."""
    found = []
    for path in folder.glob("*.npz"):
        beside = path.with_suffix(".json")
        if beside.exists():
            found.append((read_json(beside, _Evaluated, error=ReportError, remedy=REMEDY).tokens, path))
    try:
        return load_evaluation(max(found)[1]) if found else None
    except ValueError as error:
        raise ReportError(f"{error}. {REMEDY}") from error


def newest_results(folder: Path, name: str) -> list[Path]:
    """The results `<name>_<tokens>_....json` of most tokens, by name."""
    paths = sorted(folder.glob(f"{name}_*.json"))
    found = [(match[1], path) for path in paths if (match := re.match(rf"{name}_(\d{{15}})_", path.name))]
    return [path for at, path in found if at == max(found)[0]]


def unique_names(folders: Sequence[Path]) -> list[str]:
    """The shortest endings of the paths that tell them apart: the folder's name, else with its parents."""
    parts = [path.resolve().parts for path in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-length:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    raise ReportError("the same run directory was given twice")
