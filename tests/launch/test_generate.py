"""launch/generate.py against the library it calls, and what it says to a user."""

import io
from dataclasses import replace

import pytest
import torch

from conf.validate import freeze
from data.tokenizer import load_tokenizer
from evals.loading import TrainedModel, attention_plan
from launch.export import save_tokenizer
from launch.generate import main
from train.model.decoder import Decoder
from train.model.generation import Sampling, generate
from train.schedule import build_schedule

PROMPT = "a bad cab, a dead deed; " * 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model of random weights as `load_trained` gives it: one MoBA stage, a byte tokenizer."""
    folder = tmp_path_factory.mktemp("run")
    source = {"path": str(folder / "text.jsonl")}
    config = freeze(
        {
            "run": {"dir": str(folder), "device": "cpu"},
            "model": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "ffn_size": 48, "init_std": 0.3},
            "data": {"sources": {"main": source}, "validation": source, "tokenizer": "bytes"},
            "schedule": {
                "tokens": 2048,
                "seq_len": 128,
                "batch_tokens": 1024,
                "stages": {"sparse": {"tokens": 2048, "attention": {"block_size": 8, "top_k": 2, "full_last": 1}}},
            },
        }
    )
    model = Decoder(config.model, 384).eval()
    model.init_weights(5)
    stage = build_schedule(config).lookup(0)
    model.set_attention(stage.attention)
    return TrainedModel(model, config, stage, 1024, folder, torch.device("cpu"))


@pytest.fixture
def run(trained, monkeypatch):
    """The command with these arguments, on that model (evals/loading.py has tests of its own)."""

    def load(source, device):
        assert (source, device) == ("runs/x", "cpu")
        return trained

    monkeypatch.setattr("launch.generate.load_trained", load)
    return lambda *arguments: main(["run=runs/x", "device=cpu", *arguments])


def test_prints_what_the_library_generates(run, trained, capsys):
    """Catches options, attention or a tokenizer that do not reach the model, and a BOS that is forgotten."""
    options = ["temperature=0.9", "top_k=40", "top_p=0.9", "seed=3", "max_new_tokens=30"]
    run(f"prompt={PROMPT}", *options, "attn_prefill=full", "attn_decode=stage")
    printed = capsys.readouterr()
    tokenizer = load_tokenizer("bytes")
    ids = [tokenizer.bos_id, *tokenizer.encode(PROMPT).tolist()]

    def text(prefill, decode, **sampling):
        new = generate(
            trained.model,
            ids,
            max_new_tokens=30,
            sampling=Sampling(**sampling),
            vocab_size=tokenizer.vocab_size,
            stop={tokenizer.eos_id},
            prefill=attention_plan(prefill, trained),
            decode=attention_plan(decode, trained),
        )
        return tokenizer.decode(list(new))

    sampling = {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "seed": 3}
    assert printed.out == text("full", "stage", **sampling) + "\n" and len(printed.out) > 5
    assert printed.err == ""
    run(f"prompt={PROMPT}", *options)
    assert capsys.readouterr().out == text("stage", "full", **sampling) + "\n"
    run(f"prompt={PROMPT}", "temperature=0", "max_new_tokens=30")
    greedy = capsys.readouterr().out
    assert greedy == text("stage", "full", temperature=0) + "\n" != printed.out


def test_answers_a_message_as_the_run_was_trained(trained, monkeypatch, capsys):
    """Catches a question put to a chat model as plain text, and an answer that runs past the end of its turn."""
    chat_model = replace(
        trained, config=replace(trained.config, data=replace(trained.config.data, chat_template="plain"))
    )
    monkeypatch.setattr("launch.generate.load_trained", lambda source, device: chat_model)
    seen = []

    def spoken(model, ids, *, stop, **options):
        seen.append((list(ids), stop))
        yield from b"ok"

    monkeypatch.setattr("launch.generate.generate", spoken)
    main(["run=runs/x", "chat=true", "prompt=Why?"])
    assert capsys.readouterr().out == "ok\n"
    assert seen == [([256, *b"User: Why?\nAssistant:"], {257})]


def test_continues_with_a_hugging_face_model(tmp_path, capsys):
    """Catches a directory that is not loaded, its tokenizer or EOS ignored, or attention by another name: transformers
    writes the same with its own attention and with moba.transformers'."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    import moba.transformers

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(vocab_size=258, initializer_range=0.3, **sizes)).save_pretrained(tmp_path)
    save_tokenizer(load_tokenizer("bytes"), tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    inputs = tokenizer(PROMPT, return_tensors="pt")

    def expected():
        ids = theirs.generate(**inputs, max_new_tokens=20, do_sample=False, eos_token_id=257, pad_token_id=257)
        return tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)

    def found(*arguments):
        main([f"run={tmp_path}", f"prompt={PROMPT}", "device=cpu", "temperature=0", "max_new_tokens=20", *arguments])
        return capsys.readouterr().out.removesuffix("\n")

    dense = expected()
    assert found() == found("attn=full") == dense
    moba.transformers.configure(theirs, block_size=4, top_k=2)
    sparse = expected()
    assert found("attn_prefill=4x2") == sparse != dense
    moba.transformers.configure(theirs, block_size=4, top_k=2, decode="moba")
    assert found("attn=4x2") == expected() != sparse


def test_prompts_from_a_file_and_from_the_standard_input(run, tmp_path, capsys, monkeypatch):
    """Catches prompts that are stripped, joined or skipped."""
    options = ["max_new_tokens=8", "seed=1"]
    expected = []
    for prompt in (PROMPT, "bead"):
        run(f"prompt={prompt}", *options)
        expected.append(capsys.readouterr().out)
    assert expected[0] != expected[1]
    (tmp_path / "prompt.txt").write_text(PROMPT, encoding="utf-8")
    run(f"prompt_file={tmp_path / 'prompt.txt'}", *options)
    assert capsys.readouterr().out == expected[0]
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{PROMPT}\n\nbead"))
    run(*options)
    assert capsys.readouterr().out == "".join(expected)


def test_says_when_the_text_outgrows_the_model(run, capsys):
    """Catches silence about positions that the model never saw."""
    run(f"prompt={PROMPT * 2}", "max_new_tokens=2")
    assert "147 tokens for a model trained on 128" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["prompt=a", "prompt_file=b"], "prompt and prompt_file"),
        (["prompt=a", "temperature=hot"], "temperature=hot: must be a number"),
        (["prompt=a", "top_k=1.5"], "top_k=1.5: must be a whole number"),
        (["prompt=a", "top_p=2"], "top_p=2"),
        (["prompt=a", "max_new_tokens=0"], "max_new_tokens=0"),
        (["prompt=a", "attn_decode=sparse"], "sparse"),
        (["prompt_file=nowhere.txt"], "nowhere.txt"),
        (["prompt=a", "attn=nowhere.yaml"], "nowhere.yaml: No such file"),
        (["promt=a"], "did you mean|do you mean"),
    ],
)
def test_mistakes_are_named(run, capsys, arguments, message):
    """Catches a traceback, or a mistake that changes something silently."""
    with pytest.raises(SystemExit) as exit_info:
        run(*arguments)
    error = capsys.readouterr().err
    assert exit_info.value.code == 2 and error.startswith("error: ")
    assert any(part in error for part in message.split("|"))


def test_a_run_without_checkpoint_is_named(tmp_path, capsys):
    """Catches a traceback from loading."""
    with pytest.raises(SystemExit) as exit_info:
        main([f"run={tmp_path}", "prompt=a"])
    assert exit_info.value.code == 2 and str(tmp_path) in capsys.readouterr().err
