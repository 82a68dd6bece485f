"""Logs a run for TensorBoard: `tensorboard --logdir runs/`. Enabled by logging.tensorboard=true.

tensorboardX writes the files; it needs neither TensorBoard nor TensorFlow. Steps are tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.record.dashboard import Sample

FOLDER = "tensorboard"


def open_tensorboard(
    run_dir: Path | str, *, config: Mapping[str, Any], tokens: int = 0, warn: Callable[[str], None] = print
) -> TensorBoard | None:
    """The sink that writes into run_dir/tensorboard; None, and a line that says why, without the package.

    config: shown as text. tokens: where the run starts or resumes; what an earlier start wrote beyond is hidden.
    """
    try:
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports] - an extra
    except ImportError:
        warn("TensorBoard is off: logging.tensorboard=true needs tensorboardX (pip install 'moba-train[tensorboard]')")
        return None
    folder = Path(run_dir) / FOLDER
    warn(f"TensorBoard: tensorboard --logdir {folder}")
    text = "\n".join(f"    {line}" for line in json.dumps(config, indent=1, default=str).splitlines())
    purge = tokens + 1 if tokens else None
    writer = SummaryWriter(str(folder), purge_step=purge, filename_suffix=f".{tokens}")
    writer.add_text("config", text, tokens)
    return TensorBoard(writer, warn)


class TensorBoard:
    """A train.record.dashboard.Sink. If the disk fails, that is reported once, and nothing is written from then on."""

    def __init__(self, writer: Any, warn: Callable[[str], None]) -> None:
        self._writer: Any = writer
        self._warn = warn

    def scalars(self, values: Mapping[str, float], tokens: int) -> None:
        """Adds a point to each series."""
        for name, value in values.items():
            self._try(lambda name=name, value=value: self._writer.add_scalar(name, value, tokens))

    def constants(self, values: Mapping[str, Any]) -> None:
        """Shows them as text."""
        for name, value in values.items():
            self._try(lambda name=name, value=value: self._writer.add_text(name, str(value)))

    def curve(self, name: str, title: str, positions: Sequence[float], losses: Sequence[float], tokens: int) -> None:
        """Nothing: TensorBoard charts are over steps only. The buckets' series and the pictures show it."""

    def image(self, name: str, path: Path | str, tokens: int, caption: str | None = None) -> None:
        """Shows a PNG."""

        def send() -> None:
            from PIL import Image

            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            self._writer.add_image(name, pixels, tokens, dataformats="HWC")

        self._try(send)

    def samples(self, samples: Sequence[Sample], tokens: int) -> None:
        """Shows texts."""
        for sample in samples:
            text = "\n\n".join(f"**{name}**: {value}" for name, value in sample._asdict().items())
            self._try(
                lambda sample=sample, text=text: self._writer.add_text(f"samples/{sample.document}", text, tokens)
            )

    def alert(self, title: str, text: str, *, severe: bool = False) -> None:
        """Shows it as text."""
        self._try(lambda: self._writer.add_text("alerts", f"{title}: {text}"))

    def finish(self, exit_code: int = 0) -> None:
        """Flushes and closes the files."""
        self._try(lambda: self._writer.close())
        self._writer = None

    def _try(self, action: Callable[[], Any]) -> None:
        if self._writer is None:
            return
        try:
            action()
        except (OSError, ValueError) as error:
            self._warn(f"TensorBoard is off from here on, training continues: {error}")
            self._writer = None
