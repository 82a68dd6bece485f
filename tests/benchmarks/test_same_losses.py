"""benchmarks/same_losses.py: what it reads of a run written by hand, and that it sees the smallest difference."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.same_losses import differences, table, values

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "same_losses.py"


def test_values_of_a_run_are_its_steps_evaluations_and_buckets(tmp_path):
    """Would catch a column or a kind of record left out, and a torn last line taken for a record."""
    step = {"kind": "train", "tokens": 8, "loss": 0.1, "trailing_loss": None, "grad_norm": 2.5, "lr": 1e-3, "step": 1}
    evaluation = {"kind": "eval", "tokens": 8, "loss": 0.3, "trailing_loss": 0.2, "seconds": 1.0}
    text = "\n".join(json.dumps(record) for record in ({"kind": "run", "tokens": 0}, step, evaluation))
    (tmp_path / "metrics.jsonl").write_text(text + '\n{"kind": "train", "tok')
    (tmp_path / "position_loss").mkdir()
    np.savez(tmp_path / "position_loss" / "train_0_sparse.npz", mean=[0.1 + 0.2, math.nan], count=[3, 0])
    assert dict(values(tmp_path)) == {
        "train at 8: loss": 0.1,
        "train at 8: trailing_loss": None,
        "train at 8: grad_norm": 2.5,
        "train at 8: lr": 1e-3,
        "eval at 8: loss": 0.3,
        "eval at 8: trailing_loss": 0.2,
        "train_0_sparse: bucket 0": 0.30000000000000004,
        "train_0_sparse: bucket 1": None,
    }


def test_the_last_bit_is_a_difference_and_so_is_what_is_missing():
    """Would catch a tolerance, a value of one side only passed over, and no values at all taken for equal ones."""
    old = {"a": 1.0, "b": None}
    assert differences(old, dict(old)) is None
    assert "1 differ: first a" in differences(old, {"a": math.nextafter(1.0, 2.0), "b": None})
    assert "1 differ: first b" in differences(old, {"a": 1.0, "b": 0.5})
    assert "1 differ: first b" in differences(old, {"a": 1.0})
    assert "1 differ: first c" in differences(old, {**old, "c": 0.5})
    record = {"seconds": 1.0, "values": old}
    assert table({"run": record}, {"run": record}) == 0
    assert table({"run": record}, {"run": record, "other": record}) == 1
    assert table({}, {}) == 1


def test_compare_exits_with_1_if_files_differ(tmp_path):
    """Would catch an exit status that is lost on its way out, and floats that JSON does not keep to the bit."""
    for name, loss in {"old": 0.1, "same": 0.1, "new": math.nextafter(0.1, 1.0)}.items():
        record = {
            "commit": name,
            "hardware": "",
            "versions": "",
            "runs": {"r": {"seconds": 1.0, "values": {"a": loss}}},
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    for name, code, words in (("same", 0, "equal bit for bit"), ("new", 1, "1 differ: first a")):
        command = [sys.executable, str(SCRIPT), "compare", str(tmp_path / "old.json"), str(tmp_path / f"{name}.json")]
        ran = subprocess.run(command, capture_output=True, text=True)
        assert (ran.returncode, words in ran.stdout) == (code, True), ran.stderr
