"""A training run with torch's profiler over some of its steps on rank 0, for step_profile.py and scaling.py:

    torchrun benchmarks/profiled_train.py <window>[,<window>...] run.dir=<folder> <more overrides>

A window is <file>:<activities>:<first>:<last>: between the ends of steps `first` and `last` the profiler runs, and the
trace goes to <file>. `device` takes kernels alone, which disturbs nothing; `both` takes the host's operators too, which
says where each kernel came from, at the price of a slower host. Without a GPU both are the host's operators.

The trainer is that of launch/train.py, built in this process without evaluations, and observed by its own metrics: a
step's line comes when the next step's first micro-batch is launched. A window begins and ends there, once the device
has done it.
`<run.dir>/start_seconds` says how long it took from the start of the process to the first step. After the last window
a run of one process ends without saving; of several, it trains on until it is stopped.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [str(ROOT)] + [p for p in sys.path if Path(p or ".").resolve() != ROOT / "benchmarks"]

from train.engine.world import World, init_world, launch_environment  # noqa: E402 - first: decides what torch reads

# isort: split
import psutil  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from conf.trajectory import to_dict  # noqa: E402
from data.sources import open_sources  # noqa: E402
from data.tokenizer import load_tokenizer  # noqa: E402
from launch.config import detect_hardware, load  # noqa: E402
from train.engine import collectives  # noqa: E402
from train.engine.signals import PreemptionFlag  # noqa: E402
from train.loop import Observers, Trainer  # noqa: E402
from train.model.sizes import embedding_rows  # noqa: E402
from train.plan.automatic import settle  # noqa: E402
from train.schedule import build_schedule  # noqa: E402

START_FILE = "start_seconds"
Recorder = Callable[[World, Path], Callable[[dict[str, Any]], None]]


@dataclass(frozen=True)
class Window:
    """Steps that are profiled, and the file that the trace goes to."""

    path: Path
    with_host: bool
    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> Window:
        """The window that is written <file>:device|both:<first>:<last>."""
        path, activities, first, last = text.rsplit(":", 3)
        assert activities in ("device", "both"), text
        return cls(Path(path), activities == "both", int(first), int(last))

    def profiler(self, on_gpu: bool) -> profile:
        """The profiler of this window, not started."""
        device = [ProfilerActivity.CUDA] if on_gpu else []
        return profile(activities=device + [ProfilerActivity.CPU] * (self.with_host or not on_gpu))


class Profiles:
    """An observer of a run's metrics: a trace of each window, in order of their steps."""

    def __init__(self, windows: Sequence[Window], run_dir: Path, on_gpu: bool, ends: bool) -> None:
        """`ends`: whether the process ends after the last window."""
        self._windows, self._run_dir, self._on_gpu, self._ends = list(windows), run_dir, on_gpu, ends
        self._running: profile | None = None
        self._steps = 0

    def __call__(self, record: dict[str, Any]) -> None:
        """Gets a line of metrics.jsonl."""
        if record["kind"] == "run":
            seconds = time.time() - psutil.Process().create_time()
            (self._run_dir / START_FILE).write_text(f"{seconds:.2f}\n", encoding="utf-8")
        if record["kind"] != "train" or not self._windows:
            return
        self._steps += 1
        window = self._windows[0]
        if self._on_gpu and self._steps >= (window.first if self._running is None else window.last):
            torch.cuda.synchronize()
        if self._running is not None and self._steps >= window.last:
            self._write(window)
            self._windows.pop(0)
        if self._windows and self._running is None and self._steps >= self._windows[0].first:
            self._running = self._windows[0].profiler(self._on_gpu)
            self._running.start()

    def _write(self, window: Window) -> None:
        profiler, self._running = self._running, None
        assert profiler is not None
        profiler.stop()
        beside = window.path.with_name(f"unfinished_{window.path.name}")
        profiler.export_chrome_trace(str(beside))
        beside.replace(window.path)
        if self._ends and window is self._windows[-1]:
            sys.stdout.flush()
            os._exit(0)  # the usual way out would save, or wait for what is left of the process group


def build_trainer(
    overrides: Sequence[str], record: Recorder | None = None, trainer: type[Trainer] = Trainer
) -> Trainer:
    """The trainer of launch/train.py in this process, without evaluations; record(world, run directory), if given,
    makes what gets the lines of its metrics."""
    launched = launch_environment()
    hardware = detect_hardware(launched.world_size, launched.local_world_size)
    config = load([*overrides], hardware)
    tokenizer = load_tokenizer(config.data.tokenizer)
    world = init_world(config.run.device, config.parallel.sequence)
    run_dir = config.run.folder
    run_dir.mkdir(parents=True, exist_ok=True)
    sources = open_sources(config.data, rank_zero=world.is_main, barrier=collectives.barrier)
    config_yaml = yaml.safe_dump(to_dict(config), sort_keys=False)
    observers = Observers(record=[record(world, run_dir)] if record is not None else [])
    settled = settle(config, embedding_rows(config.model, tokenizer.vocab_size), hardware).config
    return trainer(settled, build_schedule(settled), sources, tokenizer, world, observers, config_yaml=config_yaml)


class _Unsaved(Trainer):
    """Saves nothing at the ends of stages either."""

    def _save(self, *_: Any, **__: Any) -> None:
        pass


def main(windows: str, *overrides: str) -> None:
    """Trains; see the module's text."""
    parsed = [Window.parse(text) for text in windows.split(",")]

    def record(world: World, run_dir: Path) -> Profiles:
        return Profiles(parsed, run_dir, world.device.type == "cuda", ends=world.world_size == 1)

    # Without the host memory that saves in the background would take.
    build_trainer([*overrides, "checkpoint.asynchronous=false"], record, _Unsaved).fit(PreemptionFlag())


if __name__ == "__main__":
    main(*sys.argv[1:])
