"""benchmarks/study.py: its declared arms compose, and a small study is trained, evaluated, compared and drawn once."""

import json
import sys

import numpy as np
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import panels, study
from benchmarks.studies import STUDIES, Arm, Study
from conf.build import ConfigError
from evals.routing_numbers import model_hit_rate
from launch.config import load
from launch.evaluate import keys

TINY = "+exp=quickstart model.num_layers=2 model.hidden_size=32 model.num_heads=2 model.num_kv_heads=2 "
TINY += "model.ffn_size=32 data.validation.path=embedded schedule.tokens=2K schedule.seq_len=256 "
TINY += "schedule.batch_tokens=512 schedule.block_size=16 schedule.top_k=2 optim.lr.warmup_tokens=0 eval.documents=3 "
TINY += "eval.every_tokens=0 checkpoint.every_tokens=0 logging=quiet run.device=cpu"
FULL = "schedule.stages.sparse.attention.kind=full"


def command(name, tmp_path, values=()):
    """The command of a declared study."""
    given = {"model": "models/x", "data": "embedded", "validation": "embedded", "documents": "2", "cuts": "cuts"}
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
