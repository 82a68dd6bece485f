"""What a configuration takes from init.source, and what it may not say beside it."""

import json
import shutil

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from conf.trajectory import to_dict
from conf.validate import ConfigError
from data.tokenizer import load_tokenizer
from launch.config import load
from launch.export import save_tokenizer
from train.checkpoint import checkpoint_dir


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny Llama with the shipped 4K tokenizer, not to be changed."""
    directory = tmp_path_factory.mktemp("models") / "small"
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=4200, **sizes, rope_parameters=rope)).save_pretrained(directory)
    save_tokenizer(load_tokenizer("bpe-4k"), directory)
    return directory


def problems(*overrides):
    with pytest.raises(ConfigError) as error:
        load(["+exp=quickstart", *map(str, overrides)])
    return error.value.problems


def test_shape_and_tokenizer_come_from_the_source(source):
    """Catches a shape that is another choice's, an embedding padded to other rows, and bytes fed to a BPE model."""
    config = load(["+exp=quickstart", "model=from_source", f"init.source={source}", "model.loss_tile=64"])
    model = config.model
    assert (model.name, model.hidden_size, model.num_layers, model.head_dim) == ("small", 32, 2, 8)
    assert (model.vocab_size, model.tie_embeddings, model.rope_theta) == (4200, False, 5e4)
    assert model.rope_scaling == {"rope_type": "linear", "factor": 2.0} and model.pretrained_length == 2048
    assert model.loss_tile == 64
    assert config.data.tokenizer == str(source)
    assert load(["+exp=quickstart", "model=from_source", f"init.source={source}", "data.tokenizer=bpe-4k"])


def test_a_model_section_that_contradicts_lists_its_differences(source):
    """Catches weights forced into another shape, and one difference shown at a time."""
    found = problems(f"init.source={source}", f"data.tokenizer={source}")
    text = "\n".join(found)
    for word in ("model.hidden_size=192: the source has 32", "model.num_layers=4", "model.rope_scaling=null"):
        assert word in text
    assert "model.vocab_size" not in text and "model=from_source takes it from there" in found[-1]
    found = problems("model=from_source", f"init.source={source}", "model.num_layers=3", "model.rope_theta=1e6")
    assert len(found) == 3 and "model.num_layers=3: the source has 2" in found


def test_another_tokenizer_is_refused(source):
    """Catches continuing a model on numbers that mean other words to it."""
    (line,) = problems("model=from_source", f"init.source={source}", "data.tokenizer=bytes")
    assert "data.tokenizer=bytes: init.source has its own tokenizer" in line and str(source) in line
    (line,) = problems("model=from_source", f"init.source={source}", "init.optimizer=true")
    assert "init.optimizer=true" in line


def test_a_source_without_a_tokenizer_leaves_the_choice(source, tmp_path):
    """Catches a model directory without tokenizer.json that cannot be used at all."""
    bare = tmp_path / "bare"
    shutil.copytree(source, bare, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    config = load(["+exp=quickstart", "model=from_source", f"init.source={bare}", "data.tokenizer=bpe-4k"])
    assert config.data.tokenizer == "bpe-4k" and config.model.vocab_size == 4200
    (line,) = problems("model=from_source", f"init.source={bare}")
    assert "data.tokenizer" in line and str(bare) in line, "not trained on bytes without a word"


def test_a_run_is_a_source_too(tmp_path):
    """Catches a shape that is only taken from Hugging Face's models, and layers that lose their kind or gain another
    without a word: RoPE has no weights that could miss."""
    layers = ["model.num_layers=5", "model.rope_pattern=RN", "model.key_conv=3", "model.key_conv_pattern=-K"]
    run = load(["+exp=quickstart", *layers, "data.tokenizer=bpe-4k", f"run.dir={tmp_path / 'run'}"])
    temporary = checkpoint_dir.begin(tmp_path / "run", 7)
    state = {"tokens": 7, "state": {}, "stage_end": False, "optimizer_step": 1, "precision": "fp32", "parameters": {}}
    (temporary / "state.json").write_text(json.dumps(state))
    (temporary / "config.yaml").write_text(yaml.safe_dump(to_dict(run), sort_keys=False))
    from safetensors.torch import save_file

    save_file({"none": torch.zeros(1)}, temporary / "position_loss.safetensors")
    checkpoint_dir.commit(temporary, {path.name: checkpoint_dir.seal(path) for path in temporary.iterdir()})
    config = load(["+exp=quickstart", "model=from_source", f"init.source={tmp_path / 'run'}"])
    assert config.model == run.model and config.data.tokenizer == "bpe-4k"
    found = problems("model=from_source", f"init.source={tmp_path / 'run'}", "model.rope_pattern=null")
    assert "model.rope_pattern=null: the source has RN" in found[0]


def test_what_is_not_there_is_said(tmp_path, monkeypatch):
    """Catches random weights where a source was asked for, and a traceback of the network's."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (line,) = problems("model=from_source")
    assert "needs init.source=" in line
    (line,) = problems("model=from_source", f"init.source={tmp_path}")
    assert "neither a checkpoint nor a run" in line and "Hugging Face" in line
    (line,) = problems("model=from_source", "init.source=nobody/nothing")
    assert "nobody/nothing" in line and "a run directory, a checkpoint, or a Hugging Face model" in line
