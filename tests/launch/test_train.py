"""The main job end to end: launch/train.py run, killed at exact and at random moments, stopped, resumed and refused.

One small run, two stages of different attention, length, batch and RoPE, is compared with itself under all that may
happen to it. Its course in tokens: steps of 512 up to the switch at 4096, then of 1024; checkpoints at 1536, 3072,
4096, 5120, 6144, 7168; evaluations at 2048, 4096, 6144, 7168.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from launch_runs import FORK_PATH, Act, Finished, Launcher, finish_real, kill_real, start_real

from train.loop import Trainer
from train.metrics import read_metrics

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
LINE = "open metrics.jsonl$"
SAVE = "checkpoints/.saving_tokens_{:015d}"


@pytest.fixture(scope="session")
def house(tmp_path_factory) -> SimpleNamespace:
    """Where everything lies: a corpus of long and short documents, and a cache of its tokens."""
    root = tmp_path_factory.mktemp("train")
    words = "the river of stone in long light walked a night sparse attention and full moba".split()
    rng = random.Random(0)
    (root / "books").mkdir()
    for number, length in enumerate([700, 600, 500, 400, 300, 200, 60, 30, 8, 3]):
        text = " ".join(rng.choice(words) for _ in range(length))
        (root / "books" / f"{number}.txt").write_text(text)
    data = ["data=files", f"data.path={root}/books", f"data.cache_dir={root}/cache"]
    return SimpleNamespace(root=root, data=[*data, f"data.validation.path={root}/books"], runs=root / "runs")


@pytest.fixture(scope="session")
def launcher(house) -> Launcher:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", FORK_PATH)
        launcher = Launcher(house.root / "streams")
        ended = launcher.run(["model=nope"])  # starts the server, which imports from that path
    assert ended.code == 2 and "+exp=" not in ended.out, ended
    return launcher


@pytest.fixture(scope="session")
def command(house):
    """run name, more overrides -> the arguments of launch/train.py."""

    def arguments(name: str, *more: str) -> list[str]:
        return [*TINY, *house.data, f"run.dir={house.runs / name}", *more]

    return arguments


@pytest.fixture(scope="session")
def whole(house, command) -> Path:
    """The run directory of the uninterrupted run, made by the real command with all its outputs."""
    house.runs.mkdir(exist_ok=True)
    ended = finish_real(start_real(command("whole", "logging.figures=true", "logging.wandb=offline"), house.root))
    assert ended.code == 0 and "Traceback" not in ended.err, ended
    (house.root / "whole.txt").write_text(ended.out)
    return house.runs / "whole"


# -------------------- what runs left behind


def course(run_dir: Path, *, without: set[str] = frozenset()) -> list[dict]:
    """What a run wrote down while it trained, in order, without what depends on the clock or tells of starts."""
    records = [record for record in read_metrics(run_dir / "metrics.jsonl") if record["kind"] != "run"]
    return [{key: value for key, value in record.items() if key not in CLOCKS | without} for record in records]


def train_losses(run_dir: Path) -> dict[int, float]:
    return {record["tokens"]: record["loss"] for record in course(run_dir) if record["kind"] == "train"}


def end_of(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / f"tokens_{END:015d}"


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


# -------------------- the run as a user starts it


def test_the_real_command_leaves_all_it_promises(house, whole):
    """Catches a missing or empty output, ends of stages that are not kept, and a trailing loss that does not fall."""
    out = (house.root / "whole.txt").read_text()
    assert out.startswith("Plan of quickstart") and "stage full: full, length 512" in out
    assert f"finished: {END:,} tokens" in out and str(end_of(whole)) in out
    assert (whole / "plan.txt").read_text() in out
    assert yaml.safe_load((whole / "config.yaml").read_text())["schedule"]["tokens"] == END

    records = read_metrics(whole / "metrics.jsonl")
    assert [r["tokens"] for r in records if r["kind"] == "train"] == [*range(512, 4097, 512), 5120, 6144, 7168]
    assert [r["tokens"] for r in records if r["kind"] == "eval"] == [2048, 4096, 6144, 7168]
    assert [(r["stage"], r["tokens"], r["end"]) for r in records if r["kind"] == "stage"] == [
        ("sparse", 0, SWITCH),
        ("full", SWITCH, END),
    ]
    train = [r for r in records if r["kind"] == "train"]
    assert train[0]["attended_share"] < 0.4 and train[-1]["attended_share"] == 1.0, "sparse, then full"
    assert train[-1]["trailing_loss"] < train[0]["trailing_loss"] - 0.5
    for record in train:
        assert record["skipped_steps"] == 0 and 0 < record["grad_norm"] < 100 and 0 < record["lr"] <= 3e-3

    figures = {path.name: path.read_bytes()[:4] for path in (whole / "figures").iterdir()}
    names = {"loss_over_tokens.png", "loss_by_position.png", "loss_by_position_over_training.png"}
    assert figures == dict.fromkeys(names, b"\x89PNG")
    assert {path.name for path in (whole / "position_loss").glob("train_*")} == {
        "train_0_sparse.npz",
        "train_1_full.npz",
    }
    with np.load(whole / "position_loss" / "train_1_full.npz") as curve:
        assert curve["position_count"].sum() == END - SWITCH, "every token of the stage is counted once"
    assert json.loads((whole / "position_loss" / f"eval_{END:015d}.json").read_text())["num_documents"] == 3
    kept = sorted(path.name for path in (whole / "checkpoints").glob("tokens_*"))
    assert kept == [f"tokens_{tokens:015d}" for tokens in (SWITCH, 6144, END)], "the newest two and the stages' ends"
    assert_tidy(whole)
    assert any((whole / "wandb").iterdir())


def test_a_finished_run_says_so(launcher, command, whole):
    """Catches a second training, or an error, where there is nothing left to do."""
    before = (whole / "metrics.jsonl").read_bytes()
    ended = launcher.run(command("whole"))
    assert ended.code == 0 and f"{whole} is finished" in ended.out and "init.source=" in ended.out and ended.err == ""
    assert (whole / "metrics.jsonl").read_bytes() == before


# -------------------- kill -9

SAVING = [
    Act(f"open {SAVE.format(1536)}/state.json"),  # half-written, and nothing before it
    Act(f"os.rename {SAVE.format(1536)}"),  # whole, under its hidden name
    Act("open checkpoints/.latest"),  # renamed, not yet `latest`
    Act(f"flush {SAVE.format(3072)}/model-"),
    Act("os.rename checkpoints/.latest"),
    Act("os.rename checkpoints/tokens_000000000001536"),  # before an old one is removed
    Act("os.remove ", 2),  # while it is
]
SWITCHING = [
    Act(LINE, 12),  # before the line of the evaluation that ends the first stage
    Act("open position_loss/train_0_sparse.npz"),
    Act(f"os.rename {SAVE.format(SWITCH)}"),
    Act("open checkpoints/.latest"),
    Act(LINE, 2),  # before the line of the second stage
    Act(LINE, 3),  # before that of its first step
    Act(f"flush {SAVE.format(5120)}/optimizer-"),
]


@pytest.mark.parametrize("acts", [SAVING, SWITCHING], ids=["saving", "switching"])
def test_kills_at_chosen_moments_change_nothing(launcher, command, house, whole, request, acts):
    """Catches any state that a checkpoint leaves out, half-written files that are taken for whole ones, and lines that
    are lost or doubled: seven kills in a row during saves, or around the stage switch."""
    name = request.node.callspec.id
    for act in acts:
        ended = launcher.run(command(name), act=act)
        assert ended.code == -signal.SIGKILL, (act, ended)
    ended = launcher.run(command(name))
    assert ended.code == 0 and "continuing from" in ended.out, ended
    assert_same_run(house.runs / name, whole)
    assert_tidy(house.runs / name)


@settings(
    deadline=None,
    max_examples=3,
    phases=[Phase.generate],  # a failure is a list of three numbers already
    suppress_health_check=list(HealthCheck),
)
@given(counts=st.lists(st.integers(2, 120), min_size=2, max_size=3))
def test_kills_before_any_change_of_the_run_directory_change_nothing(launcher, command, house, whole, counts):
    """Catches the moment nobody thought of: each start is killed before its n-th change of the run directory."""
    name = "random-" + "-".join(map(str, counts))
    shutil.rmtree(house.runs / name, ignore_errors=True)
    for count in counts:
        ended = launcher.run(command(name), act=Act("", count))
        assert ended.code in (0, -signal.SIGKILL), ended
    ended = launcher.run(command(name))
    assert ended.code == 0, ended
    assert_same_run(house.runs / name, whole)
    assert_tidy(house.runs / name)


def test_kill_9_from_outside_at_a_random_time(command, house, whole):
    """Catches what only a real process with real timing shows, such as a line that is torn."""
    arguments, metrics = command("outside"), house.runs / "outside" / "metrics.jsonl"
    wait = random.uniform(0, 1.5)
    begun: list[float] = []

    def due() -> bool:
        if not begun and metrics.exists() and b'"train"' in metrics.read_bytes():
            begun.append(time.monotonic())
        return bool(begun) and time.monotonic() > begun[0] + wait

    ended = kill_real(start_real(arguments, house.root), due)
    assert ended.code in (-signal.SIGKILL, 0), (wait, ended)
    ended = finish_real(start_real(arguments, house.root))
    assert ended.code == 0, (wait, ended)
    assert_same_run(house.runs / "outside", whole)


# -------------------- SIGTERM and Ctrl-C


def test_signals_save_and_the_same_command_goes_on(launcher, command, house, whole):
    """Catches a stop that loses or repeats steps, lines or evaluations: at the stage switch, killed twice while making
    up for the evaluation that it put off, one step later by Ctrl-C, and in the very last step."""
    run_dir = house.runs / "stopped"

    def stopped(act: Act, at: int, name: str) -> None:
        ended = launcher.run(command("stopped"), act=act)
        assert ended.code == 0 and ended.err == "", ended
        assert f"stopped by {name} at {at:,} tokens, saved in {run_dir}/checkpoints/tokens_{at:015d}" in ended.out
        assert "The same command again goes on" in ended.out and course(run_dir)[-1]["tokens"] == at
        assert course(run_dir)[-1]["kind"] == "train", "an evaluation that is due has to wait"

    stopped(Act(LINE, 10, signal.SIGTERM), SWITCH, "SIGTERM")
    for act in (Act("open position_loss/train_0"), Act(f"os.rename {SAVE.format(SWITCH)}")):
        ended = launcher.run(command("stopped"), act=act)
        assert ended.code == -signal.SIGKILL and course(run_dir)[-1]["kind"] == "eval", "made up for, then killed"
    stopped(Act(LINE, 3, signal.SIGINT), 5120, "SIGINT")
    stopped(Act(LINE, 2, signal.SIGTERM), END, "SIGTERM")
    ended = launcher.run(command("stopped"))
    assert ended.code == 0 and f"finished: {END:,} tokens" in ended.out, ended
    assert_same_run(run_dir, whole)
    assert "is finished" in launcher.run(command("stopped")).out


def test_a_stop_within_a_log_interval_leaves_its_line_whole(launcher, command, house):
    """Catches lines that begin or end at a stop: their loss would be another interval's."""
    rare = "logging.every_tokens=1.5K"
    ended = launcher.run(command("rare", rare))
    assert ended.code == 0, ended
    for count, at in ((2, 512), (1, 1024)):
        ended = launcher.run(command("rare-stopped", rare), act=Act(LINE, count, signal.SIGTERM))
        assert ended.code == 0 and f"at {at:,} tokens" in ended.out, ended
    ended = launcher.run(command("rare-stopped", rare))
    assert ended.code == 0, ended
    ours, theirs = (course(house.runs / name, without={"attended_share"}) for name in ("rare-stopped", "rare"))
    assert ours == theirs and [r["tokens"] for r in ours if r["kind"] == "train"][:2] == [1536, 2048]
