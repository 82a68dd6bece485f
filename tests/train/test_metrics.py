"""train/record/metrics.py: the log survives kills, keeps floats exactly and is strict JSON."""

import json
import math
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moba.kinds import Full, Moba
from train.record.metrics import MetricsLog, describe_plan, read_metrics

FULL = Full()
MOBA = Moba(block_size=4, top_k=2)


def stage(name="sparse", index=0, start=0):
    return SimpleNamespace(
        name=name, index=index, start=start, end=start + 900, seq_len=64, batch_tokens=128, attention=(MOBA, MOBA)
    )


def test_describe_plan_names_every_kind_of_layer():
    """Catches a layer-wise hybrid that is logged as if all layers were alike."""
    assert describe_plan((MOBA, MOBA)) == "moba 4x2"
    assert describe_plan((MOBA, MOBA, FULL)) == "moba 4x2 (layers 0-1), full (layer 2)"


@settings(deadline=None, max_examples=50)
@given(st.floats())
def test_floats_come_back_bit_for_bit_and_the_json_is_strict(tmp_path_factory, value):
    """Catches rounded losses (resume is compared through this file) and NaN or Infinity, which are not JSON."""
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    record = MetricsLog(path).write("train", 5, loss=value, nested={"mean": [value, 1]})

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    back = json.loads(path.read_text(), parse_constant=refuse)
    assert back == record
    if math.isfinite(value):
        assert math.copysign(1, back["loss"]) == math.copysign(1, value) and back["loss"] == value
    else:
        assert back["loss"] is None and back["nested"]["mean"] == [None, 1]


def test_cut_back_keeps_what_the_checkpoint_knows_byte_for_byte(tmp_path):
    """Catches kept lines that change, lines beyond the checkpoint that stay, and a torn end that blocks a resume."""
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.stage(stage())
    for tokens in (100, 200, 300):
        log.write("train", tokens, loss=1 / tokens)
    log.write("eval", 200, loss=0.5)
    known = path.read_bytes().splitlines(keepends=True)
    with open(path, "a") as file:
        file.write('{"kind": "train", "tokens": 400, "lo')  # a kill in the middle of a line
    assert [record["tokens"] for record in read_metrics(path)] == [0, 100, 200, 300, 200]

    again = MetricsLog(path)
    again.cut_back(200)
    assert path.read_bytes() == b"".join([*known[:3], known[4]])
    assert again.stage(stage()) is None, "the stage's line is there already"
    wall_before = read_metrics(path)[-1]["wall_seconds"]
    assert again.write("train", 300, loss=1 / 300)["wall_seconds"] >= wall_before
    assert [record["tokens"] for record in read_metrics(path)] == [0, 100, 200, 200, 300]


def test_an_evaluation_that_will_be_made_again_is_forgotten(tmp_path):
    """Catches an evaluation that stands there twice, and one that takes the training line of its step with it."""
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for tokens in (100, 200):
        log.write("train", tokens, loss=1.0)
        log.write("eval", tokens, loss=2.0)
    log.cut_back(200)
    assert [(record["kind"], record["tokens"]) for record in read_metrics(path)][-1] == ("eval", 200)
    log.cut_back(200, evaluated=False)
    kept = [(record["kind"], record["tokens"]) for record in read_metrics(path)]
    assert kept == [("train", 100), ("eval", 100), ("train", 200)]


def test_a_stage_that_began_beyond_the_checkpoint_is_written_again(tmp_path):
    """Catches a stage boundary that is lost or doubled when a kill falls around the switch."""
    path = tmp_path / "metrics.jsonl"
    second = stage("full", 1, start=900)
    log = MetricsLog(path)
    log.stage(stage())
    log.write("train", 900, loss=1.0)
    log.stage(second)
    log.cut_back(800)
    assert [record["stage"] for record in read_metrics(path)] == ["sparse"]
    assert log.stage(second)["stage"] == "full"
    log.cut_back(900)
    assert log.stage(second) is None
    assert [record["kind"] for record in read_metrics(path)] == ["stage", "stage"]


def test_without_a_checkpoint_the_log_starts_again(tmp_path):
    """Catches lines of a first attempt that was killed before its first checkpoint."""
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.cut_back(0)
    log.stage(stage())
    log.write("eval", 0, loss=8.0)
    log.cut_back(0)
    assert path.read_bytes() == b""
    assert log.stage(stage()) is not None


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    """Catches a resume that silently drops history, or fails without saying where."""
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write("train", 100, loss=1.0)
    with open(path, "a") as file:
        file.write("\x00\x00\n")
    log.write("train", 200, loss=1.0)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        log.cut_back(200)
    assert len(path.read_bytes().splitlines()) == 3, "nothing was removed"


def test_other_ranks_write_nothing():
    """Catches a second rank that writes into the same file."""
    log = MetricsLog(None)
    log.cut_back(100)
    assert log.write("train", 100, loss=math.nan)["loss"] is None
    assert log.stage(stage())["stage"] == "sparse"


def test_rollbacks_to_a_checkpoint_are_made_again_by_another_process(tmp_path):
    """Catches the line of a rollback that is doubled after a resume, or lost as the run goes back once more; and time
    that is counted twice where the same process goes on."""
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for kind, tokens in (("rollback", 100), ("train", 200), ("train", 300), ("rollback", 200), ("train", 300)):
        log.write(kind, tokens)

    def left() -> list[tuple[str, int]]:
        return [(record["kind"], record["tokens"]) for record in read_metrics(path)]

    log.cut_back(200, restarted=False)
    assert left() == [("rollback", 100), ("train", 200), ("rollback", 200)]
    assert log.write("train", 300)["wall_seconds"] < 5
    MetricsLog(path).cut_back(200)
    assert left() == [("rollback", 100), ("train", 200)]
