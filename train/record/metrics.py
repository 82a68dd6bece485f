"""The log of a run: metrics.jsonl, one strict JSON object per line, truncated exactly on resume.

`kind` says what a line is:
    run     device, number of devices and FLOP convention, each time the run is started
    stage   the stage that begins at `tokens`
    train   one log interval, which ends at `tokens`
    eval    one evaluation at `tokens`
    rollback  a return to the checkpoint at `tokens`, from a spike in the step that ended at `from_tokens`
Floats are written so that reading them back gives the same bits; non-finite numbers become null.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.files import Count, FileError, parse_json, parse_object
from conf.words import cut
from moba.kinds import AttentionSpec
from train.plan.describe import describe_layers

FILE_NAME = "metrics.jsonl"


class MetricsError(ValueError):
    """A metrics.jsonl that cannot be read; the message names the line."""


@dataclass(frozen=True)
class _Line:
    """What readers of a line rely on; there may be more. Numbers are null where they are not finite or not known."""

    kind: str
    tokens: Count
    wall_seconds: float = 0.0
    stage: str | None = None
    step: Count | None = None
    stage_index: Count | None = None
    documents: Count | None = None
    eval_seq_len: Count | None = None
    skipped_steps: Count | None = None
    spikes: Count | None = None
    from_tokens: Count | None = None
    num_devices: Count | None = None
    loss: float | None = None
    trailing_loss: float | None = None
    trailing_se: float | None = None
    trailing_freedom: float | None = None
    grad_norm: float | None = None
    lr: float | None = None
    tokens_per_second: float | None = None
    tflops: float | None = None
    mfu: float | None = None
    mfu_dense_equivalent: float | None = None
    peak_memory_gib: float | None = None
    save_wait_seconds: float | None = None
    save_write_seconds: float | None = None
    seconds: float | None = None
    eta_seconds: float | None = None
    convention: str | None = None


@dataclass(frozen=True)
class _StageLine:
    """Further columns of a stage's line."""

    stage: str
    seq_len: Count
    attention: str
    end: Count


class MetricsLog:
    """Appends lines to a metrics.jsonl; each survives a kill of the process once `write` has returned."""

    def __init__(self, path: Path | str | None) -> None:
        """`path`: the file, made by the first line; None (ranks other than 0) writes nothing and returns the same."""
        self.path = Path(path) if path is not None else None
        self._stages: set[str] = set()
        self._wall_before = 0.0
        self._began = time.monotonic()

    def cut_back(self, tokens: int, *, evaluated: bool = True, restarted: bool = True) -> None:
        """Removes what lies beyond the checkpoint at `tokens` that a run resumes from; 0 (no checkpoint) removes all.

        Not `evaluated`: the evaluation at `tokens` itself is removed too, since it will be repeated. Not `restarted`:
        the same process goes back, so its `rollback` lines at this checkpoint stay; a new process writes them again.
        Kept lines stay byte for byte; an incomplete last line is dropped. MetricsError names any other unreadable line,
        and then nothing was changed.
        """
        self._stages.clear()
        if restarted:
            self._wall_before = 0.0
        if self.path is None or not self.path.exists():
            return
        lines = list(_lines(self.path))
        last = {"eval": tokens if evaluated else tokens - 1, "rollback": tokens - 1 if restarted else tokens}
        kept = [
            (line, record)
            for line, record in lines
            if tokens > 0 and record["tokens"] <= last.get(record["kind"], tokens)
        ]
        for _, record in kept:
            if restarted:
                self._wall_before = record.get("wall_seconds", self._wall_before)
            if record["kind"] == "stage":
                self._stages.add(record["stage"])
        beside = self.path.with_name(self.path.name + ".tmp")
        with open(beside, "wb") as file:
            file.write(b"".join(line for line, _ in kept))
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, self.path)

    def write(self, kind: str, tokens: int, **values: Any) -> dict[str, Any]:
        """Appends one line and returns its record.

        tokens: trained on so far. values: plain Python, not tensors. `wall_seconds` is added: how long the run has been
        running, the time before a resume included.
        """
        wall = self._wall_before + time.monotonic() - self._began
        record = {"kind": kind, "tokens": tokens, **_strict(values), "wall_seconds": round(wall, 3)}
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")
        return record

    def stage(self, stage: Any) -> dict[str, Any] | None:
        """Writes the line of a train.schedule.Stage that begins; None if it is there already, as after a resume."""
        if stage.name in self._stages:
            return None
        self._stages.add(stage.name)
        return self.write("stage", stage.start, **stage_columns(stage), end=stage.end, batch_tokens=stage.batch_tokens)


def stage_columns(stage: Any) -> dict[str, Any]:
    """The columns that say which stage (train.schedule.Stage) a line belongs to."""
    return {
        "stage": stage.name,
        "stage_index": stage.index,
        "seq_len": stage.seq_len,
        "attention": describe_plan(stage.attention),
    }


def describe_plan(plan: Sequence[AttentionSpec]) -> str:
    """A plan in words: "moba 512x3", or, where layers differ, "moba 512x3 (layers 0-8), full (layers 9-11)"."""
    return str(plan[0]) if len(set(plan)) == 1 else describe_layers(tuple(plan))


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, in order, without an incomplete last line; MetricsError names another unreadable
    one."""
    return [record for _, record in _lines(Path(path))]


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each line's bytes, with its record."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise MetricsError(f"{path} cannot be read ({error.strerror})") from error
    for number, line in enumerate(lines, 1):
        try:
            record = _record(line)
        except FileError as error:
            if number < len(lines) or line.endswith(b"\n"):
                what = f"{path}, line {number}: not a line of metrics: {cut(repr(line)[1:], 80)} {error}"
                raise MetricsError(f"{what}; remove it to continue") from error
            return  # incomplete: the process was killed
        if line.endswith(b"\n"):
            yield line, record


def _record(line: bytes) -> dict[str, Any]:
    """A line's record. FileError if it is not a valid one."""
    record = parse_object(line, _Line, where="which")
    if record["kind"] == "stage":
        parse_json(line, _StageLine, where="which")
    return record


def _strict(value: Any) -> Any:
    """`value` with None in place of every float that is not finite: JSON cannot express them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return value
