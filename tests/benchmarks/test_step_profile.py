"""benchmarks/step_profile.py: kinds of kernels and idle time from traces written by hand, a table, and a small run."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.common import read_json
from benchmarks.kernel_kinds import KINDS, idle_share, longest_kernels, milliseconds_by_kind
from benchmarks.profiled_train import Window
from benchmarks.step_tables import publish

ROOT = Path(__file__).resolve().parents[2]


def op(name, ts, dur, tid=1, cat="cpu_op"):
    return {"ph": "X", "name": name, "cat": cat, "ts": ts, "dur": dur, "tid": tid}


def launched(name, at, begins, dur, number, tid=1):
    """A kernel, and the call that launched it at `at`."""
    arguments = {"correlation": number}
    return [
        {**op("cudaLaunchKernel", at, 1, tid, "cuda_runtime"), "args": arguments},
        {**op(name, begins, dur, 7, "kernel"), "args": arguments},
    ]


def device_trace():
    """A step: forward on thread 1, backward on thread 2, the optimizer on thread 1, then the next forward."""
    backward = "autograd::engine::evaluate_function: MmBackward0"
    return [
        {"ph": "M", "name": "process_name"},
        op("aten::embedding", 0, 5),
        *launched("vectorized_gather", 1, 1000, 100, 1),
        op("_VarlenAttention", 10, 10),
        op("aten::mm", 12, 3),
        *launched("sm90_gemm_in_attention", 13, 1100, 1000, 2),
        op("aten::mm", 30, 5),
        *launched("nvjet_tst", 31, 2100, 2000, 3),
        op("_TiledCrossEntropy", 40, 20),
        *launched("softmax", 41, 4100, 300, 4),
        op("aten::mm", 45, 5),
        *launched("nvjet_logits", 46, 4400, 500, 5),
        op(backward, 100, 20, tid=2),
        *launched("triton_poi_fused_add", 101, 5000, 400, 6, tid=2),
        op("autograd::engine::evaluate_function: _VarlenAttentionBackward", 120, 10, tid=2),
        *launched("some_kernel", 121, 5400, 600, 7, tid=2),
        op("aten::mul_", 140, 2),
        *launched("multi_tensor_apply", 141, 6000, 50, 8),
        op("Optimizer.step#AdamW.step", 150, 5, cat="user_annotation"),
        *launched("adam", 151, 6050, 150, 9),
        op("aten::embedding", 160, 5),
        *launched("vectorized_gather", 161, 7200, 100, 10),
        *launched("ncclDevKernel_AllReduce", 170, 7300, 200, 11),
    ]


def test_kinds_follow_from_where_a_kernel_was_launched():
    """Catches products inside attention or the loss that are put elsewhere, backward kernels on the engine's thread
    that lose their operators, and clipping or the next forward pass on the wrong side of the optimizer."""
    by_kind = milliseconds_by_kind(device_trace(), num_steps=2)
    microseconds = {kind: round(2000 * value) for kind, value in by_kind.items()}
    assert microseconds == {
        "matmul": 2500,
        "attention": 1600,
        "elementwise": 600,
        "optimizer": 200,
        "loss": 300,
        "other": 200,
    }
    longest = longest_kernels(device_trace(), 1)
    assert longest["matmul"] == [("nvjet_tst [aten::mm]", 2.0), ("nvjet_logits [_TiledCrossEntropy > aten::mm]", 0.5)]
    assert ("triton_poi_fused_add [MmBackward0]", 0.4) in longest["elementwise"]


def test_idle_is_the_time_without_any_kernel():
    """Catches overlapping kernels that are counted twice, and host events that are taken for work."""
    kernels = [op(name, *span, cat="kernel") for name, span in (("a", (100, 50)), ("b", (120, 50)), ("c", (190, 10)))]
    assert idle_share([op("host", 0, 1000), *kernels]) == pytest.approx(0.2)
    assert idle_share([op("host", 0, 1000)]) is None


def test_hosts_operators_count_without_those_inside():
    """Catches time that is counted in an operator and again in the one around it, where there is no device."""
    trace = [op("_BlockSparse", 0, 100), op("aten::bmm", 10, 60), op("aten::silu", 200, 40)]
    by_kind = milliseconds_by_kind(trace, num_steps=1)
    assert by_kind["attention"] == pytest.approx(0.1) and by_kind["elementwise"] == pytest.approx(0.04)
    assert sum(by_kind.values()) == pytest.approx(0.14)


def test_table_and_figure_show_what_is_known(tmp_path):
    """Catches columns out of order, a failed run that ends the study or vanishes, and figures without a bar."""
    row = {
        "variant": "moba_32k/x",
        "attention": "moba 2048x3",
        "tokens_per_second": 81234.0,
        "mfu": 0.412,
        "peak_memory_gib": 37.25,
        "step_milliseconds": 806.0,
        "idle_share": 0.012,
        "start_seconds": 21.0,
        "first_step_seconds": 33.3,
        "milliseconds": dict.fromkeys(KINDS, 100.0),
        "longest": {"attention": [("flash_fwd", 68.0)]},
    }
    setting = {"seq_len": 32768, "batch_tokens": 65536, "warmup": 5, "steps": 20, "profiled": 2}
    about = {"device": "GPU", "torch": "2", "commit": "abc", "command": "c", "convention": "v"}
    rows = [row, {"variant": "full_32k/y", "failed": "out of memory"}]
    lines = publish(about | {"setting": setting, "rows": rows}, tmp_path).splitlines()
    cells = "moba 2048x3 | 81,234 | 0.4120 | 37.2500 | 806.0000 | 0.0120 | 21.0000 | 33.3000"
    assert f"| moba_32k/x | {cells}{' | 100.0000' * len(KINDS)} |  |" in lines
    assert any(line.startswith("| full_32k/y | ") and line.endswith(" | out of memory |") for line in lines)
    assert any("flash_fwd 68.0" in line for line in lines)
    assert (tmp_path / "figure.png").stat().st_size > 5_000


def test_windows_are_read_from_their_ends():
    """Catches paths with a colon that are cut in the wrong place."""
    window = Window.parse("/a:b/trace.json:both:8:10")
    assert (str(window.path), window.with_host, window.first, window.last) == ("/a:b/trace.json", True, 8, 10)


@pytest.mark.timeout(900)
def test_a_small_run_is_measured_and_profiled(tmp_path):
    """Catches a trainer that no longer builds in the profiled process, windows that never open, and time in attention,
    products or the optimizer that no rule finds."""
    small = "variants=moba_32k/tiny steps=2 warmup=1 profiled=1 seq_len=512 batch_tokens=1K seconds=800 limit=800"
    small += " schedule.block_size=64 data.tokenizer=bytes run.device=cpu"
    command = [sys.executable, "benchmarks/step_profile.py", f"to={tmp_path}", *small.split()]
    subprocess.run(command, cwd=ROOT, check=True)
    (row,) = read_json(tmp_path / "results.json")["rows"]
    assert "failed" not in row, row
    assert min(row["milliseconds"][kind] for kind in ("matmul", "attention", "elementwise", "optimizer", "loss")) > 0
    assert row["tokens_per_second"] > 0 and row["attention"].startswith("moba 64x3")
