"""Starts launch/train.py for tests: as a user does, or forked from a warm process and stopped at an exact moment.

Importing torch and DeepSpeed takes a process several seconds, so most runs are forked from a server that has imported
them (multiprocessing's forkserver, warm_train.py) and has done nothing else: no thread, no process group. What runs in
the fork is the script itself from its first line, with arguments, streams and exit status of its own, and `kill -9`
ends it as it ends any process.

Moments are changes of the run directory: a file opened for writing or flushed, a rename, a file or folder made or
removed, each seen by an audit hook right before it happens. An `Act` says at which one a signal is sent.

At the end of the file: what a run left behind, compared with another's.
"""

from __future__ import annotations

import hashlib
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

import numpy as np
from safetensors.numpy import load_file

from train.record.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "train.py"
FORK_PATH = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
SECONDS = 240.0

# The small run. Steps of 512 tokens up to the switch, then of 1024; checkpoints at 1536, 3072, 4096, 5120, 6144, 7168;
# evaluations at 2048, 4096, 6144, 7168.
SWITCH, END = 4096, 7168
TINY = [
    "+exp=quickstart",
    *(f"model.{key}" for key in ("hidden_size=32", "num_layers=2", "num_heads=2", "num_kv_heads=1", "head_dim=16")),
    "model.ffn_size=64",
    *(f"schedule.{key}" for key in ("tokens=6K", "seq_len=256", "batch_tokens=512", "block_size=16", "top_k=3")),
    "schedule.stages.sparse.tokens=60%",
    *(f"schedule.stages.full.{key}" for key in ("tokens=40%", "seq_len=512", "batch_tokens=1K", "rope.theta=20000")),
    "checkpoint.every_tokens=1.5K",
    "eval.every_tokens=2K",
    "eval.documents=3",
    "logging.wandb=disabled",
    "logging.figures=false",
]
# Columns that tell the time.
CLOCKS = {"wall_seconds", "seconds", "tokens_per_second", "tflops", "eta_seconds"}
CLOCKS |= {"save_wait_seconds", "save_write_seconds"}
LINE = "open metrics.jsonl$"
SAVE = "checkpoints/.saving_tokens_{:015d}"


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
        self._context.set_forkserver_preload(["warm_train", "launch_runs"])

    def start(
        self,
        arguments: Sequence[str],
        *,
        act: Act | None = None,
        prepare: Callable[[], None] | None = None,
        environment: dict[str, str] | None = None,
        script: Path = SCRIPT,
    ) -> Forked:
        """Forks `python launch/train.py *arguments`, or another script. prepare(): called in the fork first; must
        pickle."""
        self._count += 1
        folder = self._folder / f"{self._count:03d}"
        folder.mkdir(parents=True)
        process = self._context.Process(
            target=_run, args=(list(arguments), folder, act, prepare, environment or {}, script)
        )
        process.start()
        return Forked(process, folder)

    def run(self, arguments: Sequence[str], **options: Any) -> Finished:
        """How `python launch/train.py *arguments` ended."""
        return self.start(arguments, **options).wait()

    def run_ranks(
        self,
        arguments: Sequence[str],
        num_ranks: int,
        *,
        act: Act | None = None,
        script: Path = SCRIPT,
        prepare: Callable[[], None] | None = None,
    ) -> list[Finished]:
        """How each rank of a run of several ended. They see the world as torchrun's workers do; `act` is rank 0's.

        As torchrun does, ends the others where one failed.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        started = []
        for rank in range(num_ranks):
            world = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            options = {"act": None if rank else act, "script": script, "prepare": prepare}
            started.append(self.start(arguments, environment=world, **options))
        ended = [started[0].wait()]
        for run in started[1:]:
            if ended[0].code:
                run.process.terminate()
            ended.append(run.wait())
        return ended


def _run(arguments, folder, act, prepare, environment, script) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a shell's background would ignore it
    if prepare is not None:
        prepare()
    if act is not None:
        run_dir = next(text.removeprefix("run.dir=") for text in arguments if text.startswith("run.dir="))
        sys.addaudithook(_watcher(run_dir, act))
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


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


def start_real(
    arguments: Sequence[str], cwd: Path, num_ranks: int | None = None, script: Path = SCRIPT
) -> subprocess.Popen:
    """The command as a user starts it, from a folder of their own: plain python, or torchrun with `num_ranks`."""
    ours = ("PYTHONPATH", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in ours}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(script), *arguments]
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


def wait_until(when: Callable[[], bool], process: subprocess.Popen) -> None:
    """Returns once `when` is true or the process has ended."""
    deadline = time.monotonic() + SECONDS
    while not when() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def has_lines(run_dir: Path, num_lines: int) -> bool:
    """True once so many steps were written down."""
    path = run_dir / "metrics.jsonl"
    return path.exists() and path.read_bytes().count(b'"kind": "train"') >= num_lines


def assert_lost(ended: Finished, pid: int) -> None:
    """A run of several processes that lost one has failed and said once which; the only traceback is torchrun's own."""
    assert ended.code > 0 and "finished:" not in ended.out, ended
    assert ended.err.count("of this run has ended") == ended.err.count(f"(pid {pid}) of this run has ended") == 1, ended
    tracebacks = ended.err.split("Traceback (most recent call last)")[1:]
    assert len(tracebacks) == 1 and "ChildFailedError" in tracebacks[0] and "[rank" not in ended.err, ended


def rank_0(run_dir: Path) -> int:
    """The process id of the rank that holds the lock of a run directory."""
    return int((run_dir / ".lock").read_text().split()[1])


# What runs left behind


def course(run_dir: Path, *, without: set[str] = frozenset()) -> list[dict]:
    """What a run wrote down while it trained, in order, without what depends on the clock or tells of starts."""
    records = [record for record in read_metrics(run_dir / "metrics.jsonl") if record["kind"] != "run"]
    return [{key: value for key, value in record.items() if key not in CLOCKS | without} for record in records]


def train_losses(run_dir: Path) -> dict[int, float]:
    return {record["tokens"]: record["loss"] for record in course(run_dir) if record["kind"] == "train"}


def end_of(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / f"tokens_{END:015d}"


def newest(run_dir: Path) -> Path:
    """The newest checkpoint of a run of any length."""
    return max((run_dir / "checkpoints").glob("tokens_*"))


def weights_of(run_dir: Path) -> dict[str, str]:
    """Digest of each tensor of weights and moments at the end, whatever files they are in."""
    digests = {}
    for file in sorted(newest(run_dir).glob("*-of-*.safetensors")):
        for name, tensor in load_file(file).items():
            digests[name] = hashlib.sha256(tensor.tobytes()).hexdigest()
    return digests


def assert_close_course(run_dir: Path, other: Path, *, beyond: int = 0) -> None:
    """The same lines from `beyond` tokens on, up to rounding, which is far below the step from one line to the next."""
    ours, theirs = ([r for r in course(path) if r["tokens"] > beyond] for path in (run_dir, other))
    assert [(r["kind"], r["tokens"]) for r in ours] == [(r["kind"], r["tokens"]) for r in theirs]
    for key in ("loss", "trailing_loss", "grad_norm", "lr"):
        numbers = [[r[key] for r in records if r.get(key) is not None] for records in (ours, theirs)]
        assert len(numbers[0]) == len(numbers[1]) > 2
        np.testing.assert_allclose(*numbers, rtol=2e-5, err_msg=key)
    losses = list(train_losses(other).values())
    assert min(abs(np.diff(losses))) > 10 * 2e-5 * max(losses), "otherwise other data might look alike"


def assert_same_run(run_dir: Path, other: Path) -> None:
    """Every line, every evaluation, and every byte of weights, moments and state at the end."""
    assert course(run_dir) == course(other)
    for file in ("model", "optimizer"):
        name = f"{file}-00001-of-00001.safetensors"
        assert (end_of(run_dir) / name).read_bytes() == (end_of(other) / name).read_bytes(), name
    for name in ("state.json", "position_loss.safetensors", "rng-rank00000.safetensors"):
        assert (end_of(run_dir) / name).read_bytes() == (end_of(other) / name).read_bytes(), name
    curves = sorted(path.name for path in (other / "position_loss").glob("*.npz"))
    assert sorted(path.name for path in (run_dir / "position_loss").glob("*.npz")) == curves
    for name in curves:
        with np.load(run_dir / "position_loss" / name) as ours, np.load(other / "position_loss" / name) as theirs:
            assert all(np.array_equal(ours[key], theirs[key], equal_nan=ours[key].dtype.kind == "f") for key in theirs)


def let_lines_wait() -> None:
    """Makes a run on a CPU write its lines when one on a GPU does."""
    from train.loop import Trainer

    fit = Trainer.fit

    def waiting(trainer, preemption):
        trainer._can_wait = True
        return fit(trainer, preemption)

    Trainer.fit = waiting


def assert_refused(ended: Finished, *words: str) -> None:
    """One message with these words on stderr, exit code 2, no traceback."""
    assert ended.code == 2 and "Traceback" not in ended.err + ended.out, ended
    assert all(word in ended.err for word in words), (words, ended)


def assert_tidy(run_dir: Path) -> None:
    """Nothing half-written is left, and `latest` names the newest checkpoint."""
    folder = run_dir / "checkpoints"
    names = sorted(path.name for path in folder.iterdir())
    assert [name for name in names if name.startswith(".")] == []
    assert (folder / "latest").read_text().strip() == max(name for name in names if name.startswith("tokens_"))
