"""What the studies share: runs of launch/train.py and launch/evaluate.py, one process each, that are not made twice.

Small models leave a large GPU idle between their launches: several runs at a time (`jobs`) fill it. What a run says
then goes to <run>.log beside it.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from evals.results import commit  # noqa: E402
from launch.config import load  # noqa: E402
from train.record.metrics import FILE_NAME  # noqa: E402

SPEEDS = ("tokens_per_second", "tflops", "mfu", "mfu_dense_equivalent", "attended_share")


def check_equal_tokens(recipes: Mapping[str, Sequence[str]]) -> None:
    """ValueError unless these overrides all train on as many tokens: stages are rounded up to whole steps."""
    tokens = {name: load(list(overrides)).schedule.tokens for name, overrides in recipes.items()}
    if len(set(tokens.values())) > 1:
        budgets = ", ".join(f"{name} {count:,}" for name, count in tokens.items())
        raise ValueError(f"not equal tokens: {budgets}; choose schedule.tokens so that 90 % and 10 % are whole steps")


Task, Result = TypeVar("Task"), TypeVar("Result")


def run_all(function: Callable[[Task], Result], tasks: Iterable[Task], jobs: int) -> list[Result]:
    """function(task) of each task, in their order, `jobs` at a time; those not begun are dropped when one fails."""
    pool = ThreadPoolExecutor(jobs)
    try:
        return list(pool.map(function, tasks))
    finally:
        pool.shutdown(cancel_futures=True)


def train(folder: Path, overrides: Sequence[str], seed: int, *, log: bool = False) -> Path:
    """The run directory, once launch/train.py has finished there with these overrides; it goes on with a run that was
    interrupted, and sees by itself that one is finished. `log`: what it says goes to <folder>.log."""
    _launch("train.py", [*overrides, f"run.dir={folder}", f"run.seed={seed}"], folder, log)
    return folder


def evaluate(run: Path, name: str, *arguments: str, log: bool = False) -> Path:
    """The .json that launch/evaluate.py writes for one eval of a run, made if it is not there."""
    found = sorted((run / "evals" / name).glob("*.json"))
    if not found:
        to = run / "evals" / name
        _launch("evaluate.py", [f"run={run}", f"evals=[{name}]", *arguments, f"to={to}"], run, log)
        found = sorted(to.glob("*.json"))
    return found[0]


def _launch(script: str, arguments: Sequence[str], run: Path, log: bool) -> None:
    """Runs a script of launch/ to its end. ValueError if it fails, with the last of what it said where that went to a
    file."""
    print(f"== {run.name}: {script}", flush=True)
    began, path = time.monotonic(), run.with_name(f"{run.name}.log")
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "launch" / script), *arguments]
    if log:
        with path.open("ab") as file:
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
        tail = "\n".join(["", *path.read_text(errors="replace").splitlines()[-5:]])
    else:
        code, tail = subprocess.run(command).returncode, ""
    if code != 0:
        raise ValueError(f"{run.name}: {script} failed with exit status {code}{tail}")
    if log:
        print(f"   {run.name}: {script} done, {time.monotonic() - began:.0f} s", flush=True)


def origin(arguments: Sequence[str], label: str | None) -> dict[str, str | None]:
    """What the results of a study carry: the commit (`label`, or that of this checkout), and the command without paths
    of this machine."""
    kept = [a for a in arguments if not a.startswith(("to=", "runs=", "work=", "data.cache_dir=", "commit="))]
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *kept])
    return {"commit": label or commit(), "command": command}


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(overrides for the runs, own arguments): overrides have a dot or a plus in the key, or choose a group."""
    groups = ("model", "data", "optim", "deepspeed", "logging")
    is_override = [a.startswith("+") or "." in (key := a.partition("=")[0]) or key in groups for a in arguments]
    return (
        [a for a, own in zip(arguments, is_override) if own],
        [a for a, own in zip(arguments, is_override) if not own],
    )


def steps_logged(run_dir: Path) -> int:
    """Lines of steps in a run's metrics so far (where every step is logged, as by default)."""
    path = run_dir / FILE_NAME
    return path.read_bytes().count(b'"kind": "train"') if path.exists() else 0


def speeds(train: Sequence[Mapping]) -> dict[str, float | None]:
    """Of `train` records: the medians of what they say of speed, None where they do not know it, and rank 0's peak of
    memory so far."""
    medians = {key: statistics.median(r[key] for r in train) if train[0][key] is not None else None for key in SPEEDS}
    return {**medians, "peak_memory_gib": max((r["peak_memory_gib"] or 0) for r in train) or None}


def read_json(path: Path) -> dict:
    """The record in a result file."""
    return json.loads(path.read_text(encoding="utf-8"))
