"""benchmarks/study.py: its declared arms compose, and a small study is trained, evaluated, compared and drawn once."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import panels, study
from benchmarks.common import launch
from benchmarks.studies import STUDIES, Arm, Study
from conf.build import ConfigError
from evals.routing_numbers import model_hit_rate
from launch.config import load
from launch.evaluate import keys
from train.record.metrics import read_metrics

TINY = "+exp=quickstart model.num_layers=2 model.hidden_size=32 model.num_heads=2 model.num_kv_heads=2 "
TINY += "model.ffn_size=32 data.validation.path=embedded schedule.tokens=2K schedule.seq_len=256 "
TINY += "schedule.batch_tokens=512 schedule.block_size=16 schedule.top_k=2 optim.lr.warmup_tokens=0 eval.documents=3 "
TINY += "eval.every_tokens=0 checkpoint.every_tokens=0 logging=quiet run.device=cpu"
FULL = "schedule.stages.sparse.attention.kind=full"


def command(name, tmp_path, values=()):
    """The command of a declared study."""
    given = {"model": "models/x", "data": "embedded", "validation": "embedded", "documents": "2", "cuts": "cuts"}
    given["plan"] = "docs/results/plans_h100/plan_quarter.yaml"
    return study.Command(STUDIES[name], given | dict(values), (), tmp_path)


@pytest.mark.parametrize("name", STUDIES)
def test_every_declared_arm_composes_and_every_evaluation_is_known(name, tmp_path):
    """Catches an override or an argument of an evaluation that was renamed since, found when a GPU has been waiting."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 30, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path / "model")
    declared = command(name, tmp_path, {"model": str(tmp_path / "model")})
    for arm_name, arm in declared.study.arms.items():
        if arm.train is not None:
            source = str(declared.folder(arm.start or "base", 0))
            words = [w.replace(source, str(tmp_path / "model")) for w in declared.training(arm_name, 0)]
            try:
                config = load(words)
            except ConfigError as error:  # the model here has no tokenizer
                assert all("tokenizer" in problem for problem in error.problems), error.problems
            else:
                assert config.run.seed == 0
        for line in declared.evals(arm):
            what, *words = declared.filled(line)
            assert what in {*study.READ, "routing"} and {word.partition("=")[0] for word in words} <= keys().keys()
    assert {*declared.study.panels} <= panels.PANELS.keys()


def test_a_missing_argument_and_unequal_tokens_are_named(tmp_path, monkeypatch, capsys):
    """Catches a brace that goes to a run as it stands, and arms of unlike budgets that are compared."""
    for words in (
        ["recipes"],
        ["nothing", "to=x"],
        ["mqar", f"to={tmp_path}", "arms=best"],
        ["recipes", f"to={tmp_path}", "arms=moba"],
    ):
        monkeypatch.setattr(sys, "argv", ["study.py", *words, *([f"to={tmp_path}"] if len(words) == 1 else [])])
        with pytest.raises(SystemExit) as ended:
            study.main()
        assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "model=... is missing" in error and "recipes" in error and "arms=best" in error and "'full'; add it" in error
    arms = {"a": Arm("schedule.stages.sparse.tokens=50%"), "b": Arm("~schedule.stages.full")}
    with pytest.raises(ValueError, match=r"not equal tokens: a .*, b "):
        study.check(study.Command(Study("", TINY, arms, ()), {}, (), tmp_path), list(arms))


@pytest.mark.timeout(900)
def test_a_small_study_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    """Catches arms that train alike, a run or evaluation that is made twice, differences with the wrong sign or
    partner, a stage that is not evaluated, and a figure that cannot be drawn from the results alone."""
    small = Study(
        "A small one", TINY, {"moba": Arm(""), "full": Arm(FULL, evals=("position_loss",))},
        panels=("difference", "trailing", "speed"),
        evals=("position_loss", "position_loss attention=16x1"), every_stage=True, reference="full",
    )  # fmt: skip
    monkeypatch.setitem(STUDIES, "small", small)
    monkeypatch.setattr(
        sys, "argv", ["study.py", "small", f"to={tmp_path}", "commit=abc", "jobs=2", f"data.cache_dir={tmp_path}"]
    )
    study.main()
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["commit"] == "abc" and str(tmp_path) not in json.dumps(results["command"])
    tokens = sorted({row["tokens"] for row in results["measured"]})
    assert len(tokens) == 2 and len(results["measured"]) == 6, "two stages, of one arm under two attentions"
    found = {(row["arm"], row["eval"], row["tokens"]): row for row in results["measured"]}
    gaps = {(row["arm"], row["eval"], row["tokens"]): row for row in results["differences"]}
    assert len(gaps) == 4 and {arm for arm, *_ in gaps} == {"moba"}
    for (arm, line, at), gap in gaps.items():
        expected = np.array(found[arm, line, at]["mean"]) - found["full", "position_loss", at]["mean"]
        assert gap["difference"] == pytest.approx(expected.tolist(), abs=1e-9)
    assert gaps["moba", "position_loss", tokens[0]]["attention"] == "moba 16x2"
    assert gaps["moba", "position_loss", tokens[0]]["difference"][-1] != 0
    attention = [[stage["attention"] for stage in run["stages"]] for run in results["runs"]]
    assert attention == [["moba 16x2", "full"], ["full", "full"]]
    (tmp_path / "figure.png").unlink()
    panels.draw(results, small.panels, tmp_path / "again.png")
    assert (tmp_path / "again.png").stat().st_size > 10_000

    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.json*")}
    capsys.readouterr()
    study.main()
    assert "evaluate.py" not in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert json.loads((tmp_path / "results.json").read_text()) == results

    # Of a seed that time was too short for, one run begun and stopped before its second step.
    lines = (tmp_path / "runs" / "moba_seed0" / "metrics.jsonl").read_text().splitlines(keepends=True)
    last = next(i for i, line in enumerate(lines) if json.loads(line)["kind"] == "train")
    (tmp_path / "runs" / "moba_seed1").mkdir()
    (tmp_path / "runs" / "moba_seed1" / "metrics.jsonl").write_text("".join(lines[: last + 1]))
    monkeypatch.setattr(sys, "argv", [*sys.argv, "collect=true", "seeds=0,1"])
    study.main()
    short = json.loads((tmp_path / "results.json").read_text())
    assert [(run["arm"], run["seed"]) for run in short["runs"]] == [("moba", 0), ("moba", 1), ("full", 0)]
    assert short["measured"] == results["measured"] and len(short["runs"][1]["train"]) == 1


def test_sweeps_are_compared_with_the_reference_under_full_attention(tmp_path):
    """Catches a partner of another seed, document or attention, a seed that one side lacks, clusters that are left
    out of the errors, and a figure that cannot be drawn from the results alone."""
    generator, clusters, found = np.random.default_rng(0), ["a", "a", "b", "c"], []
    for arm, seeds, attentions in (("full", (0, 1), ["full", "plan"]), ("plan", (0, 1, 2), ["full", "plan"])):
        for seed in seeds:
            path = tmp_path / f"{arm}{seed}.json"
            settings = [{"attention": name, "attended_share": 1.0} for name in attentions]
            path.write_text(json.dumps({"tokens": 7, "settings": settings}))
            right = np.stack([generator.integers(0, 5, (2, 4)), np.full((2, 4), 4), np.ones((2, 4))], axis=2)
            loss = generator.normal(2, 0.1, (2, 4, 16))
            np.savez(path.with_suffix(".npz"), document_loss=loss, document_clusters=clusters, right_pass_key=right)
            found.append((arm, seed, "sweep", path))
    rows = {(row["arm"], row["attention"]): row for row in study.sweep_differences(found, "full")}
    assert list(rows) == [("full", "plan"), ("plan", "full"), ("plan", "plan")]
    arrays = {(arm, seed): np.load(path.with_suffix(".npz")) for arm, seed, _, path in found}
    row = rows["plan", "plan"]
    assert row["seeds"] == [0, 1]
    losses = [
        [arrays[arm, seed]["document_loss"][s, :, -1] for seed in (0, 1)] for arm, s in (("plan", 1), ("full", 0))
    ]
    gap_sN = np.subtract(*losses)
    assert row["trailing"]["minus_reference"]["by_seed"] == pytest.approx(gap_sN.mean(1))
    assert row["trailing"]["minus_reference"]["mean"] == pytest.approx(gap_sN.mean())
    assert row["trailing"]["value"] == pytest.approx(np.mean(losses[0]))
    # The CR2 error by hand: residual sums of three clusters of 2, 1 and 1 documents.
    residual = gap_sN.mean(0) - gap_sN.mean()
    sums, shares = np.array([residual[:2].sum(), residual[2], residual[3]]), np.array([2, 1, 1]) / 4
    assert row["trailing"]["minus_reference"]["se"] == pytest.approx(((sums**2 / (1 - shares)).sum()) ** 0.5 / 4)
    right = [[arrays[arm, seed]["right_pass_key"][s, :, 0] for seed in (0, 1)] for arm, s in (("plan", 1), ("full", 0))]
    assert row["pass_key"]["value"] == pytest.approx(np.mean(right[0]) / 4)
    assert row["pass_key"]["minus_reference"]["mean"] == pytest.approx((np.mean(right[0]) - np.mean(right[1])) / 4)
    panels.draw({"about": "", "device": "", "commit": None, "differences": [*rows.values()]}, ("kept",), tmp_path / "a")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_gates_are_compared_at_several_sizes(tmp_path):
    """Catches a loss of other positions than the last eighth, the published gate that has another name at each size,
    and a figure that cannot be drawn without captured shares, as of older results."""
    generator, rows = np.random.default_rng(0), []
    for arm in ("8K 128x16", "4K 128x8"):
        size = arm.split()[1]
        settings = [{"attention": "full", "attended_share": 1.0}]
        settings += [{"attention": size, "gate": size, "first_blocks": 0, "attended_share": 0.4}]
        settings += [
            {"attention": f"{size}+1 {gate}", "gate": gate, "first_blocks": 1, "attended_share": 0.4}
            for gate in ("mean", "shared")
        ]
        for i, row in enumerate(settings):
            value = {"mean": i / 10, "se": 0.1, "interval_95": 0.2}
            row |= {"captured": value, "recall": {"pass_key": {"right": 0.5, "minus_full": value, "nats": value}}}
        loss = generator.normal(2, 0.1, (4, 5, 16))
        path = tmp_path / f"{size}.json"
        about = {"tokens": 7, "seq_len": 64, "num_documents": 5, "num_clusters": 5}
        path.write_text(json.dumps(about | {"settings": settings}))
        np.savez(path.with_suffix(".npz"), document_loss=loss, document_clusters=[*"abcde"])
        rows.append({"arm": arm, "seed": 0, **study.READ["sweep"](path)})
        found = rows[-1]["settings"][3]
        assert found["minus_full"]["mean"] == pytest.approx((loss[3] - loss[0])[:, 14:].mean())
        assert found["captured"] == 0.3 and found["right_minus_full"]["pass_key"]["interval_95"] == 0.2
    names = [[panels._gate_of(one) for one in row["settings"][1:]] for row in rows]
    assert names[0] == names[1] == ["MoBA's gate", "MoBA's gate\nand the first", "one choice a group\nand the first"]
    record = {"about": "", "device": "", "commit": None, "measured": rows}
    panels.draw(record, ("gates",), tmp_path / "new.png")
    for row in rows:
        for one in row["settings"]:
            del one["captured"], one["right_minus_full"], one["nats"]
    panels.draw(record, ("gates",), tmp_path / "old.png")
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("new.png", "old.png"))


def test_block_sizes_are_compared_by_the_head_that_looks_up():
    """Catches a head chosen anew at each size, sizes of another length among them, and a predicted ratio that does not
    fall with the root of the block size."""

    def row(arm, seq_len, size, top_k, hits, snr):
        heads = [
            {"layer": i, "head": 0, "hit": hit, "snr": snr, "candidates": 10.0, "picks": top_k - 1, "model_hit": 0.5}
            for i, hit in enumerate(hits)
        ]
        about = {"arm": arm, "seed": 0, "seq_len": seq_len, "attention": f"moba {size}x{top_k}"}
        return about | {"right": {}, "evidence": heads}

    record = {
        "measured": [
            row("full", 256, 32, 2, (0.3, 0.4), 0.5),
            row("full", 256, 8, 8, (0.9, 0.2), 1.5),
            row("full", 2048, 64, 4, (0.1, 0.8), 0.7),
        ]
    }
    small, large, other = panels.by_block_size(record)
    assert [small["block_size"], large["block_size"], other["block_size"]] == [8, 32, 64]
    assert [small["layer"], large["layer"], other["layer"]] == [0, 0, 1] and large["hit"] == 0.3
    assert small["scaled_snr"] == 1.5 and large["scaled_snr"] == 0.75 and other["scaled_snr"] == 0.7
    assert large["scaled_hit"] == pytest.approx(float(model_hit_rate(0.75, 10, 1)))


def test_arms_that_end_with_full_attention_have_the_stages_of_those_they_leave(tmp_path):
    """Catches a first stage that differs from its base's, so that the run goes on with weights of another attention,
    a last stage that stays sparse, and a length or RoPE base that reaches one stage alone."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 30, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path / "model")
    given = command("drop_in", tmp_path, {"model": str(tmp_path / "model")})
    at_16k = ["schedule.seq_len=16K", "data.tokenizer=bytes", "model.vocab_size=64"]
    at_16k += [f"schedule.stages.{stage}.rope.theta=400000" for stage in ("first", "last")]
    stages = {
        name: list(load([*given.training(name, 0), *at_16k]).schedule.stages.values())
        for name, arm in given.study.arms.items()
        if arm.train is not None
    }
    steps = 3932160 // 65536
    for name, (first, last) in stages.items():
        assert (first.seq_len, last.seq_len, first.rope.theta, last.rope.theta) == (16384, 16384, 4e5, 4e5)
        assert [stage.tokens for stage in (first, last)] == [65536 * steps * share // 10 for share in (9, 1)]
        base = given.study.arms[name].branch
        assert first == stages[base or name][0]
        assert (last.attention.kind == "full") == (base is not None or name == "full")
        assert base or last == replace(first, tokens=last.tokens)
    options = {name: first.attention.options for name, (first, _) in stages.items()}
    assert [options[name]["first_blocks"] for name in ("128x8", "128x8, first block")] == [0, 1]
    assert stages["plan"][0].attention.plan and not stages["128x8"][0].attention.plan


@pytest.mark.timeout(900)
def test_an_arm_that_ends_with_full_attention_is_the_sparse_run_until_then(tmp_path, monkeypatch):
    """Catches weights, moments, data or a learning rate that the branch does not take over: its losses are those of
    one run of both stages, bit for bit. Also an evaluation without answers that ends the comparison or the figure."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=4096, **sizes)).save_pretrained(tmp_path / "model")
    words = (
        "schedule.seq_len=256 schedule.batch_tokens=512 schedule.micro_tokens=512 schedule.tokens=5120 "
        "schedule.block_size=16 schedule.top_k=3 logging.every_tokens=512 data.tokenizer=bpe-4k run.device=cpu "
        f"data.cache_dir={tmp_path} schedule.stages.first.rope.theta=400000 schedule.stages.last.rope.theta=400000"
    ).split()
    values = {"model": str(tmp_path / "model"), "data": "embedded", "validation": "embedded", "plan": "full"}
    arms = ["full", "128x8, first block", "128x8, first block, then full"]
    own = [f"{key}={value}" for key, value in values.items()]
    own += ["documents=2", "seeds=0", "jobs=2", f"to={tmp_path}", f"arms={';'.join(arms)}"]
    monkeypatch.setattr(sys, "argv", ["study.py", "drop_in", *own, *words])
    study.main()
    results = json.loads((tmp_path / "results.json").read_text())
    losses = {run["arm"]: [loss for _, loss in run["train"]] for run in results["runs"]}
    sparse, branch = losses[arms[1]], losses[arms[2]]
    assert branch[:9] == sparse[:9] and branch[9] != sparse[9] and len(branch) == len(sparse) == 10

    declared = study.Command(STUDIES["drop_in"], values | {"documents": "2"}, tuple(words), tmp_path / "alone")
    whole = [word for word in declared.training(arms[2], 0) if word != "run.allow_changes=true"]
    launch("train.py", whole, declared.folder(arms[2], 0), True, "")
    rows = read_metrics(declared.folder(arms[2], 0) / "metrics.jsonl")
    assert [row["loss"] for row in rows if row["kind"] == "train"] == branch

    gaps = {(row["arm"], row["attention"]): row for row in results["differences"]}
    assert {arm for arm, _ in gaps} == {*arms} and (arms[2], "full") in gaps
    for (arm, _), row in gaps.items():
        assert np.isfinite(row["trailing"]["minus_reference"]["mean"]) and ("pass_key" in row) == (arm != arms[2])
