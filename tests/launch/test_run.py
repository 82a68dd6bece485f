"""launch/run.py: torchrun's work without its noise, with the run's own exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from launch_runs import ROOT, finish_real, has_lines, start_real, wait_until

import launch.run as run

SCRIPT = ROOT / "launch" / "run.py"


def start(arguments, cwd) -> subprocess.Popen:
    return start_real(arguments, cwd, script=SCRIPT)


def test_a_mistake_stands_alone(command, house):
    """Catches torchrun's report around three lines of ours, a message of each rank, and another exit code than 2."""
    ended = finish_real(start(["--gpus", "2", *command("alone", "optim.lr.peak=0")], house.root))
    assert ended.code == 2 and ended.out == "", ended
    assert ended.err.splitlines() == ["1 problem:", "  - optim.lr.peak=0.0: must be above 0"], ended


def test_a_stop_and_a_lost_process_end_with_their_own_codes(command, house):
    """Catches a run that cannot be stopped or goes on with another number of processes, torchrun's traceback, a 0 where
    a run is not finished, and a lost process that nobody names."""
    arguments = [
        "--gpus=2",
        *command("launched", "checkpoint.every_tokens=1K", "schedule.tokens=60K", "checkpoint.asynchronous=false"),
    ]
    process = start(arguments, house.root)
    wait_until(lambda: has_lines(house.runs / "launched", 2), process)
    process.send_signal(signal.SIGTERM)
    ended = finish_real(process)
    assert ended.code == 128 + signal.SIGTERM and "stopped by SIGTERM" in ended.out and ended.err == "", ended

    process = start(arguments, house.root)
    wait_until(lambda: has_lines(house.runs / "launched", 5), process)
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    victim = max(map(int, listed.stdout.split()))
    os.kill(victim, signal.SIGKILL)
    ended = finish_real(process)
    assert ended.code == 128 + signal.SIGKILL and "continuing from" in ended.out, ended
    assert len(ended.err.splitlines()) <= 5 and f"(process {victim}) was ended by SIGKILL" in ended.err, ended


def test_options_come_before_settings():
    """Catches a setting that torchrun reads, and an option that reaches the run."""
    options, rest = run.split_options(["--gpus", "8", "--nnodes=2", "+exp=quickstart", "run.name=--x", "--cfg", "job"])
    assert options == ["--gpus=8", "--nnodes=2"] and rest == ["+exp=quickstart", "run.name=--x", "--cfg", "job"]
    assert run.split_options(["--help"]) == ([], ["--help"])


@pytest.mark.parametrize("arguments", [["--gpus", "two"], ["--gpus"], ["--gpus=0"], ["--nope=1", "+exp=quickstart"]])
def test_wrong_options_are_refused(arguments, capsys):
    """Catches a traceback of argparse or torchrun, and a screen full of its options."""
    assert run.main(arguments) == 2
    assert len(capsys.readouterr().err.splitlines()) <= 5 and "torch" not in sys.argv[0]
