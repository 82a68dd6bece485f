"""Composing from the command line: what a user may write, and what they read when it is wrong."""

import os
import re
import shlex
from dataclasses import replace
from itertools import pairwise

import pytest
import yaml

from conf.validate import ConfigError, Hardware, freeze, to_dict
from launch.config import (
    CONF,
    PATIENCE_SECONDS,
    choices_of,
    compose,
    composed_yaml,
    error_text,
    help_text,
    load,
    run_command,
)
from train.model.sizes import num_parameters
from train.plan.plan import make_plan

GROUPS = ("model", "data", "schedule", "optim", "deepspeed", "logging")


def problem_of(*overrides: str) -> str:
    """The one problem of a command line."""
    with pytest.raises(ConfigError) as error:
        load(list(overrides))
    assert len(error.value.problems) == 1, error.value.problems
    assert "\n" not in error.value.problems[0]
    return error.value.problems[0]


@pytest.mark.parametrize("experiment", choices_of("exp"))
def test_every_experiment_composes(experiment):
    """Catches an experiment that rots: composed, frozen, named after itself, read back as itself."""
    config = load([f"+exp={experiment}"])
    assert config.run.name == experiment and config.run.dir == f"runs/{experiment}"
    assert config.schedule.stages
    assert freeze(to_dict(config)) == config
    assert freeze(yaml.safe_load(composed_yaml([f"+exp={experiment}"]))) == config


@pytest.mark.parametrize("group", GROUPS)
def test_every_choice_composes(group):
    """Catches a group file with a wrong key or type, and one that only works with its own experiment."""
    for choice in choices_of(group):
        extra = {
            "files": ["data.path=x.txt"],
            "sft": ["data.path=x.jsonl"],
            "hub": ["data.name=a/b"],
            "custom": [],
        }.get(choice, [])
        overrides = ["+exp=quickstart", f"{group}={choice}", *extra]
        if choice == "custom":
            assert "schedule.stages={}" in problem_of(*overrides)
        elif choice == "from_source":
            assert "model=from_source needs init.source=" in problem_of(*overrides)
        else:
            load(overrides)


def test_all_yaml_files_are_reachable():
    """Catches a file outside every group, which no command could use."""
    files = {path.relative_to(CONF).as_posix() for path in CONF.rglob("*.yaml")}
    reachable = {f"{group}/{choice}.yaml" for group in (*GROUPS, "exp") for choice in choices_of(group)}
    assert files == reachable | {"train.yaml"}


def test_the_command_line_wins():
    """Catches an experiment that overrides what the user typed, and groups that don't replace each other."""
    config = load(["+exp=moba_32k", "model=tiny", "schedule=full_only", "deepspeed=zero3", "schedule.tokens=1M"])
    assert config.model.name == "tiny" and list(config.schedule.stages) == ["full"]
    assert config.deepspeed.zero_stage == 3 and config.schedule.tokens == 4 * 256 * 1024


def test_any_key_can_be_set_without_a_plus():
    """Catches Hydra's refusal of keys that are in the schema but in no YAML file."""
    config = load(
        [
            "+exp=moba_32k",
            "schedule.stages.sparse.tokens=50%",
            "schedule.stages.sparse.rope.theta=1e6",
            "schedule.stages.full.lr.peak=1e-4",
            "schedule.stages.full.attention={kind: moba, num_blocks: 64}",
            "model.rope_scaling.rope_type=linear",
            "~data.validation",
        ]
    )
    sparse, full = config.schedule.stages.values()
    assert sparse.tokens == -(-100_000_000 // 2**18) * 2**18 and sparse.rope.theta == 1e6
    assert full.lr.peak == 1e-4 and full.attention.options["block_size"] == 512
    assert config.model.rope_scaling == {"rope_type": "linear"} and config.data.validation is None


def test_new_stages_and_sources_take_a_plus():
    """Catches a slip of the pen that becomes a stage, and stages out of order."""
    config = load(
        [
            "+exp=moba_32k",
            "schedule.tokens=210M",
            "schedule.stages.sparse.tokens=80%",
            "+schedule.stages.last.tokens=5M",
            "+data.sources.mine.path=x.txt",
        ]
    )
    assert list(config.schedule.stages) == ["sparse", "full", "last"] and set(config.data.sources) == {
        "embedded",
        "mine",
    }
    problem = problem_of("+exp=moba_32k", "schedule.stages.sprse.tokens=80%")
    assert "sprse" in problem and "did you mean sparse" in problem and "+schedule.stages.sprse.tokens=80%" in problem
    assert "no source is called mine" in problem_of("+exp=moba_32k", "data.sources.mine.path=x.txt")


@pytest.mark.parametrize(
    "value",
    ["~/books/*.txt", "/data/a,b.txt", "/data/my books/x.txt", 'odd"name', "x=y", "C:\\new\\table", "[half", "a[0]"],
)
def test_paths_need_no_quotes_of_hydras(value):
    """Catches values that Hydra's grammar refuses or takes for a sweep."""
    assert load(["+exp=moba_32k", "data=files", f"data.path={value}"]).data.sources["main"].path == value


@pytest.mark.parametrize("experiment", ["moba_32k", "extend_64k", "sft_hybrid", "quickstart"])
def test_advice_on_the_shipped_books_is_given_where_they_are_read(experiment):
    """Catches advice to bring own data in the plan of somebody who did, and none for who did not."""
    shipped, own = [f"+exp={experiment}"], [f"+exp={experiment}", "data=files", "data.path=x.jsonl"]
    words = ("shipped books", "embedded corpus")
    for arguments, wanted in ((shipped, experiment != "quickstart"), (own, False)):
        notice = make_plan(load(arguments), 32768, Hardware(0)).notice or ""
        assert any(word in notice for word in words) == wanted, notice
    assert experiment != "extend_64k" or "has to be trained first" in notice, "what is not about the books stays"


def test_real_data_as_the_notice_says():
    """Catches a notice that names overrides which don't work."""
    notice = load(["+exp=moba_32k"]).data.notice
    assert "data=files data.path=" in notice and "data=hub data.name=" in notice and "schedule.tokens=" in notice
    files = load(["+exp=moba_32k", "data=files", "data.path=x.jsonl", "schedule.tokens=1B"]).data
    assert [source.path for source in files.sources.values()] == ["x.jsonl"]
    hub = load(["+exp=moba_32k", "data=hub", "data.name=a/b"]).data.sources["main"]
    assert hub.name == "a/b" and hub.streaming and hub.max_tokens == load(["+exp=moba_32k"]).schedule.tokens


@pytest.mark.parametrize("experiment", [name for name in choices_of("exp") if re.match(r"paper/[^/]+$", name)])
def test_paper_experiments_follow_table_1(experiment):
    """Catches a budget, length, block size or shape that isn't the paper's."""
    table = {  # heads = layers, hidden, tokens in billions (reference: MoBA paper, Table 1)
        "545m": (14, 1792, 10.8),
        "822m": (16, 2048, 15.3),
        "1_1b": (18, 2304, 20.6),
        "1_5b": (20, 2560, 27.4),
        "2_1b": (22, 2816, 36.9),
    }
    config = load([f"+exp={experiment}"])
    hybrid = experiment == "paper/hybrid_1_5b"
    size, length = ("1_5b", "32k") if hybrid else re.fullmatch(r"paper/(.+)_(\d+k)", experiment).groups()
    layers, hidden, billions = table[size]
    billions, blocks = (30, (2048, 3)) if hybrid else (billions, (512, 3))
    model, stages = config.model, list(config.schedule.stages.values())
    assert (model.num_layers, model.num_heads, model.hidden_size, model.head_dim) == (layers, layers, hidden, 128)
    assert 0 <= config.schedule.tokens - billions * 1e9 < 2 * 2**20
    assert tuple(stages[0].attention.options[name] for name in ("block_size", "top_k")) == blocks
    assert all(stage.seq_len == int(length[:-1]) * 1024 for stage in stages)
    assert [stage.attention.kind for stage in stages] == (["moba", "full"] if hybrid else ["moba"])
    if hybrid:
        assert stages[0].tokens / config.schedule.tokens == pytest.approx(0.9, abs=1e-3)
    twin = load([f"+exp={experiment}", "schedule=full_only"])
    assert [stage.attention.kind for stage in twin.schedule.stages.values()] == ["full"]
    assert load([f"+exp={experiment}", "data=files", "data.path=x"]).data.sources["main"].name is None


@pytest.mark.parametrize(
    "size, hidden, heads, ffn, millions", [("340m", 1024, 16, 2816, 342), ("1b", 2048, 32, 8192, 1678)]
)
def test_flashmoba_experiments_follow_the_paper(size, hidden, heads, ffn, millions):
    """Catches a shape, layout, budget or rate that isn't FlashMoBA's (section 5.1), and a row of its tables whose
    overrides, as the file gives them, do not work."""
    rows = {
        "": ("moba", 128, 8, "SM", 0),
        "schedule.stages.main.attention.kind=full schedule.stages.main.attention.pattern=SF": ("full", 128, 8, "SF", 0),
        "schedule.block_size=256 schedule.top_k=4": ("moba", 256, 4, "SM", 0),
        "model.key_conv=3 model.key_conv_pattern=-K": ("moba", 128, 8, "SM", 3),
        "model.key_conv=5 model.key_conv_pattern=-K": ("moba", 128, 8, "SM", 5),
    }
    text = (CONF / "exp" / "flashmoba" / "340m.yaml").read_text()
    for overrides, expected in rows.items():
        assert overrides in text
        config = load([f"+exp=flashmoba/{size}", *overrides.split()])
        (stage,) = config.schedule.stages.values()
        attention, model, optim = stage.attention, config.model, config.optim
        options = attention.options
        row = (attention.kind, options["block_size"], options["top_k"], attention.pattern, model.key_conv)
        assert row == expected and options["window"] == 256 and stage.seq_len == 8192
        shape = (model.num_layers, model.hidden_size, model.num_heads, model.head_dim, model.ffn_size)
        assert shape == (24, hidden, heads, 64, ffn) and model.rope_pattern == "RN" and model.activation_checkpointing
        added = num_parameters(model, 32768)["total"] - num_parameters(replace(model, key_conv=0), 32768)["total"]
        assert added == 12 * model.key_conv * hidden
        assert num_parameters(model, 32768)["total"] // 10**6 == pytest.approx(millions, abs=1)
        assert 0 <= config.schedule.tokens - 100e9 < 2**20
        assert (optim.betas, optim.weight_decay, optim.grad_clip) == ([0.9, 0.95], 0.1, 1.0)
        assert (optim.lr.kind, optim.lr.peak) == ("cosine", 6e-4)


def test_the_papers_chain_to_a_million_tokens():
    """Catches a length, attention, budget or scaling that isn't section 3.3's, and a link that starts elsewhere than
    where the one before it ended."""
    order = ["cpt_256k", "cpt_512k", "cpt_1m", "moba_100b", "sft_32k", "sft_256k", "sft_1m"]
    lengths = [256, 512, 1024, 1024, 32, 256, 1024]
    folder = "paper/llama3_8b_1m"
    assert choices_of("exp").count(f"{folder}/cpt_1m") == 1
    assert {name for name in choices_of("exp") if name.startswith(folder)} == {f"{folder}/{name}" for name in order}
    source = "models/Llama-3.1-8B"
    for name, length in zip(order, lengths):
        config = load([f"+exp={folder}/{name}"])
        ((stage_name, stage),) = config.schedule.stages.items()
        assert stage_name == name and stage.seq_len == length * 1024
        assert (config.model.name, config.model.num_layers) == ("llama3_8b", 32)
        # 128K to 1M once, at the start of the 256K stage: in force from there on, on top of Llama 3.1's own.
        assert (stage.rope.scaling, stage.rope.factor, stage.rope.theta) == ("linear", 8, None)
        sparse = ("moba", 4096, 12, 3)
        attention = stage.attention
        options = attention.options
        found = (attention.kind, options["block_size"], options["top_k"], attention.full_last)
        assert attention.kind == "full" if name.startswith("cpt") else found == sparse
        assert config.init.source == source and config.data.tokenizer == "models/Llama-3.1-8B"
        assert name != "moba_100b" or 0 <= stage.tokens - 100e9 < stage.batch_tokens
        source = config.run.dir


def test_the_first_block_is_kept_where_a_model_was_trained_with_full_attention():
    """Catches a recipe that gives up the attention sink of a pretrained model, and one from nothing, or of the paper,
    whose gate is not the paper's."""

    def origin(name: str) -> str | None:
        source = load([f"+exp={name}"]).init.source
        return origin(source.removeprefix("runs/")) if source and source.startswith("runs/") else source

    names = [name for name in choices_of("exp") if not name.startswith("paper/")]
    pretrained = {name for name in names if (origin(name) or "").startswith("models/")}
    assert pretrained == {"continual_smollm2", "long/8b_256k", "long/8b_512k", "long/8b_1m"}
    for name in choices_of("exp"):
        for stage in load([f"+exp={name}"]).schedule.stages.values():
            expected = int(name in pretrained and stage.attention.kind == "moba")
            assert stage.attention.options["first_blocks"] == expected, (name, stage)


def test_the_baseline_of_a_continued_model():
    """Catches overrides in the recipe's comment that it refuses since its first block is always selected."""
    text = (CONF / "exp" / "continual_smollm2.yaml").read_text()
    lines = re.findall(r"^#   ('?schedule\..*)", text, re.M)
    found = [load(["+exp=continual_smollm2", *shlex.split(line)]) for line in lines]
    attentions = [config.schedule.stages["sparse"].attention for config in found]
    assert [(one.kind, one.options["first_blocks"]) for one in attentions] == [("moba", 0), ("full", 0)]


def test_the_extensions_are_a_chain():
    """Catches an extension that starts elsewhere, or one whose model, data or tokenizer its source does not have."""
    runs = [load([f"+exp={name}"]) for name in ("moba_32k", "extend_64k", "extend_128k")]
    assert [run.schedule.stages[list(run.schedule.stages)[-1]].seq_len // 1024 for run in runs] == [32, 64, 128]
    for before, after in pairwise(runs):
        assert after.init.source == before.run.dir and after.init.optimizer and after.init.data
        assert after.model == before.model
        assert replace(after.data, notice=None) == replace(before.data, notice=None)


def test_the_three_32k_runs_differ_in_their_stages_only():
    """Catches a control experiment that differs in more than attention."""
    runs = [
        to_dict(load([f"+exp={name}", "run.name=x", "logging.group=x", "data.notice=x"]))
        for name in ("moba_32k", "full_32k", "moba_only_32k")
    ]
    kinds = [[stage["attention"]["kind"] for stage in run["schedule"]["stages"].values()] for run in runs]
    assert kinds == [["moba", "full"], ["full"], ["moba"]]
    for run in runs:
        del run["schedule"]["stages"], run["schedule"]["tokens"]
        for section in ("eval", "checkpoint"):
            del run[section]["every_tokens"]  # shares of totals that differ by a rounded step
        del run["optim"]["lr"]["warmup_tokens"], run["optim"]["lr"]["decay_tokens"]
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.parametrize(
    "overrides, words",
    [
        ([], ["schedule.stages={}", "+exp=quickstart"]),
        (["+exp=nope"], ["+exp=nope", "quickstart"]),
        (["+exp=quikstart"], ["did you mean quickstart"]),
        (["exp=quickstart"], ["+exp=quickstart"]),
        (["+exp=quickstart", "model=tinny"], ["model=tinny", "did you mean tiny"]),
        (["+exp=quickstart", "modl=tiny"], ["modl=tiny", "did you mean model"]),
        (["+exp=quickstart", "+modl=tiny"], ["modl=tiny", "did you mean model"]),
        (["+exp=quickstart", "run=x"], ["run=x", "section", "run.<key>"]),
        (["+exp=quickstart", "budget"], ["budget", "key=value"]),
        (["+exp=quickstart", "model.hiden_size=3"], ["model.hiden_size=3", "hidden_size"]),
        (["+exp=quickstart", "model.num_layers=two"], ["model.num_layers=two", "whole number"]),
        (["+exp=quickstart", "~data.validatoin"], ["data.validatoin"]),
        (["+exp=quickstart", "run.seed=${run.sed}"], ["run.sed"]),
        (["+exp=quickstart", "data=files"], ["data.sources.main.path=null", "data.path=<file", "data.name=<hub"]),
    ],
)
def test_mistakes_are_explained(overrides, words):
    """Catches Hydra's own wording (structs, defaults lists) and messages without a way out."""
    problem = problem_of(*overrides)
    assert all(word in problem for word in words), problem
    assert "struct" not in problem and "Traceback" not in problem


def test_wrong_keys_come_together():
    """Catches one error a run: unknown keys, types and rules in one list."""
    with pytest.raises(ConfigError) as error:
        load(["+exp=quickstart", "model.hiden_size=3", "schedule.tokenz=3", "optim.eps=x", "model.num_kv_heads=3"])
    assert len(error.value.problems) == 4
    text = error_text(error.value)
    assert text.startswith("4 problems") and text.count("\n  - ") == 4


def test_an_unreadable_budget_is_one_problem():
    """Catches a mistake in schedule.tokens that is reported once more for each stage that is a share of it."""
    assert problem_of("+exp=quickstart", "schedule.tokens=abc").startswith("schedule.tokens=abc: not a quantity")


def test_a_new_name_needs_its_plus_once():
    """Catches a stage made on the command line that wants a `+` before each of its keys, and one that wants none."""
    stage = [
        "+schedule.stages.late.tokens=1M",
        "schedule.stages.late.seq_len=4K",
        "schedule.stages.late.rope.theta=5e5",
    ]
    late = load(stage).schedule.stages["late"]
    assert (late.tokens, late.seq_len, late.rope.theta) == (1_015_808, 4096, 5e5)
    problem = problem_of(stage[0], "schedule.stages.lat.seq_len=4K")
    assert "no stage is called lat (did you mean late?); a new one needs a plus" in problem


def test_own_experiments(tmp_path):
    """Catches experiments that must live inside the package."""
    (tmp_path / "exp").mkdir()
    (tmp_path / "exp" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [override /model: tiny]\n"
        "schedule: {batch_tokens: 16K, stages: {short: {tokens: 1M, seq_len: 1K},"
        " long: {tokens: 1M, attention: {pattern: MMF}}}}\n"
    )
    config = load([f"hydra.searchpath=[file://{tmp_path}]", "+exp=mine"])
    assert list(config.schedule.stages) == ["short", "long"] and config.run.name == "mine"


def test_nothing_is_written_and_nothing_moves(tmp_path, monkeypatch):
    """Catches Hydra's output folders, log files and change of directory."""
    monkeypatch.chdir(tmp_path)
    compose(["+exp=quickstart"])
    assert os.getcwd() == str(tmp_path) and list(tmp_path.iterdir()) == []


def test_run_command(capsys):
    """Catches a wrong exit code, a message on the wrong stream, a rank that speaks out of turn."""
    seen = []
    assert run_command(seen.append, ["+exp=quickstart"], "usage: x") == 0 and seen == [["+exp=quickstart"]]
    assert run_command(lambda overrides: load(overrides), ["+exp=nope"], "usage: x") == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("1 problem:\n  - +exp=nope")
    assert run_command(lambda overrides: load(overrides), ["--help"], "usage: x", quiet=True) == 0
    assert capsys.readouterr() == ("", "")
    assert run_command(seen.append, ["--multirun"], "usage: x") == 2 and "--multirun" in capsys.readouterr().err
    assert run_command(seen.append, ["+exp=quickstart", "--cfg", "job"], "usage: x") == 0
    assert yaml.safe_load(capsys.readouterr().out)["schedule"]["tokens"] == "300K"
    assert run_command(seen.append, ["--help"], "usage: x") == 0
    assert capsys.readouterr().out == help_text("usage: x") + "\n" and len(seen) == 1


def test_only_a_process_that_nobody_ends_speaks_for_itself(capsys, monkeypatch):
    """Catches a rank that exits before rank 0 has spoken (torchrun would end rank 0), or that never speaks at all."""
    order = []
    monkeypatch.setattr("launch.config.time.sleep", lambda seconds: order.append((seconds, capsys.readouterr())))
    assert run_command(lambda overrides: load(overrides), ["+exp=nope"], "usage: x", quiet=True) == 2
    assert order == [(PATIENCE_SECONDS, ("", ""))] and "+exp=nope" in capsys.readouterr().err


def test_ctrl_c_is_no_traceback(capsys):
    """Catches a traceback for whoever stops a command before it trains."""

    def main(overrides):
        raise KeyboardInterrupt

    assert run_command(main, ["+exp=quickstart"], "usage: x") == 130 and capsys.readouterr().err == "interrupted\n"


def test_help_lists_every_choice():
    """Catches a help text that falls behind the files."""
    text = help_text("usage: x")
    for group in (*GROUPS, "exp"):
        assert all(choice in text for choice in choices_of(group))
