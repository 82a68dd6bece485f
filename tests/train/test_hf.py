"""Hugging Face checkpoints in: the same logits as transformers' own models, and every refusal by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
)

from conf.build import ConfigError
from conf.schema import ModelConfig
from moba.documents import Documents
from train.checkpoint.store import CheckpointError
from train.hf import pretrained
from train.model.decoder import Decoder

SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
MODELS = {
    "llama2": (LlamaConfig, {"rms_norm_eps": 1e-5}),
    "llama3": (LlamaConfig, {"rope_parameters": {"rope_theta": 5e5, **LLAMA3}}),
    "llama3.2": (LlamaConfig, {"tie_word_embeddings": True, "head_dim": 32}),
    "smollm2": (LlamaConfig, {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e5}}),
    "llama-linear": (LlamaConfig, {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    "llama-dynamic": (LlamaConfig, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    "mistral": (MistralConfig, {"sliding_window": None, "head_dim": 24}),
    "mistral-wide": (MistralConfig, {"sliding_window": 128}),
    "qwen2": (Qwen2Config, {"rope_parameters": {"rope_theta": 1e6}}),
    "qwen2-tied": (Qwen2Config, {"tie_word_embeddings": True, "sliding_window": 64, "use_sliding_window": False}),
    "qwen2.5-yarn": (Qwen2Config, {"rope_parameters": {"rope_theta": 1e6, **YARN}}),
    "qwen3": (Qwen3Config, {"head_dim": 32, "rope_parameters": {"rope_theta": 1e6}}),
}


def make(name_or_class, **options):
    """A model of transformers' with weights far from their initial values, so that each one counts: biases too."""
    kind, given = MODELS[name_or_class] if isinstance(name_or_class, str) else (name_or_class, {})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**SIZES | given | options)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * 0.3 + (1.0 if "norm" in name else 0.0))
    return model


def load(directory):
    """Our model of a directory."""
    shape = pretrained.read_shape(directory)
    model = Decoder(shape, shape.vocab_size).eval()
    assert pretrained.load_weights(model, shape, directory) == directory
    return model


def edit(directory, **changes):
    """Changes keys of a config.json; None removes one."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@torch.no_grad()
def both_logits(theirs, ours, length=100):
    """Logits of both models for the same random tokens: [T, V] each."""
    tokens = torch.randint(0, SIZES["vocab_size"], (length,))
    return theirs(tokens[None]).logits[0], ours.logits(tokens, torch.arange(length), Documents.from_lengths([length]))


def refusal(directory):
    """The text of the ConfigError or CheckpointError on loading."""
    with pytest.raises((ConfigError, CheckpointError)) as error:
        load(directory)
    return str(error.value)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A saved tiny Llama; not to be changed."""
    directory = tmp_path_factory.mktemp("llama")
    make("llama2").save_pretrained(directory)
    return directory


@pytest.fixture
def copy(llama, tmp_path):
    """A copy of it to be spoilt."""
    directory = tmp_path / "copy"
    directory.mkdir()
    for path in llama.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    return directory


@pytest.mark.parametrize("shards", ["1GB", "60KB"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(name, shards, tmp_path):
    """Catches an option that is read wrongly or dropped: heads, head size, biases, QK-norm, ties, epsilon, RoPE of any
    type, beyond the original length too; and tensors taken from the wrong file."""
    theirs = make(name)
    theirs.save_pretrained(tmp_path, max_shard_size=shards)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 if shards == "1GB" else 3
    expected, found = both_logits(theirs, load(tmp_path))
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", ["llama3", "llama-linear", "qwen2.5-yarn", "smollm2"])
@pytest.mark.parametrize("spelling", ["type", "rope_type"])
def test_the_old_layout_of_rope_is_read(name, spelling, tmp_path):
    """Catches reading only transformers 5's rope_parameters: hub files have rope_theta and rope_scaling."""
    theirs = make(name)
    theirs.save_pretrained(tmp_path)
    shape = pretrained.read_shape(tmp_path)
    parameters = dict(theirs.config.rope_parameters)
    theta, kind = parameters.pop("rope_theta"), parameters.pop("rope_type")
    scaling = None if kind == "default" else parameters | {spelling: kind}
    edit(tmp_path, rope_parameters=None, rope_theta=theta, rope_scaling=scaling)
    assert "rope_parameters" not in (tmp_path / "config.json").read_text()
    assert pretrained.read_shape(tmp_path) == shape
    assert shape.rope_theta == theta != 10000 or name == "llama-linear"


def test_what_a_config_leaves_out_is_the_familys_default(llama, copy):
    """Catches defaults of ours where transformers' differ: Llama 2 files have no rope_theta, some no head count."""
    edit(copy, rope_parameters=None, num_key_value_heads=None, head_dim=None, rms_norm_eps=None, architectures=None)
    shape = pretrained.read_shape(copy)
    assert (shape.rope_theta, shape.num_kv_heads, shape.head_dim, shape.norm_eps) == (10000.0, 4, 16, 1e-6)
    assert shape.pretrained_length == 128 and not shape.tie_embeddings
    assert pretrained.read_shape(llama).norm_eps == 1e-5


LONG = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 32}
REFUSED = {
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, ["quantised", "gptq"]),
    "unknown": ({"model_type": "gpt2"}, ["model_type=gpt2", "llama, mistral, qwen2, qwen3"]),
    "headless": ({"architectures": ["LlamaForSequenceClassification"]}, ["LlamaForSequenceClassification"]),
    "activation": ({"hidden_act": "gelu"}, ["hidden_act=gelu"]),
    "biases": ({"attention_bias": True, "mlp_bias": True}, ["attention_bias=true", "mlp_bias=true"]),
    "longrope": (
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **LONG}},
        ["rope_type=longrope is refused"],
    ),
    "strange rope": ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, ["rope_type=spiral is unknown"]),
    "partial rope": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        ["partial_rotary_factor=0.5"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_our_model_has_not_is_refused_by_name(case, copy):
    """Catches a feature that is silently dropped: the model would run and be another one."""
    changes, words = REFUSED[case]
    edit(copy, **changes)
    text = refusal(copy)
    assert all(word in text for word in words), text
    assert "init.source" in text


@pytest.mark.parametrize("kind", [MixtralConfig, Qwen2MoeConfig])
def test_mixtures_of_experts_are_refused_by_name(kind, tmp_path):
    """Catches experts taken for an unknown name of something that might work."""
    kind(**SIZES).save_pretrained(tmp_path)
    assert "mixture of experts" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (MistralConfig, {"sliding_window": 64}),
        (Qwen2Config, {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}),
        (Qwen3Config, {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1, "head_dim": 16}),
    ],
)
def test_sliding_windows_are_refused_where_they_matter(kind, options, tmp_path):
    """Catches a window that is dropped; and one refused although no layer has it, or it is as long as the context."""
    make(kind, **options).save_pretrained(tmp_path)
    text = refusal(tmp_path)
    assert "sliding_window=64" in text and "context of 128" in text
    edit(tmp_path, sliding_window=128)
    assert load(tmp_path)
    if "max_window_layers" in options:
        edit(tmp_path, sliding_window=64, max_window_layers=3, layer_types=None)
        assert load(tmp_path)


def test_pickled_weights_are_refused_with_a_way_out(copy):
    """Catches unpickling, which would run a stranger's code, and a dead end."""
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    text = refusal(copy)
    assert "pytorch_model.bin" in text and "pickle" in text and "save_pretrained" in text
    (copy / "pytorch_model.bin").unlink()
    assert "neither model.safetensors" in refusal(copy)


def test_damage_and_gaps_are_named(copy, tmp_path):
    """Catches a traceback, or weights left random, where a download was cut short."""
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    assert "is damaged" in refusal(copy)
    weights.write_bytes(whole)
    tensors = load_file(weights)
    save_file({k: v for k, v in tensors.items() if k != "lm_head.weight"}, weights)
    assert "lm_head.weight is not in" in refusal(copy)
    save_file(tensors | {"model.norm.weight": torch.zeros(64, dtype=torch.int8)}, weights)
    assert "model.norm.weight is I8" in refusal(copy)
    sharded = tmp_path / "sharded"
    make("llama2").save_pretrained(sharded, max_shard_size="60KB")
    next(sharded.glob("model-00002*")).unlink()
    assert "lacks model-00002" in refusal(sharded)
    edit(copy, num_hidden_layers="three")
    assert "num_hidden_layers" in refusal(copy)
    (copy / "config.json").write_text("{")
    assert "config.json is not JSON" in refusal(copy)


def test_leftovers_of_old_files_are_ignored(copy):
    """Catches a refusal of frequencies that old Llama files keep, and of a tied matrix that is there twice."""
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, copy / "model.safetensors")
    edit(copy, tie_word_embeddings=True)
    model = load(copy)
    assert torch.equal(model.lm_head.weight, tensors["model.embed_tokens.weight"])


def test_a_model_of_another_shape_lists_all_differences(llama):
    """Catches a message that names one difference at a time, or a RoPE that is silently replaced."""
    shape = pretrained.read_shape(llama)
    assert pretrained.differences(vars(shape), shape) == []
    assert (
        pretrained.differences({"norm_eps": 9.999999747378752e-06}, shape)
        == []
        != pretrained.differences({"norm_eps": 1e-6}, shape)
    )
    assert (
        pretrained.differences({"hidden_size": 64, "head_dim": None, "rope_scaling": {"rope_type": "default"}}, shape)
        == []
    )
    other = ModelConfig(hidden_size=32, num_kv_heads=2, ffn_size=96, vocab_size=384, rope_theta=5e5, norm_eps=1e-5)
    with pytest.raises(ConfigError) as error:
        pretrained.load_weights(Decoder(other, 384), other, llama)
    named = sorted(line.split("=")[0] for line in error.value.problems)
    wrong = ("hidden_size", "num_layers", "vocab_size", "tie_embeddings", "rope_theta")
    assert named == sorted(f"model.{name}" for name in wrong)
    assert "model.vocab_size=384: the source has 300" in error.value.problems


def test_a_hub_id_that_cannot_be_had_names_the_alternatives(monkeypatch, tmp_path):
    """Catches a stack of network errors, and waiting for a network that is not there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert (
        pretrained.is_model("nobody/nothing") and not pretrained.is_model(tmp_path) and not pretrained.is_model("a/b/c")
    )
    with pytest.raises(ConfigError) as error:
        pretrained.locate("nobody/nothing")
    (line,) = error.value.problems
    for word in ("init.source=nobody/nothing", "run directory", "checkpoint", "config.json", "hf download"):
        assert word in line
    assert "\n" not in line
