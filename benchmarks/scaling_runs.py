"""Runs under torchrun, for benchmarks/scaling.py: started, waited for, stopped, and not made twice."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from benchmarks.study import ROOT, read_json, steps_logged
from evals.results import write_json
from train.record.metrics import FILE_NAME, read_metrics

STALL_SECONDS, ENDED_SECONDS = 900, 120
OUT_OF_MEMORY = "out of memory"


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
    return (errors or [line for line in lines if line] or ["it said nothing"])[0 if errors else -1][:300]


def plain(line: str) -> str:
    """A line without torchrun's stamp or the rank in front."""
    return re.sub(r"^([EWI]\d{4} [^\]]*\] |\[rank\d+\]:? ?)+", "", line).strip()


def train_lines(folder: Path) -> list[dict]:
    """The steps of a run, in order."""
    return [r for r in read_metrics(folder / FILE_NAME) if r["kind"] == "train"]
