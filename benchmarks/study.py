"""What the studies share: runs of launch/train.py and launch/evaluate.py, one process each, that are not made twice."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from evals.results import commit  # noqa: E402
from launch.config import load  # noqa: E402


def check_equal_tokens(recipes: Mapping[str, Sequence[str]]) -> None:
    """ValueError unless these overrides all train on as many tokens: stages are rounded up to whole steps."""
    tokens = {name: load(list(overrides)).schedule.tokens for name, overrides in recipes.items()}
    if len(set(tokens.values())) > 1:
        budgets = ", ".join(f"{name} {count:,}" for name, count in tokens.items())
        raise ValueError(f"not equal tokens: {budgets}; choose schedule.tokens so that 90 % and 10 % are whole steps")


def train(folder: Path, overrides: Sequence[str], seed: int) -> Path:
    """The run directory, once launch/train.py has finished there with these overrides; it goes on with a run that was
    interrupted, and sees by itself that one is finished."""
    command = [sys.executable, str(ROOT / "launch" / "train.py"), *overrides, f"run.dir={folder}", f"run.seed={seed}"]
    print(f"== {folder.name}", flush=True)
    subprocess.run(command, check=True)
    return folder


def evaluate(run: Path, name: str, *arguments: str) -> Path:
    """The .json that launch/evaluate.py writes for one eval of a run, made if it is not there."""
    found = sorted((run / "evals" / name).glob("*.json"))
    if not found:
        command = [sys.executable, str(ROOT / "launch" / "evaluate.py"), f"run={run}", f"evals=[{name}]"]
        subprocess.run([*command, *arguments, f"to={run / 'evals' / name}"], check=True)
        found = sorted((run / "evals" / name).glob("*.json"))
    return found[0]


def origin(arguments: Sequence[str]) -> dict[str, str | None]:
    """What the results of a study carry: the commit, and the command without paths of this machine."""
    kept = [a for a in arguments if not a.startswith(("to=", "runs=", "data.cache_dir="))]
    script = Path(sys.argv[0])
    return {"commit": commit(), "command": " ".join(["python", f"benchmarks/{script.name}", *kept])}


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(overrides for the runs, own arguments): overrides have a dot or a plus in the key, or choose a group."""
    groups = ("model", "data", "optim", "deepspeed", "logging")
    is_override = [a.startswith("+") or "." in (key := a.partition("=")[0]) or key in groups for a in arguments]
    return (
        [a for a, own in zip(arguments, is_override) if own],
        [a for a, own in zip(arguments, is_override) if not own],
    )


def read_json(path: Path) -> dict:
    """The record in a result file."""
    return json.loads(path.read_text(encoding="utf-8"))
