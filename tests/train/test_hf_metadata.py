"""What other software reads of an export: where texts end, how long the context is, RoPE in both layouts."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from conf.schema import DataConfig, RunConfig, SourceConfig
from data.tokenizer import load_tokenizer
from launch import export
from launch.cli import UsageError
from train.checkpoint import checkpoint_dir
from train.hf import hf_metadata


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
    with pytest.raises(UsageError, match=r"eos=nope: no special token .* it has <\|endoftext\|>"):
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
