"""The staged schedule: boundaries exact to the token, learning rates against closed forms."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.schema import AttentionConfig, LRConfig
from conf.validate import freeze
from moba.kinds import Full, Moba, Sliding
from train.schedule import build_schedule, layer_plan, lr_at

K = 1024
SOURCES = {"sources": {"a": {"path": "a.txt", "weight": 3.0}, "b": {"path": "b.txt"}}}


def schedule_of(stages: dict, **sections):
    """A schedule from stages as a user writes them."""
    schedule = {"seq_len": 256, "batch_tokens": "1K", "stages": stages} | sections.pop("schedule", {})
    return build_schedule(freeze({"data": SOURCES, "schedule": schedule, **sections}))


stage_strategy = st.fixed_dictionaries(
    {"tokens": st.integers(1, 50_000), "batch_tokens": st.sampled_from([256, 1024, 3072]), "own_lr": st.booleans()}
)


@settings(deadline=None, max_examples=60)
@given(st.lists(stage_strategy, min_size=1, max_size=5), st.data())
def test_stages_tile_the_run(drawn, data):
    """Catches gaps, overlaps, partial steps, a stage that begins one step late, and rates that jump inside the run."""
    stages = {}
    for i, values in enumerate(drawn):
        stages[f"s{i}"] = {"tokens": values["tokens"], "batch_tokens": values["batch_tokens"]}
        if values["own_lr"]:
            stages[f"s{i}"]["lr"] = {"kind": "constant", "peak": 1.0 + i, "warmup_tokens": 0}
    schedule = schedule_of(stages)
    assert [stage.index for stage in schedule.stages] == list(range(len(drawn)))
    tokens, steps = 0, 0
    for stage, values in zip(schedule.stages, drawn):
        assert stage.start == tokens and stage.end == tokens + stage.tokens
        assert stage.tokens % values["batch_tokens"] == 0
        assert 0 <= stage.tokens - values["tokens"] < values["batch_tokens"]
        assert schedule.lookup(stage.start) is stage and schedule.lookup(stage.end - 1) is stage
        if stage.index:
            assert schedule.lookup(stage.start - 1) is schedule.stages[stage.index - 1]
        if values["own_lr"]:
            assert schedule.learning_rate(stage.start) == 1.0 + stage.index
        tokens, steps = stage.end, steps + stage.num_steps
    assert schedule.total_tokens == tokens and schedule.total_steps == steps
    anywhere = data.draw(st.integers(0, tokens - 1))
    assert [s for s in schedule.stages if s.start <= anywhere < s.end] == [schedule.lookup(anywhere)]


def test_walking_in_steps_meets_every_boundary():
    """Catches a boundary that falls inside a step: the loop adds whole batches and must land on each end."""
    schedule = schedule_of({"sparse": {"tokens": "90%"}, "full": {"tokens": "10%"}}, schedule={"tokens": "100K"})
    seen, steps, tokens = [], 0, 0
    while tokens < schedule.total_tokens:
        stage = schedule.lookup(tokens)
        seen.append(stage.name)
        tokens, steps = tokens + stage.batch_tokens, steps + 1
    assert tokens == schedule.total_tokens and steps == schedule.total_steps
    assert seen == ["sparse"] * math.ceil(90_000 / K) + ["full"] * math.ceil(10_000 / K)
    with pytest.raises(AssertionError):
        schedule.lookup(tokens)


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_learning_rate_against_its_formula(kind):
    """Catches a wrong warm-up, a decay measured from the wrong end, a final rate that isn't peak * min_ratio."""
    lr = LRConfig(kind, peak=2.0, min_ratio=0.25, warmup_tokens=100, options={"decay_tokens": 300})
    assert lr_at(lr, 0, 1000) == 0 and lr_at(lr, 50, 1000) == 1.0 and lr_at(lr, 100, 1000) == 2.0
    middle, end = lr_at(lr, 550, 1000), lr_at(lr, 1000, 1000)
    assert middle == pytest.approx({"cosine": 1.25, "linear": 1.25, "wsd": 2.0, "constant": 2.0}[kind])
    assert end == pytest.approx(2.0 if kind == "constant" else 0.5)
    if kind == "cosine":
        assert lr_at(lr, 325, 1000) == pytest.approx(0.5 + 1.5 * (1 + math.cos(math.pi / 4)) / 2)
    if kind == "wsd":
        assert lr_at(lr, 700, 1000) == 2.0 and lr_at(lr, 850, 1000) == pytest.approx(1.25)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["cosine", "linear", "wsd", "constant"]),
    st.floats(0, 1),
    st.integers(0, 400),
    st.integers(0, 600),
)
def test_learning_rate_is_continuous_and_bounded(kind, min_ratio, warmup, decay):
    """Catches a jump where warm-up meets decay, and rates above the peak or below the floor."""
    lr = LRConfig(kind, peak=1.0, min_ratio=min_ratio, warmup_tokens=warmup, options={"decay_tokens": decay})
    rates = [lr_at(lr, tokens, 1000) for tokens in range(1001)]
    assert all(0 <= rate <= 1 + 1e-12 for rate in rates)
    assert min(rates[warmup:]) >= min_ratio - 1e-12
    steepest = max(1 / max(warmup, 1), 1 / max(decay, 1) if kind == "wsd" else math.pi / 2 / (1000 - warmup))
    assert max(abs(a - b) for a, b in itertools.pairwise(rates)) <= steepest * 1.01
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


def test_shared_rate_spans_the_stages_without_their_own():
    """Catches a shared cosine that restarts at a stage, or runs on while another stage has its own rate."""
    lr = {"kind": "linear", "peak": 1.0, "min_ratio": 0.0, "warmup_tokens": 0}
    own = {"kind": "constant", "peak": 7.0, "warmup_tokens": 0}
    stages = {"a": {"tokens": 4 * K}, "b": {"tokens": 2 * K, "lr": own}, "c": {"tokens": 4 * K}}
    schedule = schedule_of(stages, optim={"lr": lr})
    rates = [schedule.learning_rate(step * K) for step in range(10)]
    assert rates == pytest.approx([7 / 8, 6 / 8, 5 / 8, 4 / 8, 7.0, 7.0, 3 / 8, 2 / 8, 1 / 8, 0.0])


def test_a_stage_inherits_what_its_rate_leaves_open():
    """Catches a stage's rate that falls back to defaults, or warms up for the run's share instead of its own."""
    lr = {"kind": "wsd", "peak": 1.0, "min_ratio": 0.5, "warmup_tokens": "25%", "decay_tokens": "50%"}
    stages = {"a": {"tokens": 8 * K}, "b": {"tokens": 16 * K, "lr": {"peak": 2.0}}, "c": {"tokens": 4 * K, "lr": {}}}
    schedule = schedule_of(stages, optim={"lr": lr})
    again = [schedule.learning_rate(tokens) for tokens in range(8 * K, 24 * K, K)]
    assert again[:5] == [0.5, 1.0, 1.5, 2.0, 2.0] and again[7] == 2.0 and again[-1] == 1.0
    assert again[11] == pytest.approx(1.5)
    assert [schedule.learning_rate(tokens) for tokens in (24 * K, 27 * K)] == [1.0, 0.5]
    assert schedule.learning_rate(7 * K) == 0.5, "the run's own rate spans the stage without one"


def test_first_step_trains_and_last_step_has_the_final_rate():
    """Catches a first step at rate 0 and a run that never reaches its floor."""
    lr = {"kind": "cosine", "peak": 1.0, "min_ratio": 0.1, "warmup_tokens": 4 * K}
    schedule = schedule_of({"a": {"tokens": 20 * K}}, optim={"lr": lr})
    assert schedule.learning_rate(0) == 0.25
    assert schedule.learning_rate(3 * K) == 1.0
    assert schedule.learning_rate(19 * K) == pytest.approx(0.1)


def test_layer_plans():
    """Catches full layers at the wrong end, a pattern that isn't repeated, kernels a full layer doesn't have."""

    def plan(kind, num_layers, **options):
        return layer_plan(
            AttentionConfig(kind, options={"block_size": 64, "top_k": 3, "window": 16}, **options), num_layers
        )

    moba, full, slide = Moba(64, 3), Full(), Sliding(window=16)
    assert plan("full", 2) == (full, full)
    assert plan("moba", 2) == (moba, moba)
    assert plan("moba", 3, full_last=1) == (moba, moba, full)
    assert plan("moba", 3, full_last=3) == (full,) * 3
    assert plan("moba", 5, pattern="MMf") == (moba, moba, full, moba, moba)
    assert [spec.backend for spec in plan("moba", 2, backend="triton", full_last=1)] == ["triton", "auto"]
    assert plan("moba", 3, pattern="SM") == (slide, moba, slide)
    assert plan("full", 4, pattern="sf") == (slide, full) * 2
    assert [spec.backend for spec in plan("moba", 2, backend="triton", pattern="SM")] == ["auto", "triton"]


def test_stages_resolve_what_they_leave_open():
    """Catches a stage that ignores the schedule's defaults or the sources' weights."""
    stages = {"a": {"tokens": K}, "b": {"tokens": K, "seq_len": 512, "mix": {"a": 0, "b": 5}}}
    first, second = schedule_of(stages, schedule={"block_size": 128, "top_k": 2}).stages
    assert (first.seq_len, first.batch_tokens, first.micro_tokens) == (256, K, 256)
    assert second.micro_tokens == 512
    assert first.attention[0] == Moba(128, 2)
    twins = {
        "a": {"tokens": K, "attention": {"pattern": "SM"}},
        "b": {"tokens": K, "attention": {"kind": "full", "pattern": "SF", "window": 9}},
        "c": {"tokens": K},
    }
    firsts = [stage.attention[0] for stage in schedule_of(twins, schedule={"window": 64}).stages]
    assert firsts[:2] == [Sliding(64), Sliding(9)] and isinstance(firsts[2], Moba)
    assert first.mix == {"a": 0.75, "b": 0.25} and second.mix == {"b": 1.0}
