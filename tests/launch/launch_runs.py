"""Starts launch/train.py for tests: as a user does, or forked from a warm process and stopped at an exact moment.

Importing torch and DeepSpeed takes a process several seconds, so most runs are forked from a server that has imported
them (multiprocessing's forkserver, warm_train.py) and has done nothing else: no thread, no process group. What runs in
the fork is the script itself from its first line, with arguments, streams and exit status of its own, and `kill -9`
ends it as it ends any process.

Moments are changes of the run directory: a file opened for writing or flushed, a rename, a file or folder made or
removed, each seen by an audit hook right before it happens. An `Act` says at which one a signal is sent.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "train.py"
FORK_PATH = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
SECONDS = 240.0


@dataclass(frozen=True)
class Act:
    """Sends `signal` to the run's process right before the `count`-th change that contains `text`.

    A change reads "<event> <path in the run directory>$".
    """

    text: str
    count: int = 1
    signal: int = signal.SIGKILL


@dataclass
class Finished:
    """How a run ended."""

    code: int
    """Exit status; negative for a signal."""
    out: str
    err: str

    def __str__(self) -> str:
        return f"exit {self.code}\n{self.out[-3000:]}\n{self.err[-6000:]}"


@dataclass
class Forked:
    """A run that was started."""

    process: Any
    folder: Path

    def wait(self) -> Finished:
        """How the run ended; one that takes too long is killed, and the test fails."""
        self.process.join(SECONDS)
        late = self.process.exitcode is None
        if late:
            self.process.kill()
            self.process.join()
        ended = Finished(self.process.exitcode, *((self.folder / name).read_text() for name in ("out", "err")))
        assert not late, f"ran for more than {SECONDS} s\n{ended}"
        return ended


class Launcher:
    """Forks runs; the streams of each go to a folder of its own."""

    def __init__(self, folder: Path):
        self._folder, self._count = folder, 0
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["launch_runs", "warm_train"])

    def start(
        self,
        arguments: Sequence[str],
        *,
        act: Act | None = None,
        prepare: Callable[[], None] | None = None,
        environment: dict[str, str] | None = None,
    ) -> Forked:
        """Forks `python launch/train.py *arguments`. prepare(): called in the fork first; must pickle."""
        self._count += 1
        folder = self._folder / f"{self._count:03d}"
        folder.mkdir(parents=True)
        process = self._context.Process(target=_run, args=(list(arguments), folder, act, prepare, environment or {}))
        process.start()
        return Forked(process, folder)

    def run(self, arguments: Sequence[str], **options: Any) -> Finished:
        """How `python launch/train.py *arguments` ended."""
        return self.start(arguments, **options).wait()

    def run_ranks(self, arguments: Sequence[str], num_ranks: int, *, act: Act | None = None) -> list[Finished]:
        """How each rank of a run of several ended. They see the world as torchrun's workers do; `act` is rank 0's."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        started = []
        for rank in range(num_ranks):
            world = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            started.append(self.start(arguments, environment=world, act=None if rank else act))
        return [run.wait() for run in started]


def _run(arguments, folder, act, prepare, environment) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    os.environ.update(environment)
    if prepare is not None:
        prepare()
    if act is not None:
        run_dir = next(text.removeprefix("run.dir=") for text in arguments if text.startswith("run.dir="))
        sys.addaudithook(_watcher(run_dir, act))
    sys.argv = [str(SCRIPT), *arguments]
    runpy.run_path(str(SCRIPT), run_name="__main__")


def _watcher(run_dir: str, act: Act) -> Callable[[str, tuple], None]:
    seen = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal seen
        change = _change(event, args, run_dir)
        if change is not None and act.text in f"{change}$":
            seen += 1
            if seen == act.count:
                os.kill(os.getpid(), act.signal)

    return hook


def _change(event: str, args: tuple, run_dir: str) -> str | None:
    """ "<event> <path>" if an audit event announces a change of the run directory."""
    if event == "os.remove" and args[1] != -1:  # relative to a folder that shutil.rmtree is emptying
        return f"{event} {args[0]}"
    if event not in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"):
        return None
    path = os.fspath(args[0]) if isinstance(args[0], (str, os.PathLike)) else ""
    if path != run_dir and not path.startswith(run_dir + os.sep):
        return None
    if event == "open":
        _, mode, flags = args
        if mode is None:
            event = "flush"  # os.open: a file or folder that is about to be synchronised
        elif not flags & (os.O_WRONLY | os.O_RDWR):
            return None
    return f"{event} {path[len(run_dir) + 1 :]}"


def start_real(arguments: Sequence[str], cwd: Path, num_ranks: int | None = None) -> subprocess.Popen:
    """The command as a user starts it, from a folder of their own: plain python, or torchrun with `num_ranks`."""
    ours = ("PYTHONPATH", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in ours} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *arguments]
    if num_ranks is not None:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, env=environment, start_new_session=True, **pipes)


def finish_real(process: subprocess.Popen) -> Finished:
    """How it ended."""
    try:
        out, err = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return Finished(process.returncode, out, err)


def kill_real(process: subprocess.Popen, when: Callable[[], bool]) -> Finished:
    """How it ended, killed with all its processes once `when` is true (or by itself, before that)."""
    deadline = time.monotonic() + SECONDS
    while not when() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    return finish_real(process)
