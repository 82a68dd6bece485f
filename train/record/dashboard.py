"""Between a run and its dashboards: lines of metrics.jsonl and curves become named series, which every sink is given.

A sink is wandb (tracking.py) or TensorBoard (tensorboard.py). Only rank 0 makes a Dashboard.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from train.record import series
from train.record.position_loss import PositionCurve


class Sample(NamedTuple):
    """A sample generation."""

    document: str
    """Id of the held-out document."""
    prompt: str
    """The end of the prompt."""
    generated: str
    reference: str
    """How the document continues."""


class Sink(Protocol):
    """A dashboard. No method may raise, prompt or block for long."""

    def scalars(self, values: Mapping[str, float], tokens: int) -> None:
        """Adds a point to each series."""

    def constants(self, values: Mapping[str, Any]) -> None:
        """Sets constants, by <group>/<name>."""

    def curve(self, name: str, title: str, positions: Sequence[float], losses: Sequence[float], tokens: int) -> None:
        """Draws losses over context positions."""

    def image(self, name: str, path: Path | str, tokens: int, caption: str | None = None) -> None:
        """Shows a PNG."""

    def samples(self, samples: Sequence[Sample], tokens: int) -> None:
        """Shows texts."""

    def alert(self, title: str, text: str, *, severe: bool = False) -> None:
        """Sends an alert."""

    def finish(self, exit_code: int = 0) -> None:
        """Closes it."""


class Dashboard:
    """Names what a run measures, and hands it to every sink."""

    def __init__(
        self,
        sinks: Sequence[Sink],
        stages: Sequence[Any] = (),
        *,
        source_tokens: Mapping[str, int] | None = None,
        skipped_steps: int = 0,
    ) -> None:
        """stages: train.schedule.Stage, in order. source_tokens: size of each source, for epochs. skipped_steps: of
        earlier starts, for which no alert is sent again."""
        self._sinks, self._stages, self._skipped = list(sinks), list(stages), skipped_steps
        self._source_tokens = source_tokens or {}

    def record(
        self,
        record: Mapping[str, Any],
        *,
        routing: Mapping[int, Mapping[str, float]] | None = None,
        samples: Sequence[Sample] = (),
    ) -> None:
        """Shows a line of metrics.jsonl, and what was measured with it: the router's numbers by layer, texts."""
        tokens, constants = record["tokens"], series.constants(record)
        values = series.scalars(record, self._stages) | series.routing_by_layer(routing or {})
        if record["kind"] == "train":
            values |= series.epochs(tokens, self._stages, self._source_tokens)
        for sink in self._sinks:
            if constants:
                sink.constants(constants)
            if values:
                sink.scalars(values, tokens)
            if samples:
                sink.samples(samples, tokens)
        skipped = record.get("skipped_steps") or 0
        if skipped > self._skipped:
            self._alert(
                "Skipped steps",
                f"{skipped - self._skipped} step(s) up to {tokens:,} tokens had a non-finite loss or "
                f"gradient and were skipped; {skipped} in total",
            )
        self._skipped = max(self._skipped, skipped)

    def curve(self, name: str, curve: PositionCurve, tokens: int) -> None:
        """Shows a curve by context position: `eval`, a series per bucket besides, or `train/<stage>`."""
        centres = ((curve.edges[:-1] + curve.edges[1:]) / 2).tolist()
        values = series.buckets(curve) if name == "eval" else {}
        what = "Held-out" if name == "eval" else f"Training ({name.rpartition('/')[2]})"
        for sink in self._sinks:
            if values:
                sink.scalars(values, tokens)
            title = f"{what}: per-token loss by context position"
            sink.curve(f"position_loss/curve_{name.replace('/', '_')}", title, centres, curve.mean.tolist(), tokens)

    def image(self, name: str, path: Path | str, tokens: int, caption: str) -> None:
        """Shows a PNG under `position_loss/`."""
        for sink in self._sinks:
            sink.image(f"position_loss/{name}", path, tokens, caption)

    def failed(self, why: str) -> None:
        """Sends an alert: the run has ended with a loss that is not finite."""
        self._alert("Run ended: loss not finite", why, severe=True)

    def finish(self, exit_code: int = 0) -> None:
        """Closes every sink."""
        for sink in self._sinks:
            sink.finish(exit_code)

    def _alert(self, title: str, text: str, *, severe: bool = False) -> None:
        for sink in self._sinks:
            sink.alert(title, text, severe=severe)
