"""Every key of a configuration with every kind of value: a run that can be planned, or lines that name the key.

A configuration that is accepted is planned as well: what the plan accepts must not fail in the loop for its type.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from damage import assert_one_line, in_equal_parts, put, quick, scalars, thorough, values
from hypothesis import strategies as st

from conf.build import ConfigError
from conf.hardware import Hardware
from conf.schema import RunConfig, SyntheticConfig
from conf.validate import freeze, to_dict
from launch.config import compose, error_text, load
from launch.foreign import leaves, meant_by
from launch.inputs import refuse_missing
from train.plan.plan import make_plan
from train.schedule import build_schedule

# Values that mean something, for the keys that take them.
GOOD = {
    "schedule.tokens": ["300K", 300_000, "1M", 3e5],
    "schedule.seq_len": ["1K", 2048, "2K"],
    "schedule.batch_tokens": ["8K", 16384],
    "schedule.top_k": [1, 4, 30],
    "schedule.block_size": [64, "128", "1K"],
    "optim.lr.peak": [1e-3, "1e-4", 0.01],
    "optim.lr.kind": ["cosine", "linear", "constant"],
    "eval.every_tokens": [None, 0, "10%", "50K"],
    "checkpoint.every_tokens": [None, "25%"],
    "logging.every_tokens": [None, "1K"],
    "data.tokenizer": ["bytes", "bpe-4k"],
    "data.validation": [None, {"path": "embedded"}],
    "run.dir": [None, "runs/x", "~/x", "~nobody/x"],
    "run.seed": [0, 7],
    "model.num_layers": [1, 3],
    "model.activation_checkpointing": [True, "mlp", False],
    "deepspeed.zero_stage": [0, 1, 2, 3],
}


@lru_cache(maxsize=1)
def valid() -> dict[str, Any]:
    """The quickstart as composed, every key of it written out."""
    config = compose(["+exp=quickstart"])
    written = to_dict(freeze(config))
    written["schedule"]["stages"] = config["schedule"]["stages"]
    written["schedule"]["tokens"] = "300K"
    return written


def keys(cls: type, at: tuple = ()) -> list[tuple]:
    """The path of every key below a dataclass, sections included; names of stages and sources as the quickstart's."""
    names = {"stages": "sparse", "sources": "embedded"}
    found = []
    for field in fields(cls):
        hint, path = get_type_hints(cls)[field.name], (*at, field.name)
        found.append(path)
        inner = next((a for a in (hint, *get_args(hint)) if is_dataclass(a)), None)
        if inner is not None:
            path = (*path, names[field.name]) if field.name in names else path
            found += keys(inner, path) if inner is not SyntheticConfig else []
    return found


ALL = [path for path in keys(RunConfig) if path[:2] != ("data", "validation") or len(path) == 2]


def set_at(config: dict, path: tuple, value: Any) -> dict:
    """`config` with a key set, sections on the way made where there are none."""
    inner = config
    for key in path[:-1]:
        inner = inner.get(key) if isinstance(inner, dict) else None
        if not isinstance(inner, dict):
            return config
    return put(config, path[:-1], inner | {path[-1]: value})


@st.composite
def meant(draw) -> tuple[dict, bool]:
    """(a configuration changed in a way that means something, True: it has to be accepted)."""
    config = valid()
    for key in draw(st.lists(st.sampled_from(sorted(GOOD)), max_size=1)):
        config = set_at(config, tuple(key.split(".")), draw(st.sampled_from(GOOD[key])))
    return set_at(config, ("run", "name"), f"run {draw(st.integers(0, 2**32))}"), True


@st.composite
def anything(draw) -> tuple[dict, bool]:
    """(a configuration with anything at any keys, False)."""
    config = valid()
    for _ in range(draw(st.integers(1, 3))):
        config = set_at(config, draw(st.sampled_from(ALL)), draw(scalars | values))
    return config, False


def fuzz(how) -> None:
    seen = {"accepted": 0, "refused": 0, "all": 0}

    def check(drawn):
        config, has_to_be_accepted = drawn
        seen["all"] += 1
        try:
            frozen = freeze(config, Hardware())
        except ConfigError as error:
            assert not has_to_be_accepted, error
            seen["refused"] += 1
            assert error.problems and len(error_text(error)) < 30_000
            for line in error.problems:
                assert_one_line(line)
            return
        seen["accepted"] += 1
        assert freeze(to_dict(frozen)) == frozen
        build_schedule(frozen)
        assert make_plan(frozen, 512, Hardware()).text()

    in_equal_parts(how, [meant(), anything()], check)
    print(seen)
    assert seen["accepted"] >= seen["all"] / 3 and seen["refused"] >= seen["all"] / 8, seen


def test_whatever_a_configuration_says():
    """Catches a TypeError for null or a list where a number is wanted, and what is accepted and cannot be planned."""
    fuzz(quick(150))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_whatever_a_configuration_says_at_length():
    """The same for many more examples, other ones each time."""
    fuzz(thorough(20_000))


@pytest.mark.parametrize("path", ALL, ids=".".join)
def test_null_at_every_key(path):
    """Catches null where a number is wanted: it means something and is planned, or the line names the key."""
    try:
        frozen = freeze(set_at(valid(), path, None), Hardware())
    except ConfigError as error:
        assert all(path[-1] in line or path[0] in line for line in error.problems), error.problems
        return
    assert make_plan(frozen, 512, Hardware()).text()


WORDS = st.text(st.sampled_from("abz019=.+~-_[]{}(),:'\"$@/% \\\n"), max_size=30)


TYPED = [f"{key}={value}" for key, meant in GOOD.items() for value in meant if isinstance(value, (str, int, float))]


def fuzz_command_line(how) -> None:
    seen = {"accepted": 0, "refused": 0}
    anything = st.tuples(
        st.sampled_from([".".join(path) for path in ALL]), st.sampled_from(["=", " = ", "", "=="]), WORDS
    )
    meant = st.tuples(st.sampled_from(TYPED), st.integers(0, 2**32).map(lambda seed: f"run.name=x{seed}"))

    def check(typed):
        words = list(typed) if len(typed) == 2 else ["".join(typed)]
        try:
            load(["+exp=quickstart", *words], Hardware())
            seen["accepted"] += 1
        except ConfigError as error:
            assert len(typed) == 3, error
            seen["refused"] += 1
            for line in error.problems:
                assert_one_line(line)

    in_equal_parts(how, [meant, anything], check)
    print(seen)
    assert seen["accepted"] >= sum(seen.values()) / 3 and seen["refused"] >= sum(seen.values()) / 8, seen


def test_whatever_is_typed():
    """Catches exceptions of Hydra's grammar that reach the user."""
    fuzz_command_line(quick(15))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_whatever_is_typed_at_length():
    """The same for many more examples."""
    fuzz_command_line(thorough(1500))


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("schedule.block_size=bytes", "schedule.block_size=bytes: not a quantity"),
        ("schedule.top_k=0", "schedule.top_k=0: must be at least 1"),
        ("schedule.batch_tokens=3000", "schedule.batch_tokens=3,000: must be a multiple of seq_len=2K"),
        ("schedule.seq_len=null", "schedule.seq_len=null: needs a value, such as 2K"),
        ("schedule.seq_len = 2K", "without spaces: schedule.seq_len=2K"),
        (f"schedule.tokens={'9' * 5000}", "(5,000 characters): not a quantity"),
        (f"model.hidden_size={'9' * 5000}", "(5,000 characters): expected a whole number"),
        ("lr=1e-4", "write optim.lr.peak=<rate>"),
        ("batch_size=4", "write schedule.batch_tokens=<tokens>"),
        ("wandb=offline", "write logging.wandb="),
        ("num_gpus=1", "write torchrun --nproc_per_node=<GPUs>"),
        ("seed=1", "write run.seed=..."),
        ("attention.backend=cudnn", "write schedule.stages.<stage>.attention.backend=cudnn"),
        ("schedule.attention.first_blocks=1", "write schedule.stages.<stage>.attention.first_blocks=1"),
        ("data.num_workers=1000000", "at most 1024 processes"),
    ],
)
def test_one_line_under_the_key_that_was_typed(typed, said):
    """Catches two lines for one mistake, a key that nobody typed, and a value of 5,000 characters."""
    with pytest.raises(ConfigError) as error:
        load(["+exp=quickstart", typed])
    (line,) = error.value.problems
    assert said in line and len(line) < 600, line


def test_other_programs_keys_have_a_meaning_that_exists():
    """Catches advice to write a key that is none."""
    from launch.foreign import MEANT

    known = {".".join(path) for path in ALL} | set(leaves(RunConfig))
    for meant in MEANT.values():
        key = meant.partition("=")[0]
        assert "." not in key or " " in key or key in known, meant
    assert meant_by("--config") is not None and meant_by("nonsense") is None


def test_own_conversations_take_one_key():
    """Catches an experiment on shipped conversations that cannot be given others by data.path alone."""
    config = load(["+exp=sft_quickstart", "data.path=chat.jsonl"])
    assert {name: (s.path, s.format) for name, s in config.data.sources.items()} == {"main": ("chat.jsonl", "chat")}
    assert all(stage.mix is None for stage in config.schedule.stages.values())
    with pytest.raises(ConfigError, match=r"data\.sources has .*more already"):
        load(["+exp=sft_quickstart", "data.path=chat.jsonl", "+data.sources.more.path=b"])


def test_what_is_not_there_is_said_before_the_plan(tmp_path, monkeypatch):
    """Catches minutes of tokenising before a missing init.source, and names of keys that were not typed."""
    monkeypatch.chdir(tmp_path)
    overrides = ["+exp=sft_hybrid", "data.path=nope.jsonl", "data.chat_template=x.jinja"]
    with pytest.raises(ConfigError) as error:
        refuse_missing(load(overrides), overrides, continues=False)
    source, data, template = error.value.problems
    assert source == "init.source=runs/moba_32k does not exist: run +exp=moba_32k first, or name another source"
    assert data.startswith("data.path=nope.jsonl: no such file") and template.startswith("data.chat_template=x.jinja")
    refuse_missing(load(["+exp=sft_hybrid"]), [], continues=True)
    Path("books").mkdir()
    Path("a.txt").touch()
    for place in ("books", "a.txt"):
        with pytest.raises(ConfigError, match=f"init.source={place}: .*neither a checkpoint.*; nor is it"):
            refuse_missing(load(["+exp=quickstart", f"init.source={place}"]), [], continues=False)


def test_the_plan_warns_of_what_cannot_be_meant():
    """Catches a rate of 1e4, a budget that is not used and blocks that do not divide the length, taken in silence."""
    stages = ["schedule.stages.sparse.tokens=50%", "schedule.stages.full.tokens=10%", "schedule.block_size=100"]
    config = load(["+exp=quickstart", "optim.lr.peak=1e4", *stages])
    warnings = " ".join(make_plan(config, 512, Hardware(), asked_tokens=300_000).warnings)
    assert "optim.lr.peak=10000" in warnings and "39% is not used" in warnings
    assert "blocks of 100 do not divide the length of 2K" in warnings and "64 or 128" in warnings
    assert make_plan(load(["+exp=quickstart"]), 512, Hardware(), asked_tokens=300_000).warnings == ()
