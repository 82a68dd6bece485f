"""run.on_spike end to end: a spike in chosen data is skipped, gone back from, or ends the run.

What is to be expected comes from runs that know nothing of spikes: one whose loss is NaN at the same data, and one
whose loader leaves the same data out.
"""

from __future__ import annotations

import json
import signal
from functools import partial
from pathlib import Path

import pytest
from launch_runs import (
    END,
    LINE,
    SAVE,
    Act,
    assert_refused,
    assert_same_run,
    assert_tidy,
    course,
    let_lines_wait,
    newest,
    weights_of,
)

from train.record.metrics import read_metrics

WATCH = ["run.spike_window=4", "run.spike_deviations=25"]  # from the third step on
SAVED, SPIKE = 1536, 2560  # tokens


def on_data(
    folder: Path,
    spoilt: tuple[int, ...] = (),
    factor: float = 100.0,
    left_out: tuple[int, ...] = (),
    late: bool = False,
) -> None:
    """Makes a rank write down the sum of each step's tokens, multiply the loss where it is one of `spoilt`, and pass
    over steps where it is one of `left_out`; and, if `late`, learn of a skipped step when one on a GPU does."""
    from data.loader import Loader
    from train import loop
    from train.engine.world import launch_environment

    next_step, train_step = Loader.next_step, loop.train_step

    def key(batches) -> int:
        return sum(int(batch.tokens.sum()) for batch in batches)

    def chosen(loader):
        batches = next_step(loader)
        while key(batches) in left_out:
            batches = next_step(loader)
        return batches

    def recorded(engine, batches, **options):
        with open(folder / f"{launch_environment().rank}.jsonl", "a") as file:
            file.write(f"{key(batches)}\n")
        hook = engine.model.register_forward_hook(lambda module, inputs, losses: losses * factor)
        if key(batches) not in spoilt:
            hook.remove()
        result = train_step(engine, batches, **options)
        hook.remove()
        return result

    Loader.next_step, loop.train_step = chosen, recorded
    if late:
        let_lines_wait()


@pytest.fixture(scope="module")
def run(launcher, command, house):
    """name, more overrides, ranks, what is done to the data -> how rank 0 ended, the sums of each step's tokens."""

    def started(name, *more, ranks=1, act=None, **data):
        folder = house.root / "keys" / f"{name}-{len(list((house.root / 'keys').glob('*')))}"
        folder.mkdir(parents=True)
        prepare = partial(on_data, folder, **data)
        if ranks == 1:
            ended = launcher.run(command(name, *more), act=act, prepare=prepare)
        else:
            ended = launcher.run_ranks(command(name, *more), ranks, act=act, prepare=prepare)[0]
        return ended, [[int(key) for key in path.read_text().split()] for path in sorted(folder.glob("*.jsonl"))]

    return started


@pytest.fixture(scope="module")
def keys(run, house, whole) -> list[int]:
    """The sum of the tokens of each step of the run without a spike, which is looked at all the same."""
    ended, (found,) = run("calm", "run.on_spike=rollback", *WATCH)
    assert ended.code == 0 and len(set(found)) == len(found) == 11, ended
    return found


def test_a_run_without_spikes_is_the_same(keys, house, whole):
    """Catches a watch that moves a loss or a weight."""
    calm = house.runs / "calm"
    assert course(calm, without={"spikes"}) == course(whole)
    assert weights_of(calm) == weights_of(whole)
    assert {record["spikes"] for record in course(calm) if record["kind"] == "train"} == {0}
    assert not any("spikes" in record for record in course(whole))


def test_a_skipped_spike_is_a_step_that_was_not_finite(run, keys, house):
    """Catches a spike that moves weights, moments or sums: against the run whose loss is NaN there; also killed and
    resumed in between."""
    spoilt = (keys[4],)
    ended, _ = run("nan", spoilt=spoilt, factor=float("nan"))
    assert ended.code == 0, ended
    for name, acts in (("skip", [None]), ("skip-killed", [Act(f"os.rename {SAVE.format(3072)}"), Act(LINE, 7), None])):
        for act in acts:
            ended, _ = run(name, "run.on_spike=skip", *WATCH, spoilt=spoilt, act=act)
            assert ended.code == (0 if act is None else -signal.SIGKILL), ended
        ours, theirs = (course(house.runs / of, without={"spikes"}) for of in (name, "nan"))
        skipped = [record for record in ours if record["tokens"] == SPIKE]
        assert (
            skipped[0]["grad_norm"] > 20 and skipped[0]["supervised_tokens"] == 0 and skipped[0]["skipped_steps"] == 1
        )
        for record in (*skipped, *(record for record in theirs if record["tokens"] == SPIKE)):
            del record["grad_norm"]
        assert ours == theirs
        assert weights_of(house.runs / name) == weights_of(house.runs / "nan")
    last = course(house.runs / "skip")[-2]
    assert last["kind"] == "train" and last["spikes"] == last["skipped_steps"] == 1
    assert_same_run(house.runs / "skip-killed", house.runs / "skip")


def test_a_skipped_step_that_is_known_late_is_the_same(run, keys, house):
    """Catches counts of a log interval that miss a skipped step, or have one too many, where the step is known to be
    skipped after the next has begun: within an interval, at its end, and in the last step."""
    for late in (False, True):
        skipped = tuple(keys[i] for i in (4, 5, 10))
        ended, _ = run(f"some-{late}", "logging.every_tokens=1.5K", spoilt=skipped, factor=float("nan"), late=late)
        assert ended.code == 0, ended
    assert_same_run(house.runs / "some-True", house.runs / "some-False")
    assert course(house.runs / "some-True")[-2]["skipped_steps"] == 3


def test_a_limit_on_bad_steps_that_is_reached_late_says_the_same(run, keys):
    """Catches a limit that is found a step too late, or names another checkpoint."""
    for late in (False, True):
        bad = (keys[3], keys[4])
        ended, _ = run(f"limit-{late}", "optim.max_bad_steps=2", spoilt=bad, factor=float("nan"), late=late)
        assert ended.code != 0 and "Traceback" not in ended.err, ended
        assert "2 steps in a row" in ended.err and f"up to {SPIKE:,} tokens" in ended.err, ended
        assert f"tokens_{SAVED:015d}" in ended.err, ended


@pytest.mark.parametrize(("ranks", "engine"), [(1, "zero1"), (2, "zero3")])
def test_after_a_rollback_the_run_is_one_that_never_saw_the_data(run, keys, house, ranks, engine):
    """Catches a state that is not the checkpoint's, data that is seen again or left out behind the spike, and lines of
    the lost stretch; and, killed at several moments after the rollback, another course the second time."""
    name, settings = f"back-{engine}", [f"deepspeed={engine}", "run.on_spike=rollback", *WATCH]
    each = [keys]
    if ranks == 2:
        ended, each = run("calm-2", f"deepspeed={engine}", ranks=2)
        assert ended.code == 0, ended
    lost = tuple(of_rank[step] for of_rank in each for step in (3, 4))
    spoilt = tuple(of_rank[4] for of_rank in each)
    ended, expected = run(f"{name}-never", f"deepspeed={engine}", ranks=ranks, left_out=lost)
    assert ended.code == 0, ended
    ended, seen = run(name, *settings, ranks=ranks, spoilt=spoilt)
    assert ended.code == 0 and "is a spike (loss" in ended.out and "going back to" in ended.out, ended
    for ours, theirs in zip(seen, expected, strict=True):
        assert ours[:3] + ours[5:] == theirs, "the same data, in order"
        assert set(lost) & set(ours) == set(ours[3:5]) and len(set(ours)) == len(ours) == 13

    records = course(house.runs / name, without={"spikes"})
    went_back = [record for record in records if record["kind"] == "rollback"]
    assert [(r["tokens"], r["from_tokens"], r["in_a_row"]) for r in went_back] == [(SAVED, SPIKE, 1)]
    assert went_back[0]["loss"] > 300
    assert [r for r in records if r["kind"] != "rollback"] == course(house.runs / f"{name}-never")
    assert weights_of(house.runs / name) == weights_of(house.runs / f"{name}-never")
    assert_tidy(house.runs / name)

    killed = f"{name}-killed"
    acts = [Act(LINE, 8), Act(f"os.rename {SAVE.format(3072)}"), Act("open checkpoints/.latest", 2)]
    for act in acts if ranks == 1 else acts[1:2]:
        ended, _ = run(killed, *settings, ranks=ranks, spoilt=spoilt, act=act)
        assert ended.code == -signal.SIGKILL, ended
    ended, _ = run(killed, *settings, ranks=ranks, spoilt=spoilt)
    assert ended.code == 0, ended
    assert course(house.runs / killed) == course(house.runs / name)
    assert weights_of(house.runs / killed) == weights_of(house.runs / name)


def test_rollbacks_to_one_checkpoint_come_to_an_end(run, keys, house):
    """Catches a run that goes back for ever, or that forgets its rollbacks: everything behind the first three steps is
    a spike until the data of six more steps is used up."""
    ended, seen = run("back-often", "run.on_spike=rollback", *WATCH, spoilt=tuple(keys[3:6]))
    assert ended.code == 0, ended
    rollbacks = [record for record in course(house.runs / "back-often") if record["kind"] == "rollback"]
    assert [(r["from_tokens"], r["in_a_row"]) for r in rollbacks] == [(2048, 1), (2048, 2), (2048, 3)]
    assert course(house.runs / "back-often")[-2]["spikes"] == 3 and seen[0][:7] == keys[:7]

    ended, seen = run("back-for-ever", "run.on_spike=rollback", *WATCH, spoilt=tuple(keys[3:]))
    assert_refused(
        ended, "is a spike", "the 4th since the newest checkpoint", "tokens_000000000001536", "on_spike=skip"
    )
    assert seen[0] == keys[:7]


def test_before_the_first_checkpoint_a_spike_is_skipped(run, keys, house):
    """Catches a rollback to nowhere."""
    ended, _ = run("back-early", "run.on_spike=rollback", *WATCH, spoilt=(keys[2],))
    assert ended.code == 0 and "skipped, since there is no checkpoint to go back to yet" in ended.out, ended
    assert course(house.runs / "back-early")[-2]["spikes"] == 1


def test_a_spike_may_end_the_run(run, keys, house):
    """Catches a stop that saves, that touches the weights, or that cannot be gone on from as its message says."""
    run_dir, spoilt = house.runs / "stop", (keys[4],)
    ended, _ = run("stop", "run.on_spike=stop", *WATCH, spoilt=spoilt)
    assert_refused(ended, f"the step up to {SPIKE:,} tokens is a spike", "run.on_spike=stop", f"{newest(run_dir)}")
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["latest", f"tokens_{SAVED:015d}"]
    assert course(run_dir)[-1]["tokens"] == SPIKE - 512
    ended, _ = run("stop", "run.on_spike=skip", *WATCH, spoilt=spoilt)
    assert_refused(ended, "run.on_spike: stop -> skip", "run.allow_changes=true")
    ended, _ = run("stop", "run.on_spike=skip", "run.allow_changes=true", *WATCH, spoilt=spoilt)
    assert ended.code == 0, ended
    assert json.loads((newest(run_dir) / "state.json").read_text())["tokens"] == END
    lines = [r for r in read_metrics(run_dir / "metrics.jsonl") if r["kind"] == "train"]
    assert lines[-1]["spikes"] == 1
