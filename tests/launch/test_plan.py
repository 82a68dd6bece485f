"""The plan as a user meets it: every experiment, and the command itself from another directory."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conf.numbers import parse_length
from launch import config
from launch.config import choices_of, detect_hardware, load, run_command
from launch.plan import USAGE, main, split_machine
from train.plan.longest import longest
from train.plan.plan import make_plan

ROOT = Path(__file__).resolve().parents[2]


def run_plan(cwd: Path, *arguments: str) -> subprocess.CompletedProcess:
    """launch/plan.py as a user starts it, with no help from PYTHONPATH."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / "launch" / "plan.py"), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("experiment", choices_of("exp"))
def test_every_experiment_is_planned(experiment):
    """Catches an experiment whose plan fails, or that one could not start as it stands."""
    overrides, hardware = split_machine([f"+exp={experiment}", "num_gpus=8", "gpu_memory=80GB"])
    # The steps of these have too few sequences for 8 ranks; they are made for one.
    if experiment in ("quickstart", "moba_32k_small", "sft_quickstart", "sft_hybrid"):
        overrides, hardware = split_machine([f"+exp={experiment}", "num_gpus=1", "gpu_memory=80GB"])
    plan = make_plan(load(overrides, hardware), 32768, hardware)
    text = plan.text()
    # Of the paper's 8B model at 1M a sequence takes two GPUs; the plan says so.
    too_long = experiment.startswith("paper/llama3_8b_1m/") and plan.stages[0].seq_len == 2**20
    assert f"Plan of {experiment}" in text
    if too_long:
        assert "does not fit 80.0 GB per GPU; parallel.sequence=2 would" in text
        text = make_plan(load([*overrides, "parallel.sequence=2"], hardware), 32768, hardware).text()
    assert "fits 80.0 GB per GPU" in text
    assert all(stage.name in text for stage in plan.stages)
    assert all(0 < stage.attended_share <= 1 for stage in plan.stages)
    assert [stage.name for stage in plan.stages if stage.covers] == (
        ["sft_32k"] if experiment.endswith("/sft_32k") else []
    )
    assert max(map(len, text.splitlines())) <= 118 + len(plan.run_dir)


def test_the_command(tmp_path):
    """Catches imports that only work from the checkout, outputs left behind, and figures missing from the plan."""
    result = run_plan(tmp_path, "+exp=moba_32k", "num_gpus=2", "gpu_memory=80GB")
    assert result.returncode == 0, result.stderr
    for words in (
        "Plan of moba_32k",
        "sparse  180,092,928  687    32K     256K             4              28.9%",
        "attention moba 2048x3 (layers 0-11); RoPE theta 10000",
        "attention full (layers 0-11)",
        "2 GPUs",
        "ZeRO 1, bf16",
        "parameters",
        "FLOPs with attended pairs",
        "fits 80.0 GB per GPU",
        str(tmp_path / "runs" / "moba_32k"),
        "demonstration",
    ):
        assert words in result.stdout, words
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["+exp=moba_32k", "modl=tiny", "run=x"], ["2 problems", "modl=tiny", "run=x"]),
        (["+exp=moba_32k", "num_gpus=3"], ["batch_tokens=256K", "3 processes", "288K"]),
        (["+exp=moba_32k", "num_gpus=none", "gpu_memory=big"], ["num_gpus=none", "gpu_memory=big", "80GB"]),
        (["+exp=moba_32k", "num_gpus=1000000000000"], ["num_gpus=1000000000000: how many GPUs"]),
        (["+exp=moba_32k", "num_gpus=1", "num_gpus=2"], ["num_gpus=2: is given twice"]),
        (["+exp=moba_32k", "gpu_memory=80"], ["gpu_memory=80: is 80 bytes; write a GPU's, such as 80GB"]),
        (["+exp="], ["+exp=: no such choice; known here: continual_smollm2"]),
        (["+exp=moba_32k", "run.name="], ["run.name=: a name", "run.dir="]),
        (["+exp=moba_32k", "run.name=../books"], ["run.name=../books: a name", "run.dir="]),
        (["+exp=moba_32k", "data.tokenizer=/no/such/file.json"], ["/no/such/file.json"]),
        (["+exp=moba_32k", "model.vocab_size=100"], ["model.vocab_size=100", "32768"]),
    ],
)
def test_mistakes_exit_with_2(capsys, arguments, words):
    """Catches an exception that gets through, a zero exit code, and an error on stdout."""
    assert run_command(main, arguments, USAGE) == 2
    out, err = capsys.readouterr()
    assert out == "" and all(word in err for word in words), err


def test_the_command_exits_with_2_and_no_traceback(tmp_path):
    """Catches an exit code that is lost on the way to the shell."""
    result = run_plan(tmp_path, "+exp=moba_32k", "modl=tiny")
    assert (result.returncode, result.stdout) == (2, "") and result.stderr.startswith("1 problem")


def test_the_machine_is_not_part_of_the_run():
    """Catches num_gpus that reaches the configuration, and a machine that isn't the one named."""
    overrides, hardware = split_machine(["+exp=quickstart", "num_gpus=16", "gpu_memory=141GB"])
    assert overrides == ["+exp=quickstart"]
    assert (hardware.num_gpus, hardware.world_size, hardware.gpu_memory) == (16, 16, 141 * 1024**3)


def test_a_full_disk_behind_a_pipe_of_ours_is_a_line(capsys):
    """Catches a traceback where the output goes to a file on a full disk."""

    def full(arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    assert run_command(full, [], USAGE) == 2
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device\n"


def test_the_longest_context_is_the_longest_that_the_plan_calls_fit(capsys):
    """Catches a row whose plan says otherwise, one that could be twice as long, engines out of order, and ways to share
    that the model has too few heads for."""
    machine = ["gpu_memory=40GB", "host_memory=200GB"]
    main(["longest", "+exp=moba_32k", "models=125m,paper_1_5b", "num_gpus=2,1", *machine, "model.num_kv_heads=null"])
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if "|" in line][2:]
    assert [row[:3] for row in rows] == [[m, *c] for m in ("125m", "paper_1_5b") for c in ("11", "21", "22")]
    assert "40.0 GB and 200.0 GB" in " ".join(out.split())
    tried = ["zero1", "zero3", "zero1_offload", "zero3_offload"]

    def planned(row, length, engine):
        own = [f"model={row[0]}", f"parallel.sequence={row[2]}", f"deepspeed={engine}"]
        batch = length * int(row[1]) // int(row[2])
        sizes = [f"schedule.seq_len={length}", f"schedule.batch_tokens={batch}", f"num_gpus={row[1]}"]
        overrides, hardware = split_machine(["+exp=moba_32k", *own, *sizes, *machine])
        return make_plan(load(overrides, hardware), 32768, hardware)

    engines = set()
    for row in rows:
        length, chosen = parse_length(row[3]), row[4]
        fits = "fits 40.0 GB per GPU"
        found = planned(row, length, chosen)
        assert found.verdict == fits and f"model.activation_checkpointing={row[5]}: " in found.text()
        assert row[6:] == [f"{size / 2**30:.1f} GB" for size in (found.memory.total, found.host.total)]
        for engine in tried[: tried.index(chosen)]:
            assert planned(row, length, engine).verdict != fits
        for engine in tried:
            assert planned(row, 2 * length, engine).verdict != fits
        engines.add(chosen)
    assert len(engines) > 1, "some row needs more than the first"
    main(["longest", "+exp=moba_32k", "model=llama3_8b", "num_gpus=1", "gpu_memory=40GB", "deepspeed=zero1"])
    assert "| llama3_8b | 1    | 1        | below 32K |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], ["num_gpus=null", "gpu_memory=null"]),
        (["num_gpus=1,x", "gpu_memory=80GB"], ["num_gpus=1,x"]),
        (["num_gpus=1", "gpu_memory=80GB", "schedule.seq_len=1M"], ["schedule.seq_len=1M: is set by this command"]),
        (["num_gpus=1", "gpu_memory=80GB", "parallel.sequence=2"], ["parallel.sequence=2: is set by this command"]),
        (["num_gpus=1", "gpu_memory=80GB", "model=tiny", "models=125m"], ["model=tiny", "models="]),
        (["num_gpus=1", "gpu_memory=80GB", "models=nosuch"], ["model=nosuch: no such choice"]),
        (["num_gpus=1", "gpu_memory=80GB", "run.device=cpu"], ["run.device=cpu"]),
        (
            ["num_gpus=1", "gpu_memory=80GB", "host_memory=1", "gpu_name=Z9"],
            ["host_memory=1: is 1 bytes", "gpu_name=Z9"],
        ),
    ],
)
def test_mistakes_about_the_longest_context(capsys, arguments, words):
    """Catches a table for something else than was asked, and a traceback."""
    assert run_command(main, ["longest", "+exp=moba_32k", *arguments], USAGE) == 2
    out, err = capsys.readouterr()
    assert out == "" and all(word in err for word in words), err


def test_a_containers_memory_is_what_there_is(tmp_path, monkeypatch):
    """Catches a container that is taken for its host: what it may not have, and one without a limit."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    path = tmp_path / "memory.max"
    monkeypatch.setattr(config, "CONTAINER_LIMITS", (path, tmp_path / "none"))
    for text, memory in (("max\n", whole), (f"{2**20}\n", 2**20), (f"{2**63}\n", whole)):
        path.write_text(text)
        assert detect_hardware().host_memory == memory


@pytest.mark.parametrize("length", ["256k", "512k", "1m"])
@pytest.mark.parametrize("model", ["1_1b", "1_5b", "8b"])
def test_long_recipes_are_what_the_table_allows(model, length):
    """Catches a recipe that goes beyond what its GPUs and their host hold, attention that hides nothing or is another
    than the paper's, and a last stage of full attention whose hours nobody says."""
    machine = ["num_gpus=8", "gpu_memory=80GB", "host_memory=1TB", "gpu_name=H100"]
    overrides, hardware = split_machine([f"+exp=long/{model}_{length}", *machine])
    config = load(overrides, hardware)
    rows = {"8b": 128256}.get(model, 32768)
    plan = make_plan(config, rows, hardware)
    sparse, full = plan.stages
    assert plan.verdict == "fits 80.0 GB per GPU"
    assert (sparse.attention.partition(" (")[0], full.attention.partition(" (")[0]) == ("moba 4096x12", "full")
    assert sparse.seq_len == full.seq_len == parse_length(length.upper()) and sparse.attended_share < 0.4
    assert sparse.tokens / full.tokens == pytest.approx(9, rel=0.05)
    hours = full.flops / (0.4 * 989.4e12 * 8) / 3600
    assert 0.5 < hours < 10 and plan.time is not None
    assert float(plan.time.rpartition("full ")[2].partition(":")[0]) == int(hours) or hours < 1
    engine = "zero3" if model == "8b" else "zero1"
    found = longest(model, {engine: config}, 8, config.parallel.sequence, rows, hardware)
    assert found.seq_len is not None and found.seq_len >= full.seq_len


def test_the_documented_table_is_the_commands(capsys):
    """Catches a table in the documentation that the plan has moved away from."""
    text = (ROOT / "docs" / "long.md").read_text(encoding="utf-8")
    command = next(line for line in text.splitlines() if line.startswith("python launch/plan.py longest"))
    rows = [" ".join(line.split()) for line in text.partition("| model | GPUs | sequence |")[2].splitlines()[2:18]]

    def printed(*more):
        main([*command.split()[2:], *more])
        return {" ".join(line.split()) for line in capsys.readouterr().out.splitlines()}

    assert len(rows) == 16 and set(rows) <= printed()
    others = {row.rpartition("|")[0][:40] for row in printed("schedule.block_size=4K", "schedule.top_k=12")}
    head = [" | ".join(row.split(" | ")[:4]) for row in rows]
    changed = [row for row in head if not any(other.startswith(row) for other in others)]
    assert changed == ["| paper_545m | 1 | 1 | 2M"], "the text says that this one alone changes"
    assert any(other.startswith("| paper_545m | 1 | 1 | 1M") for other in others)
