"""benchmarks/gate_study.py: what its probes ask, which settings come first, and a whole study of a tiny model."""

import json
import random
import shutil
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import gate_study
from benchmarks.gate_study import Setting, settings
from benchmarks.gate_tables import GATES, loss_summary, retrieval_summary
from conf.schema import ModelConfig
from data.tokenizer import EMBEDDED, ByteTokenizer
from evals.probes import ASKED, PAIRS, TASKS, make_probe, score
from moba.documents import Documents
from train.model.decoder import Decoder


def test_settings_go_by_importance_and_leave_a_choice():
    """Catches an order in which one list is exhausted before another begins, and gates that have nothing to pick."""
    found = settings([8192, 4096], [128, 512], [Fraction(1, 8), Fraction(1, 16)])
    assert found[0] == Setting(8192, 128, Fraction(1, 8)) and found[0].top_k == 8
    assert found[-1] == Setting(8192, 512, Fraction(1, 16)) or found[-1].top_k >= 3
    ranks = [
        [8192, 4096].index(s.length) + [128, 512].index(s.block_size) + (s.budget == Fraction(1, 16)) for s in found
    ]
    assert ranks == sorted(ranks) and all(s.top_k >= 3 for s in found)
    assert Setting(4096, 512, Fraction(1, 8)) not in found


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("place", ASKED)
def test_a_probe_says_the_answer_once_and_asks_for_it(task, place):
    """Catches a probe of another length, an answer that is not in the text, is there twice or elsewhere than it says,
    and filler that is lost."""
    text = "".join(random.Random(0).choices("abcdefgh ", k=2000))
    tokenizer = ByteTokenizer()
    probe = make_probe("book", tokenizer.encode(text).astype(int).tolist(), tokenizer, task, place, 1024)
    assert len(probe.tokens_T) == 1024 and probe.depth == (place + 0.5) / PAIRS
    whole, answer = tokenizer.decode(probe.tokens_T.tolist() + probe.answer[-1:]), tokenizer.decode(probe.answer)
    sentences = [line for line in whole.split("\n") if line.endswith("Remember it.")]
    assert len(sentences) == (1 if task == "pass_key" else PAIRS)
    asked = whole.rsplit("\n", 1)[1].removesuffix(answer)
    said = f"{asked}{answer}. Remember it."
    assert sentences.count(said) == 1 and sum(line.startswith(asked) for line in sentences) == 1
    assert whole.index(said) / 1024 == pytest.approx(probe.depth, abs=0.15)
    filler = whole.rsplit("\n", 1)[0]
    for line in sentences:
        filler = filler.replace(f"\n{line}\n", "")
    assert text.startswith(filler) and len(filler) > 500
    assert torch.equal(
        probe.tokens_T,
        make_probe("book", tokenizer.encode(text).astype(int).tolist(), tokenizer, task, place, 1024).tokens_T,
    )


@torch.no_grad()
def test_scores_are_of_the_answer():
    """Catches logits of the wrong positions: against the model's logits of all tokens."""
    sizes = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "ffn_size": 48, "init_std": 0.4}
    model = Decoder(ModelConfig(**sizes), 258).eval()
    model.init_weights(1)
    probe = make_probe("book", [7] * 600, ByteTokenizer(), "pass_key", 3, 512)
    other = make_probe("other", [9] * 600, ByteTokenizer(), "key_value", 5, 500)
    (_, nats), second = score(model, [probe, other], torch.device("cpu"))
    assert second == pytest.approx(score(model, [other], torch.device("cpu"))[0])
    logits = model.logits(probe.tokens_T, torch.arange(512), Documents.from_lengths([512])).log_softmax(-1)
    targets = torch.cat([probe.tokens_T[1:], torch.tensor(probe.answer[-1:])])
    expected = -logits[-len(probe.answer) :].gather(1, targets[-len(probe.answer) :, None]).mean()
    assert targets[-len(probe.answer) :].tolist() == probe.answer
    assert nats == pytest.approx(expected.item(), rel=1e-5)


def test_differences_are_paired():
    """Catches errors of the losses themselves where those of the differences are meant: documents differ by nats, the
    gate costs each of them the same."""
    full = {"values": np.array([1.0, 3.0, 5.0]), "clusters": list("abc"), "ids": list("abc")}
    found = loss_summary(full | {"values": full["values"] + 0.25}, full)
    assert found["minus_full"] == pytest.approx({"mean": 0.25, "interval_95": 0.0})
    # Three clusters: 2 degrees of freedom, 4.303 standard errors of 2 / sqrt(3).
    assert found["trailing"]["interval_95"] == pytest.approx(4.303 * 2 / 3**0.5, rel=1e-3)
    tasks = [task for task in TASKS for _ in range(4)]
    answers = {"tasks": tasks, "depths": [0.2, 0.4] * 4, "clusters": list("aabb") * 2}
    full = answers | {"right": np.array([True] * 8), "nats": np.arange(8.0)}
    one = retrieval_summary(answers | {"right": np.array([True, False] * 4), "nats": np.arange(8.0) + 2}, full)
    task = one["tasks"]["key_value"]
    assert task["right"] == 0.5 and task["right_by_depth"] == {"0.200": 1.0, "0.400": 0.0}
    assert task["right_minus_full"] == {"mean": -0.5, "interval_95": 0.0} and task["nats_minus_full"]["mean"] == 2


def test_a_whole_study(tmp_path, monkeypatch, capsys):
    """Catches a study that cannot be run, gates that all measure the same, a sum of what is not there, and a time limit
    that is not kept or loses what was measured."""
    model = tmp_path / "model"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=4096, initializer_range=0.4, **sizes)).save_pretrained(model)
    shutil.copy(EMBEDDED / "bpe-4k.json", model / "tokenizer.json")
    (model / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    words = random.Random(0)
    lines = [{"id": f"d{i}", "text": " ".join(words.choices(["sea", "ship", "who", "went"], k=900))} for i in range(3)]
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    monkeypatch.setenv("HOME", str(tmp_path))
    arguments = [
        f"model={model}",
        f"data={tmp_path / 'held_out.jsonl'}",
        "lengths=512",
        "block_sizes=16",
        "budgets=1/8",
    ]

    def study(name, *more):
        to = tmp_path / name
        monkeypatch.setattr(sys, "argv", ["gate_study.py", *arguments, *more, "documents=2", "device=cpu", f"to={to}"])
        gate_study.main()
        return to, json.loads((to / "results.json").read_text())

    to, results = study("whole", "commit=abc")
    assert results["finished"] and [(r["part"], r["gate"]) for r in results["records"]] == [
        (part, gate) for part in ("loss", "retrieval") for gate in ("full", *GATES)
    ]
    losses = {r["gate"]: r["trailing"]["mean"] for r in results["records"] if r["part"] == "loss"}
    assert len(set(losses.values())) == len(losses), losses
    text = (to / "table.md").read_text()
    assert all(f"| {gate} |" in text for gate in losses) and "commit abc" in text and "16x4" in text
    assert (to / "figure.png").stat().st_size > 10_000

    _, cut = study("cut", "seconds=0")
    assert not cut["finished"] and cut["records"] == []
    with pytest.raises(SystemExit):
        study("wrong", "gates=best")
    assert "gates=best" in capsys.readouterr().err
