"""The study `small`: its arms compose, its runs are stopped in time, and its numbers are those of the files."""

import json
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from pyarrow import Table, parquet

from benchmarks import common, small_results, study, windows
from benchmarks.studies import CUTS, FROM_NOTHING, SIZES, STUDIES
from data.shards import TokenShards, write_meta, write_shard
from data.tokenizer import load_tokenizer
from evals.position_loss import Evaluation
from launch.config import load

EDGES = np.arange(0, 8193, 512)
IDS = [f"package{i % 5}:{i}" for i in range(15)]


@pytest.fixture
def command(tmp_path):
    """The study as it would be asked for."""
    values = {"data": "embedded", "validation": "embedded", "documents": "124", "cuts": "cuts", "cluster": "[^:]*"}
    return study.Command(STUDIES["small"], values, (), tmp_path / "runs")


@pytest.mark.parametrize("name", [arm for arm in FROM_NOTHING if not arm.startswith("sft")])
def test_every_arm_has_the_tokens_of_its_size_and_the_attention_of_its_name(name, command):
    """Catches an override that was renamed since, and arms whose attention is not what their name says."""
    config = load(command.training(name, 3))
    assert config.run.seed == 3 and config.run.allow_changes == (not name.startswith("start"))
    short, *others = config.schedule.stages.values()
    share = next(share for size, (_, share) in reversed(SIZES.items()) if name.endswith(size))
    assert short.tokens == int(2000 * share) * 16384 and short.attention.kind == "full"
    assert bool(others) == (not name.startswith("start"))
    if others:
        first, last = others
        assert first.tokens == 9 * last.tokens and last.tokens == int(90 * share) * 32768
        assert config.optim.lr.options["decay_tokens"] == last.tokens
        kinds = first.attention.kind, last.attention.kind
        assert kinds == (("full",) * 2 if name.startswith("full") else ("moba", "full" if "then" in name else "moba"))
        assert (first.attention.options["first_blocks"] == 1) == (name == "moba, first block")
        if name[0].isdigit():
            sizes = [first.attention.options[key] for key in ("block_size", "top_k")]
            assert name == f"{sizes[0]}x{sizes[1]}" and sizes[0] * sizes[1] == 2048


def test_what_is_fine_tuned_has_the_layers_of_its_name(command):
    """Catches fine-tuning of other weights, without their first block, or with layers in the name alone."""
    for name in (arm for arm in FROM_NOTHING if arm.startswith("sft")):
        words = command.training(name, 3)
        assert f"init.source={command.folder('moba, first block', 3)}" in words
        (stage,) = load([*words, "model=tiny", "model.num_layers=6", "init.source=null"]).schedule.stages.values()
        assert stage.attention.options["first_blocks"] == 1 and stage.attention.full_last == int(name[5])


def test_tasks_bring_what_they_go_on_from_and_come_behind_it():
    """Catches a run that waits for one that nobody makes, a seed of one arm that goes to all, and another order than
    the one asked for."""
    found = study.tasks_of(STUDIES["small"], ["full, 6.1M@0", "moba, then full", "moba", "1024x2@1"], [0, 1])
    assert found[:2] == [("start, 6.1M", 0), ("full, 6.1M", 0)]
    each = ("start", "moba", "moba, then full")
    assert found[2:] == [*((name, 0) for name in each), *((name, 1) for name in each), ("1024x2", 1)]
    chain = STUDIES["small"].chain("sft, 3 full")
    assert chain == ["start", "moba, first block", "sft, 3 full"]


def test_what_runs_is_ended_when_time_is_up(tmp_path, monkeypatch, command, capsys):
    """Catches a study that outlives its minutes, one that begins something after them, and one that gives up then."""
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "train.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setattr(common, "_time_is_up", threading.Event())
    began = time.monotonic()
    timed = replace(command, values={**command.values, "minutes": "0.02", "jobs": "1"})
    study.run_all(timed, [("start", 0), ("start", 1), ("full", 0)], began)
    said = capsys.readouterr().out
    assert time.monotonic() - began < 30 and "start_seed1: train.py was not begun: time is up" in said
    assert "start_seed0: train.py failed with exit status -15" in said
    assert "start_seed0 did not come to the end of its stage 1" in said


def test_places_go_to_the_first_in_the_order_and_to_all_gpus(monkeypatch):
    """Catches a run of little value that is made before one of more, a GPU that is left idle, and more runs at a time
    than places."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    places, order, gpus, lock = common.Places(2), [], [], threading.Lock()
    held = [places.taken(turn) for turn in (0, 1)]
    assert {place.__enter__() for place in held} == {"3", "5"}

    def work(turn):
        with places.taken(turn) as gpu, lock:
            order.append(turn)
            gpus.append(gpu)

    threads = [threading.Thread(target=work, args=(turn,)) for turn in (4, 2, 5, 3)]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    assert order == []
    held[1].__exit__(None, None, None)
    for thread in threads:
        thread.join(10)
    assert order == [2, 3, 4, 5] and set(gpus) == {"5"}


def test_ends_of_documents_are_the_same_tokens(tmp_path, monkeypatch):
    """Catches ends that are shifted by a token, so that other predictions would be compared, and short documents."""
    tokenizer = load_tokenizer("bpe-4k")
    documents = [(np.arange(length) % 4000 + i).astype(tokenizer.dtype) for i, length in enumerate((9000, 8192, 8193))]
    (tmp_path / "whole").mkdir()
    record = write_shard(tmp_path / "whole", 0, documents, ["a", "b", "c"])
    write_meta(tmp_path / "whole", tokenizer, [record], {})
    monkeypatch.setattr(sys, "argv", ["windows.py", f"source={tmp_path}/whole", f"to={tmp_path}/ends"])
    windows.main()
    ends = TokenShards(tmp_path / "ends" / "1024")
    assert ends.ids == ["a", "c"] and ends.lengths.tolist() == [1537] * 2
    assert ends.tokens(0, 0, 1537).tolist() == documents[0][8193 - 1537 : 8193].tolist()
    assert TokenShards(tmp_path / "ends" / "4096").lengths.tolist() == [4609] * 2


def write_run(folder, losses, late_loss=5.0):
    """A run's files: its losses by position [N, B] at these tokens, and a training loss behind the switch."""
    stage = {"kind": "stage", "tokens": 0, "stage": "first", "seq_len": 8192, "attention": "full", "end": max(losses)}
    speeds = dict.fromkeys(("tflops", "mfu", "mfu_dense_equivalent", "attended_share", "peak_memory_gib"))
    train = {"kind": "train", "tokens": 1, "step": 1, "stage": "first", "loss": 5.0, "tokens_per_second": 7.0, **speeds}
    rows = [{"kind": "run", "tokens": 0, "device": "a GPU"}, stage, train, train | {"tokens": 2, "loss": late_loss}]
    for tokens, loss_NB in losses.items():
        found = Evaluation.of_documents(EDGES, IDS, [f"key of {name}" for name in IDS], IDS, loss_NB)
        found.result("x").write(folder / "position_loss", f"eval_{tokens:015d}")
        ends = {"loss": float(np.nanmean(loss_NB)), "trailing_loss": float(loss_NB[:, -1].mean())}
        rows.append({"kind": "eval", "tokens": tokens, **ends})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_numbers_are_those_of_the_files(tmp_path, monkeypatch, command):
    """Catches gaps of unlike tokens or with the wrong sign, a recovered share that is not of the last bucket, seeds
    that are not averaged, and clusters that are single documents."""
    generator = np.random.default_rng(0)
    base_NB = 3 - np.linspace(0, 0.8, 16) + generator.normal(0, 0.3, (15, 1))
    slope_B = np.linspace(0, 1, 16)
    arms = {"full": 0.0, "moba": 0.2, "moba, then full": 0.05, "moba, first block": 0.1, "1024x2": 0.3, "64x32": 0.15}
    for arm, gap in arms.items():
        for seed in (0, 1):
            folder = command.folder(arm, seed)
            loss_NB = base_NB + gap * (1 + 0.1 * (seed - 0.5)) * slope_B
            for line, context, more in ((CUTS[0], 1024, 0.4), (CUTS[2], 4096, 0.1)):
                edges = np.arange(0, context + 513, 512)
                cut_NB = np.repeat(loss_NB[:, -1:] + more, len(edges) - 1, axis=1)
                found = Evaluation.of_documents(edges, IDS, [f"end of {name}" for name in IDS], IDS, cut_NB)
                found.result("x").write(folder / "evals" / f"tokens_2_{study.named(line)}", "cut")
            at = {100: loss_NB + 1, 200: loss_NB} | ({300: loss_NB - 1} if arm == "full" else {})
            write_run(folder, at, 4.5 if "then" in arm else 5.0)
    (command.folder("moba", 0) / "position_loss" / "eval_000000000000300.npz").touch()  # killed while it wrote
    for layers in (0, 3):
        for seed in (0, 1):
            answers_NB = np.where(np.arange(16) < 14, np.nan, base_NB - 0.1 * layers + seed)
            write_run(command.folder(f"sft, {layers} full", seed), {10: answers_NB + 1, 20: answers_NB})
    words = [f"to={tmp_path}/to", f"runs={tmp_path}/runs", "validation=x", "cuts=y", "commit=abc", "collect=true"]
    asked = [*arms, "sft, 0 full", "sft, 3 full"]
    monkeypatch.setattr(sys, "argv", ["study.py", "small", f"arms={';'.join(asked)}", *words])
    study.main()
    text = (tmp_path / "to" / "table.md").read_text()
    record = json.loads((tmp_path / "to" / "results.json").read_text())
    found = {(gap["arm"], gap["reference"]): gap for gap in record["gaps"]}
    assert found["moba", "full"]["tokens"] == 200, "where both have an evaluation"
    assert found["moba", "full"]["difference"] == pytest.approx((0.2 * slope_B).tolist())
    assert [one["trailing"] for one in found["moba", "full"]["by_seed"]] == pytest.approx([0.19, 0.21])
    assert found["moba", "full"]["clusters"] == [5] * 16
    assert found["64x32", "1024x2"]["difference"][-1] == pytest.approx(-0.15)
    trailing = record["recovered"]["parts"]["trailing"]
    assert trailing["share"] == pytest.approx(0.75) and trailing["gap"] == pytest.approx(0.2)
    assert record["final"]["full"]["falls_by"]["mean"] == pytest.approx(0.8 * 13 / 15)
    by_position = record["recovered"]["parts"]["trailing minus up to the reach"]
    assert by_position["gap"] == pytest.approx(0.2 * (1 - 0.5 / 15)) and by_position["share"] == pytest.approx(0.75)
    assert found["moba", "full"]["by_position"]["mean"] == pytest.approx(by_position["gap"])
    assert record["recovered"]["after_switch"] == [[pytest.approx(-0.5)]] * 2, "what is logged where they differ"
    further = {name: value["mean"] for name, value in record["final"]["moba"]["far_context"].items()}
    assert further == {"1K": pytest.approx(0.4), "4K": pytest.approx(0.1)}
    assert [(row["layers"], row["tokens"]) for row in record["tuned"]] == [(0, 10), (0, 20), (3, 10), (3, 20)]
    none, last = record["tuned"][1], record["tuned"][3]
    assert last["seeds"] == [0, 1] and "minus_none" not in none
    assert last["minus_none"]["mean"] == pytest.approx(-0.3), "buckets without an answer count for nothing"
    assert none["minus_most"]["mean"] == pytest.approx(0.3) and "minus_most" not in last
    assert "| trailing | 0.2000 | 0.0500 | 75% |" in text
    every = Evaluation.of_documents(EDGES, IDS, IDS, [f"c{i}" for i in range(15)], base_NB)
    assert small_results.sampled(every, 15) == [f"c{i}" for i in range(15)]
    drawn = {path.name for path in (tmp_path / "to").glob("*.png")}
    assert drawn == {"loss_by_tokens.png", "loss_by_position.png", "granularity.png", "context.png", "layers.png"}


def test_a_branch_takes_what_the_base_had_where_the_stages_part(tmp_path):
    """Catches a branch of a run that is not finished, of its end, of where it was once stopped, without what it
    measured, or with what it measured later."""
    base = tmp_path / "base"
    with pytest.raises(ValueError, match="base did not come to the end of its stage 1"):
        study.branch_off(base, tmp_path / "branch", 1)
    for tokens in (10, 15, 20, 30):
        folder = base / "checkpoints" / f"tokens_{tokens:015d}"
        folder.mkdir(parents=True)
        text = json.dumps({"stage_end": tokens != 15})
        (folder / "state.json").write_text(text)
        entry = {"size": len(text), "sha256": "0" * 64}
        (folder / "manifest.json").write_text(json.dumps({"format_version": 1, "files": {"state.json": entry}}))
    rows = [{"kind": "stage", "tokens": tokens} for tokens in (0, 10, 20)]
    rows += [{"kind": "eval", "tokens": tokens} for tokens in (20, 30)]
    (base / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (base / "position_loss").mkdir()
    for tokens in (20, 30):
        (base / "position_loss" / f"eval_{tokens:015d}.npz").touch()
    (tmp_path / ".branch").mkdir()
    study.branch_off(base, tmp_path / "branch", 2)
    assert [path.name for path in (tmp_path / "branch" / "position_loss").iterdir()] == ["eval_000000000000020.npz"]
    assert [path.name[-2:] for path in (tmp_path / "branch" / "checkpoints").iterdir()] == ["20"]
    kept = [json.loads(line) for line in (tmp_path / "branch" / "metrics.jsonl").read_text().splitlines()]
    assert kept == [rows[0], rows[1], rows[3]], "the stage that begins there is written anew, with its own attention"


def test_windows_are_even_and_the_groups_take_turns(tmp_path, monkeypatch):
    """Catches windows of one document where others have room, overlapping ends, and a head that is one group's."""
    assert windows.shares([5, 1, 3], 6) == [3, 1, 2] and windows.shares([1, 1], 6) == [1, 1]
    text = "".join(f"line {i}\n" for i in range(100))
    parts = windows.cut(text, 3, 200)
    assert [len(part) for part in parts] == [200] * 3 and all(part.startswith("line ") for part in parts)
    assert parts[0] == text[:200] and text.index(parts[2]) > len(text) - 210
    rows = [{"id": str(i), "text": text, "package": "a" if i < 3 else "b"} for i in range(5)]
    parquet.write_table(Table.from_pylist(rows), tmp_path / "held_out.parquet")
    words = [f"source={tmp_path}/held_out.parquet", f"to={tmp_path}/w.jsonl", "windows=4", "characters=100"]
    monkeypatch.setattr(sys, "argv", ["windows.py", *words])
    windows.main()
    found = [json.loads(line)["id"].split(":") for line in (tmp_path / "w.jsonl").read_text().splitlines()]
    assert [group for group, *_ in found] == ["a", "b"] * 4
    assert sorted(found) == sorted([["a", "0", "0"], ["a", "0", "1"], ["a", "1", "0"], ["a", "2", "0"],
                                    ["b", "3", "0"], ["b", "3", "1"], ["b", "4", "0"], ["b", "4", "1"]])  # fmt: skip
