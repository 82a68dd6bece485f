"""Provenance of every result: code, checkpoint, attention, machine and time."""

from __future__ import annotations

import json
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from conf.trajectory import to_dict
from evals.loading import TrainedModel
from moba.kinds import AttentionSpec
from train.record.metrics import describe_plan

ROOT = Path(__file__).resolve().parents[1]


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """To a hundredth."""
        return round(time.monotonic() - self._began, 2)


def provenance(trained: TrainedModel, watch: Stopwatch, *, world_size: int = 1, seed: int | None = None) -> dict:
    """The provenance of a result as plain JSON values. `seed`: of the evaluation's random numbers, None if there are
    none."""
    return {
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "run": trained.config.run.name,
        "checkpoint": trained.checkpoint.name,
        "tokens": trained.tokens,
        "stage": trained.stage.name,
        "attention": describe_plan(trained.model.attention),
        "dense_up_to": dense_up_to(trained.model.attention),
        "seed": seed,
        "device": torch.cuda.get_device_name(trained.device) if trained.device.type == "cuda" else "cpu",
        "num_processes": world_size,
        "torch": torch.__version__,
        "seconds": watch.seconds,
        "config": to_dict(trained.config),
    }


def dense_up_to(plan: tuple[AttentionSpec, ...]) -> int | None:
    """B * k: the length up to which every layer's attention is full, or None if that is any length."""
    sizes = [spec.routing.block_size * spec.routing.top_k for spec in plan if spec.routing is not None]
    return min(sizes) if sizes else None


def commit() -> str | None:
    """The commit of this code, with "-dirty" appended if tracked files were changed; None outside a git checkout."""
    head = _git("rev-parse", "HEAD")
    if head is None or _git("rev-parse", "--show-toplevel") != str(ROOT):
        return None
    return head + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def write_json(path: Path, record: dict[str, Any]) -> Path:
    """Writes strict JSON (creating the folder) and returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path
