"""Console progress: a progress bar on a terminal, a plain line now and then everywhere else.

Log files and CI get about a line per tenth of the run, or per half a minute, so that they stay readable.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from tqdm import tqdm

from conf.numbers import format_count

PLAIN_SECONDS = 30.0


class Progress:
    """Shows `train` records of the metrics log. Make one on rank 0 and a disabled one elsewhere."""

    def __init__(
        self,
        total_tokens: int,
        *,
        tokens: int = 0,
        enabled: bool = True,
        bar: bool = True,
        stream: TextIO | None = None,
    ) -> None:
        """total_tokens: of the run; tokens: where it starts or continues. bar=False: plain lines on a terminal too."""
        self.total_tokens = total_tokens
        self._stream = stream or sys.stdout
        self._enabled = enabled
        self._tenth = 10 * tokens // total_tokens
        self._said_at = -PLAIN_SECONDS
        self._step_began: float | None = None
        self._heard_at: float | None = time.monotonic()
        self._bar: tqdm | None = None
        if enabled and bar and _is_screen(self._stream):
            self._bar = tqdm(
                total=total_tokens,
                initial=tokens,
                file=self._stream,
                dynamic_ncols=True,
                leave=False,
                bar_format="{percentage:3.0f}%|{bar}| {desc}",
            )

    def update(self, record: Mapping[str, Any]) -> None:
        """Shows a `train` record of the metrics log (also `eta_seconds`, if it has one)."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.n = record["tokens"]
            self._bar.set_description_str(describe(record), refresh=False)
            self._bar.refresh()
            return
        tenth = 10 * record["tokens"] // self.total_tokens
        now = time.monotonic()
        if tenth > self._tenth or now - self._said_at >= PLAIN_SECONDS:
            self._tenth, self._said_at = tenth, now
            share = record["tokens"] / self.total_tokens
            self._write(f"{share:4.0%} {format_count(record['tokens']):>6} tokens  {describe(record)}")

    def heartbeat(self, done: int, of: int) -> None:
        """Reports the progress of a step that takes long: `done` of its `of` micro-batches."""
        now = time.monotonic()
        if done == 1 or self._step_began is None:
            self._step_began = self._heard_at if self._heard_at is not None else now
        self._heard_at = now
        passed = now - self._step_began
        if not self._enabled or done == of or min(passed, now - self._said_at) < PLAIN_SECONDS:
            return
        self._said_at = now
        left = clock(passed / done * (of - done))
        self._write(f"micro-batch {done} of {of} of this step after {clock(passed)}, about {left} left")

    def say(self, line: str) -> None:
        """Prints a line of its own (a stage that begins, an evaluation, a checkpoint) without tearing the bar."""
        if self._enabled:
            self._write(line)

    def close(self) -> None:
        """Removes the bar; printed lines stay."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _write(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            print(line, file=self._stream, flush=True)


def _is_screen(stream: TextIO) -> bool:
    """True for a terminal whose size is known: tqdm draws nothing on one of zero lines (`script`, some containers)."""
    return stream.isatty() and os.get_terminal_size(stream.fileno()).lines > 0


def describe(record: Mapping[str, Any]) -> str:
    """A `train` record on one line, the most important first (a narrow terminal cuts the end); nulls are left out."""
    parts = [str(record["stage"])]
    if record.get("loss") is not None:
        parts.append(f"loss {record['loss']:.3f}")
    if record.get("trailing_loss") is not None:
        parts.append(f"trailing {record['trailing_loss']:.3f}")
    if record.get("eta_seconds") is not None:
        parts.append(f"ETA {clock(record['eta_seconds'])}")
    if record.get("tokens_per_second") is not None:
        parts.append(f"{format_count(record['tokens_per_second'])} tok/s")
    if record.get("mfu") is not None:
        parts.append(f"MFU {record['mfu']:.1%}")
    if record.get("tflops") is not None:
        parts.append(f"{record['tflops']:.3g} TFLOP/s")
    if record.get("skipped_steps"):
        parts.append(f"{record['skipped_steps']} skipped")
    return "  ".join(parts)


def clock(seconds: float) -> str:
    """A duration as a clock shows it: 0:42, 12:05, 3:10:00, 2d 3h."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d {hours % 24}h"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
