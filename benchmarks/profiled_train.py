"""launch/train.py with torch's profiler over some steps of rank 0, for benchmarks/scaling.py:

    torchrun benchmarks/profiled_train.py <trace.json> <first> <last> run.dir=<folder> <more overrides>

The trainer itself is not changed. A hook of torch's on every module counts the lines of metrics.jsonl each time the
model is called: at `first` lines the profiler starts, at `last` it stops and the trace is written. Both moments lie at
the beginning of a step, where the device is idle, because the log has just waited for it.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [str(ROOT)] + [p for p in sys.path if Path(p or ".").resolve() != ROOT / "benchmarks"]

from train.engine.world import launch_environment  # noqa: E402 - first: decides what torch reads

# isort: split
import torch  # noqa: E402
from torch.profiler import ProfilerActivity  # noqa: E402

from benchmarks.study import steps_logged  # noqa: E402
from train.model.decoder import Decoder  # noqa: E402


class Profile:
    """The hook: a trace of the steps between `first` and `last` lines of a run's metrics."""

    def __init__(self, run_dir: Path, trace: Path, first: int, last: int, activity: ProfilerActivity) -> None:
        self._run_dir, self._trace, self._first, self._last = run_dir, trace, first, last
        self._handle = torch.nn.modules.module.register_module_forward_pre_hook(self)
        self._profiler = torch.profiler.profile(activities=[activity])
        self._started = False

    def __call__(self, module: torch.nn.Module, inputs: Any) -> None:
        """Before each module's forward."""
        if not isinstance(module, Decoder):
            return
        steps = steps_logged(self._run_dir)
        if not self._started and steps >= self._first:
            self._profiler.start()
            self._started = True
        elif self._started and steps >= self._last:
            self._handle.remove()
            self._profiler.stop()
            beside = self._trace.with_name(f"unfinished_{self._trace.name}")
            self._profiler.export_chrome_trace(str(beside))
            beside.replace(self._trace)


def main(trace: str, first: str, last: str, *overrides: str) -> None:
    """Trains; see the module's text."""
    if launch_environment().rank == 0:
        run_dir = next(text.removeprefix("run.dir=") for text in overrides if text.startswith("run.dir="))
        # Kernels alone where there is a GPU: the host's operators would make the trace ten times as large, and slower.
        on_gpu = torch.cuda.is_available() and "run.device=cpu" not in overrides
        activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
        Profile(Path(run_dir), Path(trace), int(first), int(last), activity)
    script = ROOT / "launch" / "train.py"
    sys.argv = [str(script), *overrides]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
