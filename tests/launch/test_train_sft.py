"""launch/train.py on conversations: killed and resumed, on one and two ranks, and against a plain computation."""

from __future__ import annotations

import json
import random
import signal
from functools import partial

import numpy as np
import pytest
import torch
from launch_runs import LINE, TINY, Act, assert_close_course, course
from transformers import AutoTokenizer

from data.loader import Loader
from data.packing import IGNORED
from data.sft import ChatEncoder, load_template
from data.sources import open_sources
from data.tokenizer import load_tokenizer
from launch import export
from launch.config import load
from train.model.decoder import Decoder
from train.model.sizes import embedding_rows
from train.schedule import build_schedule


@pytest.fixture(scope="module")
def arguments(house):
    """run name -> a small run on conversations, and in its second stage on books beside them."""
    rng = random.Random(1)
    words = ["who", "what", "where", "when", "a", "the", "river", "stone", "is", "was"]

    def said(longest):
        return " ".join(rng.choice(words) for _ in range(rng.randint(1, longest)))

    rows = []
    for _ in range(60):
        turns = [(role, said(30)) for _ in range(rng.randint(1, 4)) for role in ("user", "assistant")]
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    path = house.root / "talks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    books = next(text for text in house.data if text.startswith("data.path=")).removeprefix("data.path=")
    cache = next(text for text in house.data if text.startswith("data.cache_dir="))
    data = ["data=sft", f"data.sources.main.path={path}", f"+data.sources.books.path={books}", cache]
    data += ["data.chat_template=plain", f"data.validation={{path: {path}, format: chat}}"]
    mixes = ["schedule.stages.sparse.mix={main: 1}", "schedule.stages.full.mix={main: 2, books: 1}"]
    return lambda name: [*TINY, *data, *mixes, f"run.dir={house.runs / name}"]


@pytest.fixture(scope="module")
def sft_whole(launcher, arguments, house):
    """The run directory of the uninterrupted run on one rank."""
    ended = launcher.run(arguments("sft-whole"))
    assert ended.code == 0 and "of 60 conversations" in ended.out and "are left out" in ended.out, ended
    return house.runs / "sft-whole"


def first_loss(overrides):
    """(loss, supervised tokens) of the first step of a run: its packs one by one, in plain torch."""
    config = load(overrides)
    stage = build_schedule(config).stages[0]
    model = Decoder(config.model, embedding_rows(config.model, load_tokenizer("bytes").vocab_size))
    model.init_weights(config.run.seed)
    model.set_attention(stage.attention)
    loader = Loader(open_sources(config.data), seed=config.data.seed, interleave=config.data.interleave)
    loader.set_stage(seq_len=stage.seq_len, batch_tokens=stage.batch_tokens, micro_tokens=stage.seq_len, mix=stage.mix)
    total, supervised = 0.0, []
    for batch in loader.next_step():
        logits = model.logits(batch.tokens, batch.positions, batch.documents).double()
        chosen = batch.labels != IGNORED
        total -= torch.log_softmax(logits, 1)[chosen, batch.labels[chosen]].sum().item()
        supervised.append(int(chosen.sum()))
    assert len(set(supervised)) > 1, "or a mean of means would pass"
    return total / sum(supervised), sum(supervised)


def supervised_tokens(run_dir):
    """Those of each step."""
    return [record["supervised_tokens"] for record in course(run_dir) if record["kind"] == "train"]


def test_runs_on_conversations(launcher, arguments, house, sft_whole):
    """Catches a loss that is not the mean over the supervised tokens of the whole step, on one rank or two; masks or
    packs that change when a killed run goes on; cut conversations that nobody hears of; and an export whose tokenizer
    writes conversations in another way than they were supervised in."""
    # Saved at once, so that a checkpoint is there when the line behind it is written.
    run = partial(launcher.run, [*arguments("sft"), "checkpoint.asynchronous=false"])
    killed = run(act=Act(LINE, 6))
    assert killed.code == -signal.SIGKILL, killed
    ended = run()
    assert ended.code == 0 and "continuing from" in ended.out, ended
    assert course(house.runs / "sft") == course(sft_whole)

    lines = [record for record in course(sft_whole) if record["kind"] == "train"]
    loss, supervised = first_loss(arguments("sft-whole"))
    assert lines[0]["supervised_tokens"] == supervised and lines[0]["loss"] == pytest.approx(loss, rel=1e-5)
    assert all(0 < line["supervised_tokens"] < 512 for line in lines[:4])

    for rank in launcher.run_ranks(arguments("sft-two"), 2):
        assert rank.code == 0, rank
    assert_close_course(house.runs / "sft-two", sft_whole)
    assert supervised_tokens(house.runs / "sft-two") == supervised_tokens(sft_whole)
    assert len(set(supervised_tokens(sft_whole))) > 3

    export.main([f"run={sft_whole}", f"to={house.root / 'hf'}"])
    talk = [{"role": "user", "content": "who was"}, {"role": "assistant", "content": "the river"}]
    tokenizer = load_tokenizer("bytes")
    theirs = AutoTokenizer.from_pretrained(house.root / "hf").apply_chat_template(talk)["input_ids"]
    assert theirs == ChatEncoder(tokenizer, load_template("plain", tokenizer)).encode(talk)[0].tolist()


@pytest.mark.parametrize("by", ["heads", "blocks"])
def test_two_processes_share_the_conversations(launcher, arguments, house, sft_whole, by):
    """Catches a loss divided by the supervised tokens of a slice and not of the whole sequence, of which one slice may
    have none; labels that are not masked as their tokens are where a slice begins or ends; and losses by position
    that are counted elsewhere, or twice: of training, and of the evaluation."""
    name = f"sft-shared-{by}"
    shared = ["parallel.sequence=2", f"parallel.sequence_by={by}"]
    for rank in launcher.run_ranks([*arguments(name), *shared], 2):
        assert rank.code == 0, rank
    run_dir = house.runs / name
    assert_close_course(run_dir, sft_whole)
    assert supervised_tokens(run_dir) == supervised_tokens(sft_whole)
    curves = sorted(path.name for path in (sft_whole / "position_loss").glob("*.npz"))
    assert "train_0_sparse.npz" in curves and any(name.startswith("eval_") for name in curves)
    for curve in curves:
        with np.load(run_dir / "position_loss" / curve) as ours, np.load(sft_whole / "position_loss" / curve) as theirs:
            np.testing.assert_array_equal(ours["position_count"], theirs["position_count"], err_msg=curve)
            for key in ("position_mean", "mean", "se"):
                np.testing.assert_allclose(ours[key], theirs[key], rtol=2e-5, atol=2e-6, err_msg=f"{curve}: {key}")
