"""What other software reads of an export: where texts end, how long the context is, RoPE in both layouts."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from conf.schema import DataConfig, ModelConfig, RopeConfig, RunConfig, SourceConfig
from data.tokenizer import load_tokenizer
from launch import export
from launch.cli import UsageError
from moba.kinds.full import Full
from train.checkpoint import checkpoint_dir
from train.hf import hf_export, hf_metadata
from train.model.rope import Rope


@pytest.fixture
def tokenizer(tmp_path):
    """A byte-level tokenizer with a base model's end of text, chat markers, and the base model's length."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    saved = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", model_max_length=2048)
    saved.save_pretrained(tmp_path / "tokenizer")
    return load_tokenizer(str(tmp_path / "tokenizer"))


def test_a_chat_model_ends_where_its_turns_end(tokenizer, tmp_path):
    """Catches a base model's EOS in an export of a chat model: other software would never stop."""
    chat = replace(RunConfig(), data=DataConfig(sources={"m": SourceConfig(format="chat")}, chat_template="chatml"))
    template = export.chat_template(chat, tokenizer)
    end, base = (tokenizer.special_tokens[text] for text in ("<|im_end|>", "<|endoftext|>"))
    assert export.ends_of_text(chat, tokenizer, template, None) == [end, base]
    assert export.ends_of_text(chat, tokenizer, template, "<|endoftext|>") == [base]
    assert export.ends_of_text(RunConfig(), tokenizer, None, None) == [base]
    with pytest.raises(UsageError, match=r"eos=nope: not a special token .* has <\|endoftext\|>"):
        export.ends_of_text(chat, tokenizer, template, "nope")

    to = tmp_path / "out"
    to.mkdir()
    export.save_tokenizer(tokenizer, to, template)
    hf_metadata.finish_tokenizer(to, eos="<|im_end|>", length=8192)
    loaded = AutoTokenizer.from_pretrained(to)
    assert (loaded.eos_token, loaded.eos_token_id, loaded.model_max_length) == ("<|im_end|>", end, 8192)
    assert hf_metadata.generation_config(None, eos=[end, base], old_length=None, length=8192) == {
        "eos_token_id": [end, base]
    }


def test_generation_settings_follow_the_context(tmp_path):
    """Catches texts bounded by the length before an extension, and a bound of the user's own overwritten."""
    path = tmp_path / "generation_config.json"
    for before, after in ((2048, 8192), (100, 100)):
        path.write_text(json.dumps({"max_length": before, "temperature": 0.5, "eos_token_id": 1}))
        found = hf_metadata.generation_config(path, eos=[7], old_length=2048, length=8192)
        assert found == {"max_length": after, "temperature": 0.5, "eos_token_id": 7}
    assert hf_metadata.generation_config(path, eos=None, old_length=2048, length=8192) is None, "left as it came"


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 4.0}])
def test_both_layouts_of_rope_say_the_same(scaling):
    """Catches a RoPE base that older or newer transformers take for 10000."""
    sizes = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 4096}
    old = sizes | {"rope_theta": 5e5, "rope_scaling": scaling}
    both = hf_metadata.with_both_ropes(old)
    assert hf_metadata.with_both_ropes(sizes | {"rope_parameters": both["rope_parameters"]}) == both
    assert both["rope_theta"] == both["rope_parameters"]["rope_theta"] == 5e5 and both["rope_scaling"] == scaling
    wanted = AutoConfig.for_model(**old).rope_parameters
    for kept in (("rope_parameters",), ("rope_theta", "rope_scaling")):
        given = {key: value for key, value in both.items() if key not in kept}
        assert AutoConfig.for_model(**given).rope_parameters == wanted, kept
    assert AutoConfig.for_model(**both).rope_parameters == wanted


OWN = {
    "none": None,
    "linear": {"rope_type": "linear", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 512},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
}  # fmt: skip
IN_A_STAGE = {
    "none": RopeConfig(),
    "theta": RopeConfig(theta=4e5),
    "linear": RopeConfig(scaling="linear", factor=4.0),
    "ntk": RopeConfig(scaling="ntk", factor=4.0),
    "yarn": RopeConfig(theta=2e4, scaling="yarn", factor=4.0, original_length=2048),
    "llama3": RopeConfig(scaling="llama3", factor=4.0, original_length=2048),
}
EXPORTED = [("none", stage) for stage in IN_A_STAGE] + [(own, "theta") for own in OWN if own != "none"]
EXPORTED += [("yarn", "none"), ("llama3", "none"), ("linear", "linear"), ("linear", "ntk"), ("dynamic", "yarn")]


@pytest.mark.parametrize(("own", "stage"), EXPORTED)
def test_an_export_has_the_angles_of_the_training_up_to_its_length(own, stage):
    """Catches a scaling whose original length was raised to the new context, or left out, or a base that one layout
    lacks: transformers' own embedding of the exported config, in each layout, against the run's."""
    length, old = 8192, 2048
    model = ModelConfig(hidden_size=256, num_heads=4, ffn_size=64, rope_scaling=OWN[own], pretrained_length=old)
    full = (Full(),) * model.num_layers
    written = hf_metadata.with_both_ropes(
        hf_export.config_json(
            model, num_embeddings=64, rope=IN_A_STAGE[stage], attention=full, plan=full, max_length=length,
            dtype="fp32", bos_id=None, eos_id=1,
        )
    )  # fmt: skip
    assert written["max_position_embeddings"] == length
    positions = torch.tensor([0, 1, 511, 512, 2047, 2048, 8191])
    wanted = Rope(model, IN_A_STAGE[stage]).cos_sin(positions, torch.float32, "cpu")
    for left_out in ((), ("rope_parameters",), ("rope_theta", "rope_scaling")):
        config = AutoConfig.for_model(**{key: value for key, value in written.items() if key not in left_out})
        found = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
        for ours, theirs in zip(wanted, found):
            torch.testing.assert_close(theirs[0], ours, rtol=0, atol=2e-3)  # a rounding of a frequency, 8,000 times
    for scaling in (written["rope_scaling"] or {}, written["rope_parameters"]):
        assert scaling.get("original_max_position_embeddings") in (None, 512, old), "not the new length"


def test_files_have_the_mode_that_the_umask_allows(tmp_path):
    """Catches weights that their owner alone can read, as safetensors writes them."""
    path = tmp_path / "a"
    path.touch(0o600)
    before = os.umask(0o027)
    try:
        checkpoint_dir.share(path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
