"""benchmarks/scaling.py: what it reads of metrics and traces written by hand, and what it makes of a run that fails."""

import sys

import pytest

from benchmarks import scaling
from benchmarks.common import Failed, kept, speeds, started, wait
from benchmarks.kernel_kinds import communication


def test_speed_is_the_median_and_memory_the_peak():
    """Catches a mean that one slow step moves, a peak of the last step, and values that are made up where none is
    known."""
    rest = {"tflops": 1.0, "mfu": None, "mfu_dense_equivalent": None, "attended_share": 0.3}
    train = [{"tokens_per_second": r, **rest, "peak_memory_gib": m} for r, m in ((720, 12), (1, 10), (721, 11))]
    found = speeds(train)
    assert (found["tokens_per_second"], found["peak_memory_gib"], found["mfu"]) == (720, 12, None)


def test_the_table_shows_failures_too():
    """Catches a failed setup that vanishes from the table or shifts its columns."""
    about = {"device": "8 x GPU", "torch": "2", "deepspeed": "0", "commit": "abc", "command": "c", "convention": "v"}
    setup = {"model": "m", "attention": "a", "zero": 1, "gpus": 2}
    rows = [setup | {"failed": "out of memory"}, setup | {"steps": 50, "loss_first": 10.6812, "same": True}]
    lines = list(scaling.table(about | {"losses": rows}))
    assert "| model | attention | zero | gpus | failed | steps | loss first | same |" in lines
    assert "| m | a | 1 | 2 | out of memory |  |  |  |" in lines
    assert "| m | a | 1 | 2 |  | 50 | 10.6812 | True |" in lines


def test_communication_is_the_time_in_which_nccl_runs_counted_once():
    """Catches kernels that overlap and are counted twice, hidden communication that is taken for exposed, and host
    events or labels that are taken for kernels."""

    def event(name, ts, dur, cat="kernel"):
        return {"ph": "X", "name": name, "cat": cat, "ts": ts, "dur": dur}

    events = [
        {"ph": "M", "name": "process_name"},
        event("cudaLaunchKernel", 0, 5000, "cuda_runtime"),
        event("nccl:all_reduce", 0, 5000, "gpu_user_annotation"),
        event("gemm", 100, 400),
        event("ncclDevKernel_AllReduce", 400, 200),  # 100 hidden, 100 exposed
        event("ncclDevKernel_AllGather", 550, 100),  # 50 in common with the one before, 50 more exposed
        event("gemm", 900, 200),
        event("ncclDevKernel_AllGather", 950, 50),  # hidden
    ]
    assert communication(events) == pytest.approx({"communication": 0.3, "communication_exposed": 0.15})
    assert communication(events[:4]) == {"communication": 0, "communication_exposed": 0}
    on_cpu = [event("aten::mm", 0, 100, "cpu_op"), event("gloo:all_reduce", 50, 30, "user_annotation")]
    assert communication(on_cpu) == {"communication": 0.3, "communication_exposed": None}


def test_a_failed_run_is_a_result_and_leaves_no_process(tmp_path):
    """Catches a run out of memory that ends the study, one that is tried again for it, and other failures that are kept
    for good; and workers, in sessions of their own, that outlive the measurement."""
    script, made = tmp_path / "fail.py", []
    script.write_text("import sys, time\nif sys.argv[1] == 'sleep': time.sleep(600)\nraise SystemExit(sys.argv[1])\n")

    def make(words):
        def measure(folder):
            made.append(words)
            with started([str(script)], [words], 1, folder) as process:
                wait(process, folder, lambda: False)

        return kept(tmp_path / "run", [words], measure)

    for _ in range(2):
        assert make("CUDA out of memory. Tried") == {"failed": "out of memory"}
    for _ in range(2):
        assert make("ValueError: no such thing") == {"failed": "ValueError: no such thing"}
    assert len(made) == 3
    with pytest.raises(Failed), started([str(script)], ["sleep"], 1, tmp_path / "run") as process:
        while not (workers := process.children()):
            pass
        raise Failed("as if measured")
    assert not any(worker.is_running() for worker in [process, *workers])


def test_all_setups_are_compared_with_one_process_that_splits_nothing(monkeypatch, tmp_path):
    """Catches a reference that shares the fault it should show, and one that is made anew for every ZeRO stage."""
    asked = []
    monkeypatch.setattr(scaling, "_curve", lambda study, setup, gpus: asked.append((setup, gpus)) or {"losses": [2.0]})
    study = scaling.Study(tmp_path, (), "cpu", 512, 1)
    for zero, sequence in ((2, 1), (3, 2)):
        assert scaling.losses(study, scaling.Setup("tiny", "moba_32k", zero, 2, sequence))["same"]
    (first, one), (_, two), (second, _), (shared, _) = asked
    assert (first, one, two) == (second, 1, 2)
    assert {"deepspeed=zero1", "parallel.sequence=1"} <= {*first.arguments(study)}
    assert {"deepspeed=zero3", "parallel.sequence=2"} <= {*shared.arguments(study)}
    assert first.batch(study) == shared.batch(study) == 1024


@pytest.mark.parametrize(
    "arguments, gpus, words",
    [
        ([], 0, ["device=cuda", "no GPU", "device=cpu"]),
        (["gpus=1,4096"], 2, ["gpus=1,4096", "this host: 2; use gpus=1, or device=cpu"]),
        (["gpus=4"], 2, ["gpus=4", "use gpus=2,"]),
        (["gpus=2"], 1, ["gpus=2: GPUs on this host: 1; use gpus=1, or device=cpu"]),
        (["device=cpu", "schedule.seq_len=4K"], 0, ["schedule.seq_len=4K", "seq_len"]),
        (["device=cpu", "gpus=1"], 0, ["gpus=1", "2 or more"]),
    ],
)
def test_a_mistake_is_named_before_anything_runs(arguments, gpus, words, monkeypatch, tmp_path, capsys):
    """Catches a CPU measured in silence in place of GPUs, more GPUs than there are, a length that would be overridden
    in silence, and one process compared with itself."""
    monkeypatch.setattr(scaling.torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(sys, "argv", ["scaling.py", f"to={tmp_path}", "models=tiny", *arguments])
    monkeypatch.setattr(scaling.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        scaling.main()
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and all(word in error for word in words), error
    assert list(tmp_path.iterdir()) == []
