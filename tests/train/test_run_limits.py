"""The limit on bad steps in a row, and the lock on a run directory."""

import subprocess
import sys
from pathlib import Path

import pytest
from engine_runs import ROOT

from train.checkpoint.run_lock import RunLock, RunLocked
from train.non_finite import NonFiniteError, NonFiniteGuard


def test_only_steps_in_a_row_end_the_run():
    """Catches a total taken for a streak, a limit off by one, and a message that does not say what to go back to."""
    guard = NonFiniteGuard(3)
    for skipped in (True, True, False, True, True):
        guard.update(skipped, tokens=5, last_checkpoint=None)
    assert guard.total == 4
    copy = NonFiniteGuard(3)
    copy.load_state_dict(guard.state_dict())
    with pytest.raises(NonFiniteError, match=r"3 steps in a row.*runs/x/checkpoints/tokens_1.*max_bad_steps=3"):
        copy.update(True, tokens=6, last_checkpoint=Path("runs/x/checkpoints/tokens_1"))


def test_no_limit_never_ends_the_run():
    """Catches 0 taken for a limit that is always reached."""
    guard = NonFiniteGuard(0)
    for _ in range(50):
        guard.update(True, tokens=5, last_checkpoint=None)
    assert guard.total == 50


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path):
    """Catches two runs writing to one directory, and a lock that outlives a killed process."""
    code = "import sys, time; from pathlib import Path; from train.checkpoint.run_lock import RunLock\n"
    code += "lock = RunLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunLocked, match=rf"in use by process {holder.pid} on .*run\.dir"):
            RunLock(tmp_path)
    finally:
        holder.kill()
        holder.wait()
    lock = RunLock(tmp_path)
    with pytest.raises(RunLocked):
        RunLock(tmp_path)
    lock.release()
    RunLock(tmp_path).release()
