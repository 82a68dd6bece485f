"""The main job end to end: launch/train.py run, killed at exact and at random moments, stopped, and resumed.

One small run, two stages of different attention, length, batch and RoPE (launch_runs.py), is compared with itself under
all that may happen to it. What it refuses is in test_train_refusals.py.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from launch_runs import (
    END,
    LINE,
    SAVE,
    SWITCH,
    Act,
    assert_close_course,
    assert_lost,
    assert_refused,
    assert_same_run,
    assert_tidy,
    course,
    end_of,
    finish_real,
    has_lines,
    let_lines_wait,
    newest,
    rank_0,
    start_real,
    train_losses,
    wait_until,
    weights_of,
)
from safetensors.torch import load_file

from train.loop import Trainer
from train.record.metrics import read_metrics

# -------------------- the run as a user starts it


def test_the_real_command_leaves_all_it_promises(house, whole):
    """Catches a missing or empty output, ends of stages that are not kept, and a trailing loss that does not fall."""
    out = (house.root / "whole.txt").read_text()
    assert out.startswith("Plan of quickstart") and "stage full: full, context 512" in out
    assert f"finished: {END:,} tokens" in out and str(end_of(whole)) in out
    plan, data = (whole / "plan.txt").read_text().split("  data ")
    epochs = next(line for line in data.splitlines() if "epochs of" in line).strip()
    assert plan in out and epochs in out  # the data line with its epochs is said once the documents are counted
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
        ended = launcher.run(command(name, "checkpoint.asynchronous=false"), act=act)
        assert ended.code == -signal.SIGKILL, (act, ended)
    ended = launcher.run(command(name, "checkpoint.asynchronous=false"))
    assert ended.code == 0 and "continuing from" in ended.out, ended
    assert_same_run(house.runs / name, whole)
    assert_tidy(house.runs / name)


def test_kills_after_the_last_step_are_mended_by_the_next_start(launcher, command, house, whole):
    """Catches a finished run whose `latest` names an older checkpoint for ever: killed while the last one is written,
    then once it has its name."""
    for act in (Act(f"os.rename {SAVE.format(END)}"), Act("open checkpoints/.latest")):
        ended = launcher.run(command("ended", "checkpoint.asynchronous=false"), act=act)
        assert ended.code == -signal.SIGKILL, (act, ended)
    assert (house.runs / "ended" / "checkpoints" / "latest").read_text().strip() != f"tokens_{END:015d}"
    for _ in range(2):
        ended = launcher.run(command("ended", "checkpoint.asynchronous=false"))
        assert ended.code == 0, ended
    assert "is finished" in ended.out
    assert_same_run(house.runs / "ended", whole)
    assert_tidy(house.runs / "ended")


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
    arguments, wait = command("outside"), random.uniform(0, 1.5)
    process = start_real(arguments, house.root)
    wait_until(lambda: has_lines(house.runs / "outside", 1), process)
    time.sleep(wait)
    process.kill()
    ended = finish_real(process)
    assert ended.code in (-signal.SIGKILL, 0), (wait, ended)
    ended = finish_real(start_real(arguments, house.root))
    assert ended.code == 0, (wait, ended)
    assert_same_run(house.runs / "outside", whole)


def write_slowly(fail_at: str = "") -> None:
    """Makes each file of a checkpoint take longer than a step; a full disk where its path contains `fail_at`."""
    from train.checkpoint import checkpoint_dir

    seal = checkpoint_dir.seal

    def slow(path: Path, mode: int):
        time.sleep(0.1)
        if fail_at and fail_at in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return seal(path, mode)

    checkpoint_dir.seal = slow


def test_kills_while_training_goes_on_beside_a_save_change_nothing(launcher, command, house, whole):
    """Catches steps that reach a checkpoint being written, and one that is taken up half-written: twenty kills in a
    row in four saves, each before another of the 21 changes from making the folder to its rename, while steps go on."""
    run_dir, ahead = house.runs / "beside", []
    for number in range(20):
        turn, tokens = number % 5, (1536, 3072, SWITCH, 5120)[number // 5]
        act = Act(SAVE.format(tokens), 4 * turn + number // 5 + 2)
        ended = launcher.run(command("beside"), act=act, prepare=write_slowly)
        assert ended.code == -signal.SIGKILL, (act, ended)
        saving = [int(path.name[-15:]) for path in (run_dir / "checkpoints").glob(".saving_tokens_*")]
        ahead += [course(run_dir)[-1]["tokens"] > tokens for tokens in saving]
    assert sum(ahead) > 5, "steps did go on"
    ended = launcher.run(command("beside"), prepare=write_slowly)
    assert ended.code == 0 and "continuing from" in ended.out, ended
    assert_same_run(run_dir, whole)
    assert_tidy(run_dir)
    records = [r for r in read_metrics(run_dir / "metrics.jsonl") if r["kind"] == "train"]
    assert max(r["save_write_seconds"] for r in records) > 0.5, "nine files of 0.1 s"


def test_a_full_disk_beside_the_training_ends_the_run(launcher, command, house, whole):
    """Catches a failed write that nobody hears of, one that takes the earlier checkpoint with it, and a run that cannot
    go on from there."""
    run_dir = house.runs / "full-disk"
    full = partial(write_slowly, fail_at=f"{SAVE.format(3072)}/position_loss")
    ended = launcher.run(command("full-disk", "eval.every_tokens=0"), prepare=full)
    assert_refused(ended, "could not save tokens_000000000003072 in", "rank 0: ", "No space left", "Earlier")
    assert 3072 < course(run_dir)[-1]["tokens"] <= SWITCH, "steps had gone on, up to the next save"
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["latest", "tokens_000000000001536"]
    ended = launcher.run(command("full-disk"))
    assert ended.code == 0 and "continuing from" in ended.out, ended
    assert weights_of(run_dir) == weights_of(whole)


def test_saving_at_once_makes_the_same_run(launcher, command, house, whole):
    """Catches an option that changes the trajectory or the files."""
    ended = launcher.run(command("at-once", "checkpoint.asynchronous=false"))
    assert ended.code == 0, ended
    assert_same_run(house.runs / "at-once", whole)


def test_lines_that_are_written_after_the_next_step_began_are_the_same(launcher, command, house, whole):
    """Catches a line with a number of the next step, one that comes behind an evaluation, a checkpoint or a stage that
    it should stand before, and one that is lost at a stop, a kill or the end."""
    ended = launcher.run(command("late"), prepare=let_lines_wait)
    assert ended.code == 0, ended
    assert_same_run(house.runs / "late", whole)
    killed = launcher.run(command("late-killed"), act=Act(LINE, 6), prepare=let_lines_wait)
    stopped = launcher.run(command("late-killed"), act=Act(LINE, 5, signal.SIGTERM), prepare=let_lines_wait)
    assert killed.code == -signal.SIGKILL and stopped.code != 0 and newest(house.runs / "late-killed") != end_of(whole)
    assert launcher.run(command("late-killed"), prepare=let_lines_wait).code == 0
    assert_same_run(house.runs / "late-killed", whole)


def settle_each_second() -> None:
    """Makes the end of each step known a second after that of the step before, by the clock that measures speed."""
    let_lines_wait()
    from train.record import throughput

    clock, settle = SimpleNamespace(now=0.0), Trainer._settle

    def settled(trainer):
        clock.now += trainer._unknown is not None
        settle(trainer)

    throughput.time = SimpleNamespace(perf_counter=lambda: clock.now)
    Trainer._settle = settled


def test_a_line_has_the_time_of_its_own_steps(launcher, command, house):
    """Catches a clock that is read when a step is queued, so that the first line after a start, a save or an evaluation
    is too fast."""
    assert launcher.run(command("clock"), prepare=settle_each_second).code == 0
    lines = [record for record in read_metrics(house.runs / "clock" / "metrics.jsonl") if record["kind"] == "train"]
    assert len(lines) == 11 and {line["seconds"] for line in lines} == {1.0}
    assert {line["tokens_per_second"] for line in lines} == {512, 1024}


def draw_random_numbers() -> None:
    """Makes each micro-batch draw from every generator, as dropout would."""
    from train.loop import Trainer

    count = Trainer._count

    def drawn(trainer, losses, batch) -> None:
        torch.rand(3), np.random.standard_normal(3), random.gauss(0, 1)
        count(trainer, losses, batch)

    Trainer._count = drawn


def test_random_numbers_go_on_where_they_were(launcher, command, house):
    """Catches generators that start again after a resume. No part of the model draws any today."""
    short = ["schedule.tokens=2K", "data.validation=null"]
    acts = {"drawn": [None], "drawn-killed": [Act(f"os.rename {SAVE.format(2560)}"), None]}
    for name, starts in acts.items():
        for act in starts:
            ended = launcher.run(command(name, *short), act=act, prepare=draw_random_numbers)
            assert ended.code == (0 if act is None else -signal.SIGKILL), ended
    assert "continuing from" in ended.out
    states = [load_file(newest(house.runs / name) / "rng-rank00000.safetensors") for name in acts]
    saved = load_file(min((house.runs / "drawn" / "checkpoints").glob("tokens_*")) / "rng-rank00000.safetensors")
    for key, state in states[0].items():
        assert torch.equal(state, states[1][key]), key
    assert not torch.equal(states[0]["torch"], saved["torch"]), "numbers were drawn between the checkpoints"


# -------------------- SIGTERM and Ctrl-C


def test_signals_save_and_the_same_command_goes_on(launcher, command, house, whole):
    """Catches a stop that loses or repeats steps, lines or evaluations: at the stage switch, killed twice while making
    up for the evaluation that it put off, one step later by Ctrl-C, and in the very last step."""
    run_dir = house.runs / "stopped"

    def stopped(act: Act, at: int, name: str) -> None:
        ended = launcher.run(command("stopped"), act=act)
        assert ended.code == 128 + signal.Signals[name] and ended.err == "", ended
        assert "finished" not in ended.out, ended
        assert (
            f"stopped by {name} at {at:,} tokens, checkpoint saved: {run_dir}/checkpoints/tokens_{at:015d}" in ended.out
        )
        assert "Run the same command again to continue" in ended.out and course(run_dir)[-1]["tokens"] == at
        assert course(run_dir)[-1]["kind"] == "train", "an evaluation that is due has to wait"

    ended = launcher.run(command("stopped"), act=Act("os.mkdir ", 1, signal.SIGINT))
    assert (ended.code, ended.err) == (130, "interrupted\n"), "there is nothing to save yet"
    stopped(Act(LINE, 10, signal.SIGTERM), SWITCH, "SIGTERM")
    for act in (Act("open position_loss/train_0"), Act(f"os.rename {SAVE.format(SWITCH)}")):
        ended = launcher.run(command("stopped"), act=act)
        assert ended.code == -signal.SIGKILL and course(run_dir)[-1]["kind"] == "eval", "made up for, then killed"
    stopped(Act(LINE, 3, signal.SIGINT), 5120, "SIGINT")
    stopped(Act(LINE, 1, signal.SIGUSR1), 6144, "SIGUSR1")
    stopped(Act(LINE, 1, signal.SIGTERM), END, "SIGTERM")
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
        assert ended.code == 128 + signal.SIGTERM and f"at {at:,} tokens" in ended.out, ended
    ended = launcher.run(command("rare-stopped", rare))
    assert ended.code == 0, ended
    ours, theirs = (course(house.runs / name, without={"attended_share"}) for name in ("rare-stopped", "rare"))
    assert ours == theirs and [r["tokens"] for r in ours if r["kind"] == "train"][:2] == [1536, 2048]


# -------------------- another number of ranks


def test_ranks_may_come_and_go(launcher, command, house, whole):
    """Catches data, sums or weights that depend on the number of ranks: a run of two under torchrun has a rank killed
    and goes on alone; one alone is killed, goes on as two under torchrun, loses its other rank, and is stopped by
    SIGTERM. Each part has the uninterrupted run's losses. Also a survivor, rank 0 or not, that leaves a traceback, says
    nothing, or hangs."""
    run_dir = house.runs / "two-one"
    process = start_real(command("two-one", "checkpoint.asynchronous=false"), house.root, num_ranks=2)
    wait_until(lambda: has_lines(run_dir, 4), process)
    os.kill(victim := rank_0(run_dir), signal.SIGKILL)
    assert_lost(finish_real(process), victim)
    assert read_metrics(run_dir / "metrics.jsonl")[0]["num_devices"] == 2
    ended = launcher.run(command("two-one", "checkpoint.asynchronous=false"))
    assert ended.code == 0 and "continuing from" in ended.out, ended
    assert_close_course(run_dir, whole)

    ended = launcher.run(command("one-two", "checkpoint.asynchronous=false"), act=Act(LINE, 9))
    assert ended.code == -signal.SIGKILL, ended
    run_dir = house.runs / "one-two"
    before = len(train_losses(run_dir))
    process = start_real(command("one-two", "checkpoint.asynchronous=false"), house.root, num_ranks=2)
    wait_until(lambda: has_lines(run_dir, before + 1), process)
    other = next(rank for rank in psutil.Process(process.pid).children() if rank.pid != rank_0(run_dir))
    other.kill()
    assert_lost(finish_real(process), other.pid)
    before = len(train_losses(run_dir))
    process = start_real(command("one-two", "checkpoint.asynchronous=false"), house.root, num_ranks=2)
    wait_until(lambda: has_lines(run_dir, before + 1), process)
    process.send_signal(signal.SIGTERM)
    ended = finish_real(process)
    assert "continuing from" in ended.out and "Run the same command again to continue" in ended.out, ended
    assert ended.code > 0 and ended.out.count("stopped by SIGTERM at") == 1 and "finished:" not in ended.out, ended
    for ended in launcher.run_ranks(command("one-two", "checkpoint.asynchronous=false"), 2):
        assert ended.code == 0, ended
    assert_close_course(run_dir, whole)


def test_two_ranks_repeat_bit_for_bit(launcher, command, house, whole):
    """Catches sums over ranks that are resumed in another order, state that only rank 0 saves, and a survivor that
    says anything but one line where the other is killed in a save."""
    for ended in launcher.run_ranks(command("two"), 2):
        assert ended.code == 0, ended
    first, second = launcher.run_ranks(command("two-killed"), 2, act=Act(f"os.rename {SAVE.format(SWITCH)}"))
    assert first.code == -signal.SIGKILL, first
    assert second.code and second.err.count("\n") == second.err.count("error: the process of rank 0 (pid ") == 1, second
    for ended in launcher.run_ranks(command("two-killed"), 2):
        assert ended.code == 0, ended
    assert course(house.runs / "two-killed") == course(house.runs / "two")
    assert_close_course(house.runs / "two", whole)
    ours, theirs = (weights_of(house.runs / name) for name in ("two-killed", "two"))
    assert ours == theirs


@pytest.mark.parametrize(("sequence", "exchanges"), [(2, ("heads", "blocks")), (4, ("blocks", "heads"))])
def test_a_sequence_may_be_shared_by_any_number(launcher, command, house, whole, sequence, exchanges):
    """Catches losses, sums or data positions that depend on how many processes share a sequence, or how: one of four (2
    x 2, or 4 with one sequence) is killed, two that share a sequence go on with the other exchange and are killed, one
    alone goes on to the end, evaluations included."""
    name = f"shared-{sequence}"
    settings = ((Act(LINE, 9), 4, sequence, exchanges[0]), (Act(LINE, 8), 2, 2, exchanges[1]), (None, 1, 1, "auto"))
    for act, num_ranks, sequence, by in settings:
        shared = [f"parallel.sequence={sequence}", f"parallel.sequence_by={by}"]
        arguments = command(name, *shared, "checkpoint.asynchronous=false")
        ended = launcher.run_ranks(arguments, num_ranks, act=act) if num_ranks > 1 else [launcher.run(arguments)]
        assert ended[0].code == (0 if act is None else -signal.SIGKILL), ended[0]
        if num_ranks < 4:
            assert "continuing from" in ended[0].out, ended[0]
    assert_close_course(house.runs / name, whole)


def test_workers_end_with_a_torchrun_that_was_killed(command, house):
    """Catches workers that train on as orphans and hold the run's lock: kill -9 tells them nothing."""
    run_dir = house.runs / "orphans"
    process = start_real(command("orphans", "schedule.tokens=2M"), house.root, num_ranks=2)
    wait_until(lambda: has_lines(run_dir, 2), process)
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    process.kill()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive
    out = process.communicate(timeout=60)[0]
    assert "stopped by the end of torchrun at" in out and len(list((run_dir / "checkpoints").glob("tokens_*"))) >= 1


# -------------------- what a switch and an evaluation must not touch


def record_switches(path: Path) -> None:
    """Makes the run write down a digest of all that its engine holds before and after each stage is entered."""
    from train.engine.engine import MASTER, MOMENTS
    from train.loop import Trainer

    enter = Trainer._enter

    def digest(trainer: Trainer) -> list[str]:
        keys = (MASTER, *MOMENTS)
        held = [trainer.engine.gather(s, k, 0) for s in trainer.engine.slots() for k in keys]
        held += [parameter.detach() for parameter in trainer.model.parameters()]
        return [hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for tensor in held]

    def recorded(trainer: Trainer, stage):
        if stage is trainer.stage:
            return enter(trainer, stage)
        before = digest(trainer), trainer.engine.step_count(), str(trainer.model.attention)
        entered = enter(trainer, stage)
        after = digest(trainer), trainer.engine.step_count(), str(trainer.model.attention)
        with open(path, "a") as file:
            file.write(json.dumps([stage.name, before, after]) + "\n")
        return entered

    Trainer._enter = recorded


def test_a_switch_touches_no_parameter_and_no_optimizer_state(launcher, command, house, whole):
    """Catches a switch that resets moments, casts weights or counts a step: from MoBA to full attention and back."""
    path = house.root / "switches.jsonl"
    back = ["+schedule.stages.back.tokens=1K", "schedule.stages.full.tokens=20%", "logging.every_tokens=1M"]
    ended = launcher.run(command("switches", *back), prepare=partial(record_switches, path))
    assert ended.code == 0, ended
    switches = [json.loads(line) for line in path.read_text().splitlines()]
    assert [name for name, *_ in switches] == ["sparse", "full", "back"]
    digests = []
    for name, (held, steps, plan), (held_after, steps_after, plan_after) in switches:
        assert held == held_after and steps == steps_after, name
        assert plan != plan_after or name == "sparse", "the attention did change"
        digests.append(held)
    assert len(set(digests[1])) > 20 and digests[0] != digests[1] != digests[2], "there was something to disturb"


def test_moba_that_attends_to_all_blocks_is_full_attention(launcher, command, house):
    """Catches a sparse path that loses or repeats pairs where nothing is to be left out."""
    short = ["schedule.tokens=2K", "data.validation=null", "schedule.stages.full.rope.theta=null"]
    for name, attention in (("dense-moba", ["top_k=16", "backend=torch"]), ("dense-full", ["kind=full"])):
        stage = [f"schedule.stages.sparse.attention.{setting}" for setting in attention]
        ended = launcher.run(command(name, *short, *stage))
        assert ended.code == 0, ended
    ours, theirs = (train_losses(house.runs / name) for name in ("dense-moba", "dense-full"))
    assert list(ours) == list(theirs) and len(ours) >= 4
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5)
    sparse = read_metrics(house.runs / "dense-moba" / "metrics.jsonl")
    assert {r["attention"] for r in sparse if r["kind"] == "stage"} == {"moba 16x16", "full"}


def test_evaluations_only_observe(launcher, command, house, whole):
    """Catches an evaluation that moves weights, random state, data or the log's intervals."""
    ended = launcher.run(command("unwatched", "data.validation=null"))
    assert ended.code == 0, ended
    without = course(house.runs / "unwatched")
    assert without == [record for record in course(whole) if record["kind"] != "eval"]
    assert weights_of(house.runs / "unwatched") == weights_of(whole)


# -------------------- a new run from another's weights

CONSTANT = ["optim.lr.kind=constant", "optim.lr.warmup_tokens=0", "~schedule.stages.full", "data.validation=null"]
CONSTANT += ["schedule.stages.sparse.tokens=100%"]


def test_two_chained_runs_are_one(launcher, command, house):
    """Catches anything that init.optimizer and init.data leave behind: with both, at a constant rate, the second run
    goes on where the first ended; without, it has the weights alone."""
    two_steps = ["schedule.tokens=2K", *CONSTANT]
    chain = [f"init.source={house.runs / 'first'}"]
    for name, arguments in (
        ("one", ["schedule.tokens=4K", *CONSTANT]),
        ("first", two_steps),
        ("second", [*two_steps, *chain, "init.optimizer=true", "init.data=true"]),
        ("weights", [*two_steps, *chain]),
    ):
        ended = launcher.run(command(name, *arguments))
        assert ended.code == 0, ended
        if name in ("second", "weights"):
            taken = "weights, optimizer state, data position" if name == "second" else "weights"
            assert f"starting from {house.runs}/first/checkpoints/tokens_000000000002048: {taken}\n" in ended.out
    one, first, second, weights = (
        {r["tokens"]: (r["loss"], r["grad_norm"]) for r in course(house.runs / name) if r["kind"] == "train"}
        for name in ("one", "first", "second", "weights")
    )
    assert len(one) == 8 and len(first) == len(second) == len(weights) == 4
    assert one == first | {2048 + tokens: pair for tokens, pair in second.items()}
    ours, theirs = (newest(house.runs / name) for name in ("second", "one"))
    for file in ("model-00001-of-00001.safetensors", "optimizer-00001-of-00001.safetensors"):
        assert (ours / file).read_bytes() == (theirs / file).read_bytes()
    assert weights[512][0] < first[512][0] - 0.2, "the same first batch, better weights"
    assert set(weights.values()).isdisjoint(second.values())
    assert json.loads((newest(house.runs / "weights") / "state.json").read_text())["optimizer_step"] == 4


# -------------------- cadence


@settings(deadline=None, max_examples=200)
@given(steps=st.lists(st.integers(1, 50), min_size=1, max_size=30), every=st.integers(0, 120))
def test_what_is_due_is_due_once_for_each_multiple_passed(steps, every):
    """Catches a cadence that drifts, or misses multiples that lie within a step."""
    tokens, due_at = 0, []
    for step in steps:
        tokens += step
        if Trainer._due(SimpleNamespace(tokens=tokens), every, SimpleNamespace(batch_tokens=step)):
            due_at.append(tokens)
    ends = list(itertools.accumulate(steps))
    multiples = range(every, tokens + 1, every) if every else ()
    assert due_at == sorted({min(end for end in ends if end >= multiple) for multiple in multiples})
