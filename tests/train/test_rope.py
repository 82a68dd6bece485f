"""train/model/rope.py against transformers' own RoPE, and the order in which a stage's scaling is applied."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from conf.build import ConfigError
from conf.schema import ModelConfig, RopeConfig, RunConfig, ScheduleConfig, StageConfig
from train.model.rope import Rope, check_stages

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
SCALINGS = {
    "none": None,
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "old spelling": {"type": "linear", "factor": 2.0},
    "llama3": LLAMA3,
    "llama3 x32": {**LLAMA3, "factor": 32.0},
    "yarn": YARN,
    "yarn betas": {**YARN, "beta_fast": 16, "beta_slow": 2, "truncate": False},
    "yarn attention factor": {**YARN, "attention_factor": 1.3},
    "yarn mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0},
    "yarn narrow ramp": {**YARN, "original_max_position_embeddings": 64},
}


def model_config(scaling=None, theta=500000.0, head_dim=64):
    return ModelConfig(hidden_size=4 * head_dim, num_heads=4, rope_theta=theta, rope_scaling=scaling)


def llama_config(scaling, theta=500000.0, head_dim=64):
    parameters = {"rope_type": "default", **(scaling or {}), "rope_theta": theta}
    if "type" in parameters:
        parameters["rope_type"] = parameters.pop("type")
    return LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, rope_parameters=parameters, max_position_embeddings=131072
    )


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_frequencies_equal_transformers(scaling, head_dim, theta):
    """Catches a wrong ramp, clamp or default of any scaling, and a missing attention factor."""
    rope = Rope(model_config(scaling, theta, head_dim))
    theirs = LlamaRotaryEmbedding(llama_config(scaling, theta, head_dim))
    torch.testing.assert_close(rope.inv_freq, theirs.inv_freq, rtol=1e-5, atol=0)
    assert rope.attention_factor == pytest.approx(theirs.attention_scaling, abs=1e-12)
    if scaling and scaling.get("rope_type") in ROPE_INIT_FUNCTIONS:
        inv_freq, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](llama_config(scaling, theta, head_dim))
        torch.testing.assert_close(rope.inv_freq, inv_freq, rtol=1e-5, atol=0)
        assert rope.attention_factor == pytest.approx(factor, abs=1e-12)
        assert not torch.allclose(inv_freq, Rope(model_config(None, theta, head_dim)).inv_freq)


@pytest.mark.parametrize("scaling", [None, LLAMA3, YARN], ids=["none", "llama3", "yarn"])
def test_cos_sin_equal_transformers_up_to_a_million_positions(scaling):
    """Catches angles that drift from transformers' with the position, in value or precision."""
    positions = torch.tensor([0, 1, 2, 1000, 32767, 131071, 999_999])
    theirs = LlamaRotaryEmbedding(llama_config(scaling))
    expected = theirs(torch.zeros(1, dtype=torch.float32), positions[None])
    rope = Rope(model_config(scaling))
    for actual, wanted in zip(rope.cos_sin(positions, torch.float32, "cpu"), expected):
        assert torch.equal(actual, wanted[0])


def test_result_dtype_and_shape():
    """Catches cosines computed in bf16: the bf16 result is the float32 one rounded once."""
    rope = Rope(model_config())
    positions = torch.arange(1000)
    cos32, sin32 = rope.cos_sin(positions, torch.float32, "cpu")
    cos16, sin16 = rope.cos_sin(positions, torch.bfloat16, "cpu")
    assert cos32.shape == sin32.shape == (1000, 64)
    assert torch.equal(cos16, cos32.bfloat16()) and torch.equal(sin16, sin32.bfloat16())


def test_stage_theta_replaces_the_models():
    """Catches a stage base that is ignored, or one applied after the model's own scaling."""
    changed = Rope(model_config(LLAMA3), RopeConfig(theta=8e6))
    assert torch.equal(changed.inv_freq, Rope(model_config(LLAMA3, theta=8e6)).inv_freq)
    assert not torch.equal(changed.inv_freq, Rope(model_config(LLAMA3)).inv_freq)


@pytest.mark.parametrize("scaling", [None, LLAMA3, YARN, {"rope_type": "linear", "factor": 2}])
def test_interpolation_divides_positions_after_the_models_own_scaling(scaling):
    """Catches interpolation applied before the model's own scaling: llama3's bands would move."""
    own = Rope(model_config(scaling))
    stage = Rope(model_config(scaling), RopeConfig(scaling="linear", factor=4.0))
    assert stage.attention_factor == own.attention_factor
    positions = torch.arange(0, 4096, 4)
    for a, b in zip(stage.cos_sin(positions, torch.float32, "cpu"), own.cos_sin(positions // 4, torch.float32, "cpu")):
        assert torch.equal(a, b)


STAGES = {
    "linear": (RopeConfig(scaling="linear", factor=3.0), {"rope_type": "linear", "factor": 3.0}),
    "yarn": (RopeConfig(scaling="yarn", factor=4.0, original_length=4096), YARN),
    "llama3": (RopeConfig(scaling="llama3", factor=8.0, original_length=8192), LLAMA3),
}


@pytest.mark.parametrize("stage,scaling", STAGES.values(), ids=STAGES)
def test_a_stages_scaling_equals_a_model_with_it(stage, scaling):
    """Catches a stage's scaling that differs from transformers' on a model without any."""
    for head_dim in (16, 128):
        rope = Rope(model_config(head_dim=head_dim), stage)
        theirs = LlamaRotaryEmbedding(llama_config(scaling, head_dim=head_dim))
        torch.testing.assert_close(rope.inv_freq, theirs.inv_freq, rtol=1e-6, atol=0)
        assert rope.attention_factor == pytest.approx(theirs.attention_scaling)
        assert not torch.equal(rope.inv_freq, Rope(model_config(head_dim=head_dim)).inv_freq)


@pytest.mark.parametrize("factor", [1.0, 4.0, 32.0])
def test_ntk_is_transformers_dynamic_scaling_at_a_fixed_length(factor):
    """Catches a wrong exponent or base: at `factor` times the model's length, with transformers' own factor 1, their
    frequencies are ours bit for bit; the slowest is divided by factor, the fastest kept."""
    for head_dim in (16, 64):
        config = llama_config({"rope_type": "dynamic", "factor": 1.0}, theta=10000.0, head_dim=head_dim)
        config.max_position_embeddings = 2048
        theirs, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, seq_len=int(2048 * factor))
        plain = Rope(model_config(theta=10000.0, head_dim=head_dim))
        ours = Rope(model_config(theta=10000.0, head_dim=head_dim), RopeConfig(scaling="ntk", factor=factor))
        assert torch.equal(ours.inv_freq, theirs)
        assert ours.inv_freq[0] == plain.inv_freq[0] == 1 and ours.attention_factor == 1
        assert (plain.inv_freq[-1] / ours.inv_freq[-1]).item() == pytest.approx(factor, rel=1e-5)


@pytest.mark.parametrize("scaling", [LLAMA3, YARN, {"rope_type": "linear", "factor": 2.0}], ids=str)
def test_ntk_slows_what_the_models_own_scaling_left(scaling):
    """Catches bands of the own scaling that move with the new base: each frequency is slowed by the same power of the
    factor as on a model without scaling."""
    ntk = RopeConfig(scaling="ntk", factor=8.0)
    own, both = Rope(model_config(scaling)), Rope(model_config(scaling), ntk)
    plain, alone = Rope(model_config()), Rope(model_config(), ntk)
    torch.testing.assert_close(both.inv_freq / own.inv_freq, alone.inv_freq / plain.inv_freq, rtol=1e-5, atol=0)
    assert both.attention_factor == own.attention_factor
    assert not torch.allclose(both.inv_freq, alone.inv_freq)


def test_dynamic_scaling_is_none_within_the_models_length_and_refused_beyond():
    """Catches a dynamic model that is scaled where transformers does not scale it, or quietly left unscaled beyond; and
    one that a stage cannot extend, or extends on top of a scaling that is in force no longer."""
    config = llama_config({"rope_type": "dynamic", "factor": 4.0}, theta=10000.0, head_dim=16)
    config.max_position_embeddings = 64
    model = replace(
        model_config({"rope_type": "dynamic", "factor": 4.0}, theta=10000.0, head_dim=16), pretrained_length=64
    )
    theirs = LlamaRotaryEmbedding(config)
    x = torch.zeros(1, 1, 16)
    cos, sin = Rope(model).cos_sin(torch.arange(64), torch.float32, "cpu")
    within = theirs(x, torch.arange(64)[None])
    assert torch.equal(cos, within[0][0]) and torch.equal(sin, within[1][0])
    assert not torch.equal(theirs(x, torch.arange(65)[None])[0][0, :64], cos)  # one token more changes them all
    with pytest.raises(ValueError, match=r"text of 65 tokens.*begins at 64.*ntk"):
        Rope(model).cos_sin(torch.arange(65), torch.float32, "cpu")
    plain = replace(model, rope_scaling=None)
    for stage in (
        RopeConfig(theta=5e5),
        RopeConfig(scaling="ntk", factor=4.0),
        RopeConfig(scaling="linear", factor=2.0),
    ):
        extended = Rope(model, stage)
        assert torch.equal(extended.inv_freq, Rope(plain, stage).inv_freq)
        assert extended.cos_sin(torch.arange(100), torch.float32, "cpu")[0].shape == (100, 16)
    run = RunConfig(
        model=model,
        schedule=ScheduleConfig(
            stages={
                "a": StageConfig(seq_len=64),
                "b": StageConfig(seq_len=128),
                "c": StageConfig(seq_len=128, rope=stage),
            }
        ),
    )
    with pytest.raises(ConfigError) as error:
        check_stages(run)
    (line,) = error.value.problems
    assert "schedule.stages.b.seq_len=128" in line and "begins at 64" in line


def test_text_names_the_order():
    """Catches a plan that hides which scaling comes first."""
    rope = Rope(model_config(LLAMA3), RopeConfig(scaling="linear", factor=4.0))
    assert str(rope) == "theta 500000, then llama3 x8, then linear x4"


@pytest.mark.parametrize(
    "scaling,words",
    [
        ({"rope_type": "dynamic", "factor": 2.0}, ["dynamic", "model.pretrained_length"]),
        ({"rope_type": "longrope"}, ["longrope", "refused"]),
        ({"rope_type": "ntk"}, ["ntk", "unknown", "llama3"]),
        ({"rope_type": "linear"}, ["lacks factor"]),
        ({"rope_type": "llama3", "factor": 8.0}, ["low_freq_factor", "original_max_position_embeddings"]),
        ({"rope_type": "linear", "factor": 0.0}, ["factor=0.0", "positive"]),
        ({**YARN, "beta": 3}, ["unknown keys beta", "beta_fast"]),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5"]),
        ({"rope_type": "default", "rope_theta": 1e4}, ["rope_theta", "contradicts"]),
        ({**LLAMA3, "low_freq_factor": 4.0}, ["high_freq_factor"]),
    ],
)
def test_refusals_of_the_models_scaling(scaling, words):
    """Catches a scaling that is ignored or half read instead of refused by name."""
    with pytest.raises(ValueError) as error:
        Rope(model_config(scaling))
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    "stage,model,words",
    [
        (RopeConfig(scaling="dynamic"), None, ["rope.scaling=dynamic", "ntk"]),
        (RopeConfig(scaling="llama3", factor=2.0), None, ["rope.scaling=llama3", "original_length"]),
        (RopeConfig(factor=2.0), None, ["rope.factor=2", "no effect"]),
        (RopeConfig(scaling="linear", factor=0.5), None, ["rope.factor=0.5"]),
        (RopeConfig(scaling="yarn", factor=2.0), None, ["original_length"]),
        (RopeConfig(scaling="yarn", factor=2.0, original_length=4096), YARN, ["model.rope_scaling.factor"]),
        (RopeConfig(theta=0.0), None, ["theta=0"]),
    ],
)
def test_refusals_of_a_stages_scaling(stage, model, words):
    """Catches a stage setting that would silently do nothing or the wrong thing."""
    with pytest.raises(ValueError) as error:
        Rope(model_config(model), stage)
    assert all(word in str(error.value) for word in words), error.value
