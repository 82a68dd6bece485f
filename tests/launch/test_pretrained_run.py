"""A pretrained model all the way: a Hugging Face directory into launch/train.py, a checkpoint, and back into
transformers after the directory it came from is gone."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MistralConfig, Qwen3Config

from conf.schema import RopeConfig
from data.tokenizer import load_tokenizer
from evals.loading import attention_plan, load_trained
from launch import export, generate
from moba.documents import Documents
from moba.kinds import Moba
from train.hf import hf_export
from train.hf.pretrained import read_shape

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 4224, "max_position_embeddings": 512}
PROMPT = "a b c " * 30


@pytest.fixture(scope="module")
def run(house, launcher, tmp_path_factory):
    """The directory of a run of two stages from a tiny Mistral of 512 tokens, which has since been removed."""
    source, folder = house.root / "mistral", tmp_path_factory.mktemp("continued") / "run"
    torch.manual_seed(0)
    config = MistralConfig(**SIZES, sliding_window=512, initializer_range=0.1, attention_dropout=0.0, pad_token_id=7)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(source)
    tokenizer = source / "tokenizer"
    tokenizer.mkdir()
    export.save_tokenizer(load_tokenizer("bpe-4k"), tokenizer)
    for path in tokenizer.iterdir():
        path.rename(source / path.name)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "generation_config.json").write_text('{"temperature": 0.5, "pad_token_id": 7}')
    stage = "schedule.stages"
    ended = launcher.run(
        ["+exp=quickstart", "model=from_source", f"init.source={source}", *house.data, f"run.dir={folder}"]
        + [f"schedule.{key}" for key in ("tokens=6K", "seq_len=512", "batch_tokens=1K", "block_size=32", "top_k=2")]
        + [f"{stage}.full.seq_len=1K", f"{stage}.full.rope.theta=40000", "optim.lr.peak=1e-2", "eval.documents=1"]
        + ["checkpoint.every_tokens=0", "logging.wandb=disabled", "logging.figures=false"]
    )
    assert ended.code == 0 and "starting from" in ended.out, ended
    before = load_file(source / "model.safetensors")
    shutil.copytree(source, folder.parent / "original", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.rmtree(source)
    return folder, before


@torch.no_grad()
def test_what_was_trained_goes_back_to_transformers(run, tmp_path):
    """Catches a run that cannot be exported without its source, weights other than the trained ones, another
    architecture, a window that would now cut the context, and a tokenizer or template that stays behind."""
    folder, before = run
    export.main([f"run={folder}", f"to={tmp_path / 'out'}", "dtype=fp32"])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    config = theirs.config
    assert config.model_type == "mistral" and config.pad_token_id == 7 and config.sliding_window is None
    assert config.max_position_embeddings == 1024 and config.rope_parameters["rope_theta"] == 40000
    trained = load_trained(folder, "cpu")
    tokens = torch.randint(0, 4000, (1000,))
    pack = (tokens, torch.arange(1000), Documents.from_lengths([1000]))
    expected = trained.model.logits(*pack)
    torch.testing.assert_close(theirs(tokens[None]).logits[0], expected, rtol=1e-5, atol=1e-5)
    after = theirs.state_dict()
    assert all((after[name] - tensor.float()).abs().max() > 1e-3 for name, tensor in before.items() if "proj" in name)
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder.parent / "original" / name).read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ messages }}"

    import moba.transformers  # noqa: F401 - registers "moba"

    theirs.set_attn_implementation("moba")
    trained.model.set_attention(attention_plan("moba", trained))
    sparse = trained.model.logits(*pack)
    assert (sparse - expected).abs().max() > 1e-3
    torch.testing.assert_close(theirs(tokens[None]).logits[0], sparse, rtol=1e-5, atol=1e-5)


def test_a_run_writes_without_its_source(run, capsys):
    """Catches generation that looks for the tokenizer where it was."""
    folder, _ = run
    generate.main([f"run={folder}", f"prompt={PROMPT}", "max_new_tokens=3", "device=cpu", "attn=moba"])
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(
            **SIZES, pad_token_id=3, bos_token_id=5, rope_parameters={"rope_type": "default", "rope_theta": 5e5}
        ),
        MistralConfig(**SIZES, sliding_window=None, attention_dropout=0.1),
        Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
    ],
)
def test_the_config_of_an_untrained_model_stays_as_it_came(config, tmp_path):
    """Catches a key that is dropped, respelt or replaced by a default of ours on the way through."""
    config.dtype, config.architectures = torch.bfloat16, [hf_export.FAMILIES[config.model_type].architecture]
    config.save_pretrained(tmp_path)
    original = json.loads((tmp_path / "config.json").read_text())
    plan = [Moba(64, 3)] * 2
    options = {"num_embeddings": 4224, "attention": plan, "plan": plan, "dtype": "bf16", "bos_id": None, "eos_id": 9}
    ours = hf_export.config_json(read_shape(tmp_path), rope=RopeConfig(), max_length=512, **options)
    assert hf_export.as_it_came(original, ours) == original | {"moba": ours["moba"]}
    ours = hf_export.config_json(read_shape(tmp_path), rope=RopeConfig(theta=7e5), max_length=900, **options)
    longer = hf_export.as_it_came(original, ours)
    found = AutoConfig.for_model(**longer)
    assert found.rope_parameters["rope_theta"] == 7e5 and found.max_position_embeddings == 900
    changed = {key for key in original.keys() | longer.keys() if original.get(key) != longer.get(key)}
    assert changed == {"rope_parameters", "rope_theta", "max_position_embeddings", "moba"}
