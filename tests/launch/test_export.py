"""Export: what came in goes out bit for bit, and transformers computes from it what our model computes."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config, Qwen3Config

from conf.build import ConfigError
from conf.schema import ModelConfig, RopeConfig
from data.tokenizer import load_tokenizer
from evals.loading import load_trained
from launch import export
from moba.documents import Documents
from moba.kinds import Full, from_entry
from train.hf import hf_export, pretrained
from train.model.generation import Sampling, generate
from train.model.rope import Rope

HERE = Path(__file__).resolve().parent
SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
SPARSE = "schedule.stages.sparse."
# name -> transformers' configuration, its dtype, tokens at which our run is saved, what the run sets
RUNS = {
    "llama": (
        LlamaConfig(**SIZES, tie_word_embeddings=True, head_dim=32, rope_parameters=LLAMA3),
        torch.bfloat16,
        1000,
        ["deepspeed=zero3", f"{SPARSE}rope.theta=8e5", f"{SPARSE}attention.full_last=1"],
    ),
    "qwen2": (
        Qwen2Config(**SIZES),
        torch.float32,
        1000,
        ["deepspeed=zero1", f"{SPARSE}rope.scaling=linear", f"{SPARSE}rope.factor=4", f"{SPARSE}seq_len=8K",
         f"{SPARSE}batch_tokens=8K"],
    ),
    "qwen3": (
        Qwen3Config(**SIZES, head_dim=32),
        torch.bfloat16,
        290_000,
        ["deepspeed=zero3", "deepspeed.precision=bf16", f"{SPARSE}attention.first_blocks=2",
         "schedule.stages.full.rope.scaling=yarn", "schedule.stages.full.rope.factor=4",
         "schedule.stages.full.rope.original_length=512"],
    ),
}  # fmt: skip


def save_source(directory, config, dtype):
    """A model of transformers' in which every weight, biases too, is far from its initial value."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * 0.3 + (1.0 if "norm" in name else 0.0))
    model.to(dtype).save_pretrained(directory)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """source/<name>, run/<name> and out/<name>: imported by two ranks, saved, exported in the source's dtype."""
    folder = tmp_path_factory.mktemp("export")
    lines = []
    for name, (config, dtype, tokens, overrides) in RUNS.items():
        source = folder / "source" / name
        save_source(source, config, dtype)
        init = ["+exp=quickstart", "model=from_source", f"init.source={source}", "data.tokenizer=bytes"]
        persist = "++deepspeed.extra.zero_optimization.stage3_param_persistence_threshold=17"
        lines.append(json.dumps([str(folder / "run" / name), tokens, [*init, persist, *overrides]]))
    (folder / "runs.jsonl").write_text("\n".join(lines))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, str(HERE / "export_worker.py"), str(folder / "runs.jsonl")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    for name, (_, dtype, _, _) in RUNS.items():
        short = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
        export.main([f"run={folder / 'run' / name}", f"to={folder / 'out' / name}", f"dtype={short}"])
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_import_then_export_is_the_identity(folder, name):
    """Catches a bit lost on the way through two ranks of ZeRO, a tensor renamed, doubled or cast."""
    before = load_file(folder / "source" / name / "model.safetensors")
    after = load_file(folder / "out" / name / "model.safetensors")
    assert sorted(before) == sorted(after)
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype == RUNS[name][1]
        assert torch.equal(tensor.view(torch.uint8), after[key].view(torch.uint8)), key


@pytest.mark.parametrize("name", RUNS)
@torch.no_grad()
def test_transformers_computes_what_our_model_does(folder, name):
    """Catches a config.json that makes another model: RoPE of another stage, heads, norms, ties; and with MoBA, another
    plan. The text is long enough that both the stage's RoPE and its blocks show."""
    trained = load_trained(folder / "run" / name, "cpu")
    length = 700
    tokens = torch.randint(0, 258, (length,))
    documents = Documents.from_lengths([length])

    def ours():
        return trained.model.logits(tokens, torch.arange(length), documents)

    own_plan, full_plan = trained.model.attention, [Full()] * 3
    sparse = ours()
    trained.model.set_attention(full_plan)
    full = ours()
    trained.model.set_rope(None)
    assert (ours() - full).abs().max() > 0.1  # the stage's RoPE matters
    theirs = AutoModelForCausalLM.from_pretrained(folder / "out" / name, dtype=torch.float32).eval()
    close = {"rtol": 1e-5, "atol": 2e-5 * full.abs().max().item()}
    torch.testing.assert_close(theirs(tokens[None]).logits[0], full, **close)
    if any(spec.routing is not None for spec in own_plan):
        import moba.transformers  # noqa: F401 - registers "moba"

        assert (sparse - full).abs().max() > 0.1
        theirs.set_attn_implementation("moba")
        torch.testing.assert_close(theirs(tokens[None]).logits[0], sparse, **close)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_folder_with_its_own_code_computes_what_our_model_does(folder, tmp_path, name):
    """Catches an export whose attention is not the checkpoint's where nothing of ours can be imported: logits, greedy
    tokens (prompt sparse, new tokens dense or not), padding, chunks of the prompt, gradients, a copy of it saved there,
    without Triton or with it; and one that forgets what our integration refuses. llama has a dense layer in its plan,
    qwen3 first blocks; both have grouped heads."""
    length, new = 700, 12
    tokens = torch.randint(0, 258, (length,), generator=torch.Generator().manual_seed(5))
    out = tmp_path / "alone"
    export.main([f"run={folder / 'run' / name}", f"to={out}", "dtype=fp32", "remote_code=true"])
    torch.save({"tokens": tokens, "new": new}, tmp_path / "request.pt")
    worker = [sys.executable, "-I", str(HERE / "remote_worker.py"), str(out), str(tmp_path / "request.pt")]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*worker, str(tmp_path / "answer.pt"), *(["without-triton"] if name == "llama" else [])],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    found = torch.load(tmp_path / "answer.pt")
    architecture = RUNS[name][0].__class__.__name__.replace("Config", "ForCausalLM")
    assert found["hidden"] and found["class"] == f"Moba{architecture}"
    assert found["triton"] == (name != "llama" and importlib.util.find_spec("triton") is not None)

    trained = load_trained(folder / "run" / name, "cpu")
    plan = [from_entry(entry) for entry in json.loads((out / "config.json").read_text())["moba"]["plan"]]
    assert all(spec.block_size * spec.top_k < length / 2 for spec in plan if spec.routing is not None)

    @torch.no_grad()
    def ours(plan, tokens=tokens):
        trained.model.set_attention(plan)
        places = torch.arange(len(tokens))
        return trained.model.logits(tokens, places, Documents.from_lengths([len(tokens)]))

    dense, sparse = ours([Full()] * 3), ours(plan)
    close = {"rtol": 1e-5, "atol": 2e-5 * dense.abs().max().item()}
    assert (dense - sparse).abs().max() > 0.1
    for same in ("sparse", "again"):
        torch.testing.assert_close(found[same], sparse, **close)
    torch.testing.assert_close(found["chunks"], sparse[length // 2 :], **close)
    torch.testing.assert_close(found["padded"][length // 2 :], ours(plan, tokens[: -(length // 2)]), **close)
    for same in ("dense", "plain"):
        torch.testing.assert_close(found[same], dense, **close)
    greedy = {"max_new_tokens": new, "sampling": Sampling(temperature=0.0), "prefill": plan}
    assert found["greedy"].tolist() == list(generate(trained.model, tokens.tolist(), **greedy))
    assert found["greedy, sparse"].tolist() == list(generate(trained.model, tokens.tolist(), **greedy, decode=plan))
    assert "with model.prompt(tokens)" in found["refusal"] and "has no plan: put" in found["no plan"]
    assert "attention_mask has values such as 2" in found["bad mask"]
    assert found["auto_map"]["AutoModelForCausalLM"].endswith(found["class"])

    import moba.transformers  # noqa: F401 - registers "moba"

    reference = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="moba")
    reference(tokens[None], labels=tokens[None]).loss.backward()
    for parameter, p in reference.named_parameters():
        torch.testing.assert_close(found["gradients"][parameter], p.grad, rtol=1e-4, atol=1e-5 * p.grad.abs().max())


def test_the_config_says_what_the_run_did(folder):
    """Catches a length or RoPE that is not the stage's of the checkpoint, another plan, and a run that ended with full
    attention, which would have no MoBA to switch on."""
    configs = {name: json.loads((folder / "out" / name / "config.json").read_text()) for name in RUNS}
    llama, qwen2, qwen3 = configs["llama"], configs["qwen2"], configs["qwen3"]
    assert llama["moba"] == {"plan": [["moba", 64, 4], ["moba", 64, 4], ["full", None, None]]}
    assert qwen3["moba"] == {"plan": [["moba", 64, 4, 2]] * 3}
    assert [c["architectures"] for c in configs.values()] == [
        ["LlamaForCausalLM"],
        ["Qwen2ForCausalLM"],
        ["Qwen3ForCausalLM"],
    ]
    assert llama["rope_theta"] == 8e5 and llama["rope_scaling"]["rope_type"] == "llama3"
    assert qwen2["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert qwen3["rope_scaling"]["original_max_position_embeddings"] == 512
    assert [c["max_position_embeddings"] for c in configs.values()] == [4096, 8192, 4096]
    assert (llama["torch_dtype"], qwen2["torch_dtype"]) == ("bfloat16", "float32")
    assert (llama["bos_token_id"], llama["eos_token_id"]) == (256, 257)


def test_a_plan_file_takes_the_place_of_the_runs_attention(folder, tmp_path):
    """Catches a plan that does not reach config.json, and one of another model."""
    path = tmp_path / "plan.yaml"
    path.write_text("plan: [[moba, 32, 3, 1], [full, null, null], [moba, 32, 2]]")
    export.main([f"run={folder / 'run' / 'llama'}", f"to={tmp_path / 'out'}", f"attention={path}"])
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["moba"] == {"plan": [["moba", 32, 3, 1], ["full", None, None], ["moba", 32, 2]]}
    path.write_text("plan: [[moba, 32, 3, 1]]")
    with pytest.raises(SystemExit):
        export.main([f"run={folder / 'run' / 'llama'}", f"to={tmp_path / 'other'}", f"attention={path}"])


@pytest.mark.parametrize("name", RUNS)
def test_an_export_can_be_imported_again(folder, name):
    """Catches a config.json that our own reader takes for another model."""
    was, now = pretrained.read_shape(folder / "source" / name), pretrained.read_shape(folder / "out" / name)
    rope = ("rope_theta", "rope_scaling")
    same = {key: value for key, value in vars(was).items() if key in pretrained.SHAPE and key not in rope}
    assert pretrained.differences(same, now) == []
    stage = load_trained(folder / "run" / name, "cpu").stage.rope
    torch.testing.assert_close(Rope(now).inv_freq, Rope(was, stage).inv_freq, rtol=1e-6, atol=0)
    assert Rope(now).attention_factor == pytest.approx(Rope(was, stage).attention_factor)


def test_large_models_are_written_in_several_files(folder, tmp_path, monkeypatch, capsys):
    """Catches an index that does not match, and a default dtype that rounds what was trained in fp32."""
    monkeypatch.setattr(hf_export, "SHARD_BYTES", 100_000)
    export.main([f"run={folder / 'run' / 'llama'}", f"to={tmp_path / 'out'}"])
    assert "LlamaForCausalLM, fp32" in capsys.readouterr().out
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    expected = AutoModelForCausalLM.from_pretrained(folder / "source" / "llama").state_dict()
    assert found["model.norm.weight"].dtype == torch.float32
    assert all(torch.equal(found[key], tensor.float()) for key, tensor in expected.items())


@settings(deadline=None, max_examples=25)
@given(st.text(st.characters(codec="utf-8"), max_size=40).filter(lambda text: "<|" not in text))
def test_the_byte_tokenizer_goes_along_exactly(text):
    """Catches an alphabet in another order, normalisation, or splitting that loses bytes."""
    ours = load_tokenizer("bytes")
    backend = export.byte_backend(ours)
    assert backend.encode(text, add_special_tokens=False).ids == ours.encode(text).tolist()
    assert backend.encode(text).ids == ours.document(text).tolist()[:-1]
    assert backend.decode(ours.encode(text).tolist()) == text


def test_tokenizers_load_in_transformers(folder, tmp_path):
    """Catches a missing end of text, and ids that differ from those trained on."""
    bytes_here = AutoTokenizer.from_pretrained(folder / "out" / "llama")
    assert (bytes_here.bos_token_id, bytes_here.eos_token_id, len(bytes_here)) == (256, 257, 258)
    assert bytes_here("a\u00e9").input_ids == [256, 97, 0xC3, 0xA9]
    shipped = load_tokenizer("bpe-4k")
    export.save_tokenizer(shipped, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "It was the best of times,\n\tit was 1859."
    assert theirs(text, add_special_tokens=False).input_ids == shipped.encode(text).tolist()
    assert theirs.eos_token_id == shipped.eos_id
    assert load_tokenizer(str(tmp_path)).document(text).tolist() == shipped.document(text).tolist()
    assert load_tokenizer(str(tmp_path)).fingerprint == shipped.fingerprint


def test_a_tokenizer_directory_is_copied(tmp_path):
    """Catches a chat template or generation settings that stay behind, and weights that come along."""
    source, to = tmp_path / "source", tmp_path / "to"
    export.save_tokenizer(load_tokenizer("bpe-4k"), make_directory(source))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "generation_config.json").write_text('{"temperature": 0.5}')
    (source / "model.safetensors").write_text("weights")
    export.save_tokenizer(load_tokenizer(str(source)), make_directory(to))
    names = sorted(path.name for path in source.iterdir() if path.name != "model.safetensors")
    assert sorted(path.name for path in to.iterdir()) == names and "chat_template.jinja" in names
    assert all((to / name).read_bytes() == (source / name).read_bytes() for name in names)
    assert AutoTokenizer.from_pretrained(to).chat_template == "{{ messages }}"


def make_directory(path):
    path.mkdir()
    return path


def test_what_transformers_has_not_is_refused():
    """Catches an export that loads and is another model."""
    with pytest.raises(ConfigError, match=r"qkv_bias=true with model\.qk_norm=true"):
        hf_export._family(ModelConfig(qkv_bias=True, qk_norm=True))
    scaled = ModelConfig(rope_scaling={k: v for k, v in LLAMA3.items() if k != "rope_theta"}, rope_theta=5e5)
    with pytest.raises(ConfigError, match="llama3 x8, then linear x2"):
        hf_export.merged_rope(scaled, RopeConfig(scaling="linear", factor=2.0))
    linear = ModelConfig(rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert hf_export.merged_rope(linear, RopeConfig(scaling="linear", factor=3.0))[1]["factor"] == 6.0
    with pytest.raises(ConfigError, match="llama3 x8, then ntk x2"):
        hf_export.merged_rope(scaled, RopeConfig(scaling="ntk", factor=2.0))
    for model in (ModelConfig(), linear):
        for stage in (
            RopeConfig(scaling="ntk", factor=4.0),
            RopeConfig(theta=5e5, scaling="ntk", factor=4.0),
            RopeConfig(scaling="llama3", factor=4.0, original_length=2048),
        ):
            if stage.scaling == "ntk" or model is not linear:
                theta, scaling = hf_export.merged_rope(model, stage)
                merged = Rope(replace(model, rope_theta=theta, rope_scaling=scaling))
                torch.testing.assert_close(merged.inv_freq, Rope(model, stage).inv_freq, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run=nowhere", "to=new"], "nowhere is neither a checkpoint nor"),
        (["run=nowhere", "to=new", "dtype=fp16"], "dtype=fp16: choose one of fp32, bf16"),
        (["run=nowhere", "to=."], "exists and is not an empty directory"),
        (["run=nowhere"], "to=... is missing"),
    ],
)
def test_mistakes_are_one_message(arguments, words, tmp_path, monkeypatch, capsys):
    """Catches a traceback, and an export that mixes with files that are there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as exit_:
        export.main(arguments)
    assert exit_.value.code == 2 and words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
