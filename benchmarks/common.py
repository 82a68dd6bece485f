"""What the benchmarks share: where a result comes from, what a run's metrics say, tables, and runs under torchrun that
are started, waited for, stopped, and not made twice."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import psutil
import torch

from evals.results import commit, write_json
from launch.cli import UsageError
from train.record.metrics import FILE_NAME, read_metrics

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("before=", "to=", "runs=", "data.cache_dir=", "commit=")
GROUPS = ("model", "data", "optim", "deepspeed", "logging")
SET_HERE = ("schedule.seq_len", "schedule.batch_tokens", "schedule.tokens", "model", "deepspeed", "run.dir", "+exp")
QUIET = ("data.validation=null", "logging.wandb=disabled", "logging.figures=false", "logging.progress=false")
QUIET += ("logging.every_tokens=0", "checkpoint.every_tokens=0")
"""Overrides of runs whose steps are measured one by one."""
SPEEDS = ("tokens_per_second", "tflops", "mfu", "mfu_dense_equivalent", "attended_share")
STALL_SECONDS, ENDED_SECONDS, SAVED_SECONDS = 900, 120, 8
OUT_OF_MEMORY = "out of memory"


# -------------------- arguments, results


def split(arguments: Sequence[str], own: Iterable[str] = ()) -> tuple[list[str], list[str]]:
    """(overrides for the runs, own arguments): overrides have a dot, a plus or a tilde in the key, or choose a group
    that is no key of the command's `own`."""
    groups = {*GROUPS} - {*own}
    is_override = [a[:1] in "+~" or "." in (key := a.partition("=")[0]) or key in groups for a in arguments]
    return (
        [a for a, override in zip(arguments, is_override) if override],
        [a for a, override in zip(arguments, is_override) if not override],
    )


def whole_numbers(values: Mapping[str, str], key: str, default: str, least: int = 1) -> tuple[int, ...]:
    """The whole numbers given for a key, ascending. UsageError for others."""
    text = values.get(key, default)
    if not re.fullmatch(r"\d+(,\d+)*", text) or min(numbers := sorted({int(n) for n in text.split(",")})) < least:
        raise UsageError(f"{key}={text}: whole numbers of at least {least}, separated by commas")
    return tuple(numbers)


def refuse_own(overrides: Sequence[str], keys: Iterable[str]) -> None:
    """UsageError for overrides of what a benchmark of these keys sets itself."""
    if taken := [text for text in overrides if text.partition("=")[0] in SET_HERE]:
        raise UsageError(f"{', '.join(taken)}: the study sets this itself; its keys are {', '.join(keys)}")


def origin(arguments: Sequence[str], label: str | None) -> dict[str, str | None]:
    """What the results of a benchmark carry: the commit (`label`, or that of this checkout), and the command without
    paths of this machine."""
    kept = [a for a in arguments if not a.startswith(PLACES)]
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *kept])
    return {"commit": label or commit(), "command": command}


def device_name() -> str:
    """The GPU, or the kind of processor."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"


def read_json(path: Path) -> dict:
    """The record in a result file."""
    return json.loads(path.read_text(encoding="utf-8"))


def markdown(heads: Sequence[object], rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(map(str, cells))} |" for cells in (heads, ["---"] * len(heads), *rows)]


def heading(record: Mapping) -> list[str]:
    """The first lines of a result: where it was measured, by which command, and how."""
    named = {key: record[key] for key in ("torch", "cudnn", "flash", "deepspeed", "commit") if key in record}
    versions = ", ".join(f"{name} {value}" for name, value in named.items())
    return [f"{record['device']}; {versions}", "", f"`{record['command']}`", "", record["convention"], ""]


def row_table(rows: Iterable[Mapping]) -> list[str]:
    """The lines of a table whose columns are the keys of the rows; of a list of numbers the last one."""
    flat = [dict(_flat(row)) for row in rows]
    keys = list(dict.fromkeys(key for row in flat for key in row))
    return markdown([key.replace("_", " ") for key in keys], [[row.get(key, "") for key in keys] for row in flat])


def _flat(row: Mapping, before: str = "") -> Iterator[tuple[str, str]]:
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key} ")
            continue
        if isinstance(value, list):
            texts = [each for each in value if isinstance(each, str)]
            value = "; ".join(texts) if texts or not value else value[-1]
        value, number = "-" if value is None else value, isinstance(value, float)
        yield before + key, f"{value:,.{0 if abs(value) >= 1000 else 4}f}" if number else str(value).replace("|", "/")


def cell(value: float | None, form: str) -> str:
    """A number in a table; a dash where it is not known."""
    return "-" if value is None else form.format(value)


def write(record: Mapping, lines: Sequence[str], to: Path, name: str = "results") -> str:
    """Writes <name>.json and the table beside it; returns the table's text."""
    write_json(to / f"{name}.json", dict(record))
    text = "\n".join(lines)
    (to / ("table.md" if name == "results" else f"{name}.md")).write_text(text + "\n", encoding="utf-8")
    return text


# -------------------- metrics


def train_lines(folder: Path) -> list[dict]:
    """The steps of a run, in order."""
    return [r for r in read_metrics(folder / FILE_NAME) if r["kind"] == "train"]


def steps_logged(run_dir: Path) -> int:
    """Lines of steps in a run's metrics so far (where every step is logged, as by default)."""
    path = run_dir / FILE_NAME
    return path.read_bytes().count(b'"kind": "train"') if path.exists() else 0


def speeds(train: Sequence[Mapping]) -> dict[str, float | None]:
    """Of `train` records: the medians of what they say of speed, None where they do not know it, and rank 0's peak of
    memory so far."""
    medians = {key: statistics.median(r[key] for r in train) if train[0][key] is not None else None for key in SPEEDS}
    return {**medians, "peak_memory_gib": max((r["peak_memory_gib"] or 0) for r in train) or None}


# -------------------- runs


_running: set[subprocess.Popen] = set()
_starting, _time_is_up = threading.Lock(), threading.Event()


def stop_all() -> None:
    """Ends the scripts that `launch` runs in other threads, and lets none begin: SIGTERM, and SIGKILL after a while."""
    with _starting:
        _time_is_up.set()
    running = list(_running)
    for process in running:
        process.terminate()
    until = time.monotonic() + SAVED_SECONDS
    while time.monotonic() < until and any(process.poll() is None for process in running):
        time.sleep(0.1)
    for process in running:
        if process.poll() is None:
            process.kill()


class Places:
    """Room for some runs at a time, on the GPUs in turn; who comes first in the order of the study gets it first."""

    def __init__(self, number: int):
        known = ",".join(map(str, range(torch.cuda.device_count())))
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", known).split(",")
        self._free = [gpus[i % len(gpus)] for i in range(number)]
        self._waiting: list[int] = []
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, turn: int) -> Iterator[str]:
        """A place for what is `turn`-th; gives its GPU, as CUDA_VISIBLE_DEVICES names it."""
        with self._changed:
            self._waiting.append(turn)
            self._changed.wait_for(lambda: self._free and turn == min(self._waiting))
            self._waiting.remove(turn)
            gpu = max(self._free, key=self._free.count)
            self._free.remove(gpu)
            self._changed.notify_all()
        try:
            yield gpu
        finally:
            with self._changed:
                self._free.append(gpu)
                self._changed.notify_all()


def launch(script: str, arguments: Sequence[str], run: Path, quiet: bool = False, gpu: str | None = None) -> None:
    """Runs a script of launch/ to its end, on one GPU where that is named. ValueError if it fails, with the last of
    what it said where that went to a file."""
    print(f"== {run.name}: {script} {' '.join(a for a in arguments if 'attention' in a)}", flush=True)
    began, path = time.monotonic(), run.with_name(f"{run.name}.log")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") if quiet else nullcontext() as file, _starting:
        if _time_is_up.is_set():
            raise ValueError(f"{run.name}: {script} was not begun: time is up")
        words = [sys.executable, str(ROOT / "launch" / script), *arguments]
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
        process = subprocess.Popen(words, stdout=file, stderr=file and subprocess.STDOUT, env=environment)
        _running.add(process)
    code = process.wait()
    _running.discard(process)
    if code != 0:
        tail = "\n".join(["", *path.read_text(errors="replace").splitlines()[-5:]]) if quiet else ""
        raise ValueError(f"{run.name}: {script} failed with exit status {code}{tail}")
    print(f"   {run.name}: {script} done, {time.monotonic() - began:.0f} s", flush=True)


class Failed(Exception):
    """A run that did not get as far as it should; the text is the reason."""


def kept(folder: Path, arguments: list, make: Callable[[Path], dict]) -> dict:
    """What make(folder) measured, or {"failed": reason}; not measured again with the same arguments, unless it failed
    for another reason than memory."""
    path = folder.with_name(f"{folder.name}.json")
    if path.exists() and (record := read_json(path))["arguments"] == arguments:
        return record["measured"]
    shutil.rmtree(folder, ignore_errors=True)
    folder.with_name(f"{folder.name}.log").unlink(missing_ok=True)
    folder.mkdir(parents=True)
    try:
        measured = make(folder)
    except Failed as error:
        measured = {"failed": str(error)}
    if measured.get("failed") in (None, OUT_OF_MEMORY):
        write_json(path, {"arguments": arguments, "measured": measured})
    return measured


@contextmanager
def started(script: list[str], arguments: list[str], num_processes: int, folder: Path) -> Iterator[psutil.Popen]:
    """torchrun with a run in `folder`; all its processes are killed at the end. What they say is in <folder>.log."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    command += [str(ROOT / script[0]), *script[1:], *arguments, f"run.dir={folder}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # as torchrun has it for several processes
    with folder.with_name(f"{folder.name}.log").open("ab") as log:
        process = psutil.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        yield process
    finally:
        # torchrun puts each worker into a session of its own, so there is no group to kill.
        family = [*process.children(recursive=True), process] if process.is_running() else [process]
        for one in family:
            if one.is_running():
                one.kill()
        psutil.wait_procs(family, timeout=ENDED_SECONDS)


def wait(process: psutil.Popen, folder: Path, done: Callable[[], object]) -> None:
    """Returns once `done`. Failed if the run ends before, or logs no step for STALL_SECONDS."""
    steps, since = 0, time.monotonic()
    while not done():
        if process.poll() is not None and not done():
            raise Failed(failure_reason(folder.with_name(f"{folder.name}.log").read_text(errors="replace")))
        if (now := steps_logged(folder)) > steps:
            steps, since = now, time.monotonic()
        if time.monotonic() - since > STALL_SECONDS:
            raise Failed(f"no step for {STALL_SECONDS} s, after {steps}")
        time.sleep(0.05)


def failure_reason(log: str) -> str:
    """Why a run failed, in a line, from what it said."""
    if OUT_OF_MEMORY in log.lower() or "can't allocate memory" in log:
        return OUT_OF_MEMORY
    lines = [plain(line) for line in log.splitlines()]
    errors = [line for line in lines if re.match(r"(error|[\w.]*(Error|Exception))\b", line) and "Child" not in line]
    said = [line for line in lines if line.strip("=-")]  # torchrun frames its report
    return (errors or said or ["it said nothing"])[0 if errors else -1][:300]


def plain(line: str) -> str:
    """A line without torchrun's stamp or the rank in front."""
    return re.sub(r"^([EWI]\d{4} [^\]]*\] |\[rank\d+\]:? ?)+", "", line).strip()
