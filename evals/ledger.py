"""Finished parts of a long evaluation, kept in files so that an interrupted one resumes; and its remaining time.

The files are named by a hash of the settings that the parts depend on, which are in the first line. Every process
writes its own file, one JSON line per part, and reads all of them at its start.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from typing import Any

from evals.protocol import Job
from evals.results import commit
from train.record.progress import clock

FOLDER = "parts"
SAY_SECONDS = 15.0


class Ledger:
    """The results of finished parts, by key."""

    def __init__(self, job: Job, name: str, settings: Mapping[str, Any]):
        """`settings`: what the parts depend on, as JSON values, beside the model, its attention and this code."""
        trained, checkpoint = job.trained, job.trained.checkpoint.resolve()
        origin = {
            "checkpoint": str(checkpoint),
            # The weights there may have been replaced.
            "written": max((file.stat().st_mtime_ns for file in checkpoint.iterdir() if file.is_file()), default=0),
            "tokens": trained.tokens,
            "attention": [repr(spec) for spec in job.context.model.attention],
            "device": trained.device.type,
            "commit": commit(),
        }
        first = json.dumps({"eval": name, **origin, **settings}, sort_keys=True)
        stem = f"{name}_{hashlib.sha256(first.encode()).hexdigest()[:12]}"
        folder = job.folder / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{stem}_{job.context.rank}.jsonl"
        self._known: dict[tuple, Any] = {}
        for path in sorted(folder.glob(f"{stem}_*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines()[1:]:
                try:
                    key, value = json.loads(line)
                    self._known[tuple(key)] = value
                except (ValueError, TypeError):  # cut off in the middle, or empty: measured again
                    continue
        if self.path.is_file():
            self._append("\n")  # the last line may have been cut off
        else:
            self._append(first + "\n")

    def __contains__(self, key: tuple) -> bool:
        return key in self._known

    def __getitem__(self, key: tuple) -> Any:
        return self._known[key]

    def put(self, found: Mapping[tuple, Any]) -> None:
        """Adds finished parts; they are on disk when it returns."""
        self._known |= found
        self._append("".join(json.dumps([key, value]) + "\n" for key, value in found.items()))

    def _append(self, text: str) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(text)


class Countdown:
    """Reports progress and remaining time now and then."""

    def __init__(self, job: Job, name: str, work: Mapping[str, float], unit: str):
        """`work`: of this process by kind, in tokens to be read, say; the kinds may differ in time per unit of work.
        `unit`: what `step` counts."""
        self.name = name
        self._job, self._unit = job, unit
        self._left, self._total = dict(work), sum(work.values())
        self._done, self._seconds = dict.fromkeys(work, 0.0), dict.fromkeys(work, 0.0)
        self._at = self._said = time.monotonic()
        self._count = 0

    def skip(self, work: float, kind: str = "") -> None:
        """Subtracts work that an earlier process did."""
        self._left[kind] -= work

    def step(self, work: float, count: int, kind: str = "") -> None:
        """Adds work of a kind done since the last step, `count` units."""
        now = time.monotonic()
        self._left[kind] -= work
        self._done[kind] += work
        self._seconds[kind] += now - self._at
        self._at = now
        self._count += count
        left = sum(self._left.values())
        if now - self._said >= SAY_SECONDS and left > 0:
            self._said = now
            said = f"{self.name}: {1 - left / self._total:.0%}, {self._count} {self._unit} so far"
            self._job.say(f"{said}, about {clock(self._seconds_left())} left")

    def _seconds_left(self) -> float:
        """At each kind's own speed, or that of all where none of it is done."""
        mean = sum(self._seconds.values()) / sum(self._done.values())
        rates = {kind: self._seconds[kind] / done if done else mean for kind, done in self._done.items()}
        return sum(max(0.0, left) * rates[kind] for kind, left in self._left.items())
