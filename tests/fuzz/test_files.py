"""Every file that is read, whatever it holds: accepted as what it should be, or one line that names it. No traceback,
no crash, nothing written over, nothing outside its directory opened.

Each kind has a short version for every commit and a long one (-m long).
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from damage import DEEP, assert_one_line, half_valid, in_equal_parts, quick, thorough
from safetensors.torch import save_file

from conf.build import ConfigError
from conf.schema import SourceConfig
from conf.validate import from_yaml, to_dict
from data.conversations import ConversationReader, from_json
from data.errors import DataError
from data.prepare import prepare
from data.sft import NAMED, ChatEncoder, load_template
from data.shards import TokenShards
from data.text import Documents
from data.tokenizer import EMBEDDED, load_tokenizer
from evals.position_loss import load_evaluation
from evals.run_files import ReportError, read_run
from launch.config import load
from train.checkpoint import checkpoint_dir, store
from train.checkpoint.store import CheckpointError
from train.hf import hf_metadata, pretrained
from train.record.metrics import MetricsLog, read_metrics

LONG = 1000
MISTAKES = (CheckpointError, DataError, ConfigError, ReportError, ValueError)
CONVERSATION = {
    "messages": [
        {"role": "user", "content": "a", "name": "x"},
        {"role": "assistant", "content": "b", "weight": 1, "reasoning_content": "c"},
    ],
    "tools": [{"name": "f"}],
}


@dataclass(frozen=True)
class Case:
    """A file, and what reads it. `json`: whether it is JSON. `names`: what an error names; "" is the file itself."""

    name: str
    read: Any
    json: bool = True
    names: str | None = ""


def read_checkpoint(folder: Path):
    path = checkpoint_dir.find(folder / "run")
    saved = store.read(path)
    from_yaml(saved.config_yaml, path / store.CONFIG)
    return saved


def read_rows(folder: Path):
    documents = Documents(SourceConfig(), key="data.sources.main.")
    return list(documents.of_files([folder / "rows.jsonl"]))


def read_talks(folder: Path):
    tokenizer = load_tokenizer("bytes")
    template = load_template("plain", tokenizer)
    config = SourceConfig(format="chat")
    documents = Documents(config, ConversationReader(config, template.source))
    chat = ChatEncoder(tokenizer, template)
    return [chat.encode(*from_json(text)) for _, text in documents.of_files([folder / "talks.jsonl"])]


def read_shards(folder: Path):
    shards = TokenShards(folder / "shards", check_tokens=True)
    return shards.ids, [shards.tokens(i, 0, int(n)).sum() for i, n in enumerate(shards.lengths)]


def read_template(folder: Path):
    tokenizer = load_tokenizer("bytes")
    template = load_template(str(folder / "chat.jinja"), tokenizer)
    return ChatEncoder(tokenizer, template).encode(CONVERSATION["messages"])


def prepare_again(folder: Path):
    copy = folder / "again"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder / "shards", copy)
    return prepare([("0", "some text"), ("1", "more")], load_tokenizer("bytes"), copy, origin={"x": 1}, title="text")


RUN = "run/checkpoints/tokens_000000000000007"
CASES = {
    f"{RUN}/manifest.json": Case("manifest", read_checkpoint, names="tokens_000000000000007"),
    f"{RUN}/state.json": Case("state", read_checkpoint),
    f"{RUN}/config.yaml": Case("config", read_checkpoint, json=False),
    f"{RUN}/position_loss.safetensors": Case("sums", read_checkpoint, json=False),
    "run/metrics.jsonl": Case("metrics", lambda folder: read_metrics(folder / "run" / "metrics.jsonl"), json=False),
    "report/metrics.jsonl": Case("report", lambda folder: read_run(folder / "report"), json=False),
    "eval/a.json": Case("evaluation", lambda folder: load_evaluation(folder / "eval" / "a.json")),
    "eval/a.npz": Case("arrays", lambda folder: load_evaluation(folder / "eval" / "a.json"), json=False),
    "shards/meta.json": Case("meta", read_shards),
    "shards/00000.json": Case("ids", read_shards, names="shards"),
    "shards/00000.idx": Case("index", read_shards, json=False),
    "shards/00000.bin": Case("tokens", read_shards, json=False),
    "shards/plan.json": Case("plan", prepare_again, names=None),
    "rows.jsonl": Case("rows", read_rows, json=False),
    "talks.jsonl": Case("conversations", read_talks, json=False),
    "chat.jinja": Case("template", read_template, json=False, names=None),
    "hf/config.json": Case("hf-config", lambda folder: pretrained.read_shape(folder / "hf"), names=None),
    "hf/model.safetensors.index.json": Case("hf-index", lambda folder: pretrained.weight_map(folder / "hf")),
    "hf/generation_config.json": Case(
        "generation",
        lambda folder: hf_metadata.generation_config(
            folder / "hf" / "generation_config.json", eos=[1], old_length=8, length=16
        ),
    ),
    "hf/tokenizer_config.json": Case(
        "tokenizer-config", lambda folder: load_tokenizer(str(folder / "hf" / "tokenizer.json"))
    ),
    "small/tokenizer.json": Case("tokenizer", lambda folder: load_tokenizer(str(folder / "small" / "tokenizer.json"))),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One good file of each kind."""
    folder = tmp_path_factory.mktemp("files")
    make_run(folder / "run")
    make_evaluation(folder / "eval")
    log_lines(folder / "report")
    (folder / "rows.jsonl").write_text("".join(json.dumps({"id": i, "text": f"text {i}"}) + "\n" for i in range(3)))
    (folder / "talks.jsonl").write_text(json.dumps(CONVERSATION) + "\n")
    (folder / "chat.jinja").write_text(NAMED["plain"])
    prepare(
        [("0", "some text"), ("1", "more")], load_tokenizer("bytes"), folder / "shards", origin={"x": 1}, title="text"
    )
    make_model(folder / "hf")
    make_tokenizer(folder / "small")
    return folder


def make_run(run_dir: Path) -> None:
    temporary = checkpoint_dir.begin(run_dir, 7)
    state = {"tokens": 7, "state": {"step": 1}, "stage_end": False, "optimizer_step": 1, "precision": "fp32"}
    (temporary / "state.json").write_text(json.dumps(state | {"parameters": {"w": [2, 2]}}))
    (temporary / "config.yaml").write_text(yaml.safe_dump(to_dict(load(["+exp=quickstart"])), sort_keys=False))
    save_file({"stage": torch.zeros(3)}, temporary / "position_loss.safetensors")
    checkpoint_dir.commit(temporary, {path.name: checkpoint_dir.seal(path) for path in temporary.iterdir()})
    log_lines(run_dir)


def log_lines(run_dir: Path) -> None:
    run_dir.mkdir(exist_ok=True)
    log = MetricsLog(run_dir / "metrics.jsonl")
    log.write("run", 0, device="cpu", num_devices=1, convention="x")
    log.write("stage", 0, stage="a", stage_index=0, seq_len=8, attention="full", end=64, batch_tokens=8)
    for tokens in (8, 16):
        log.write("train", tokens, stage="a", loss=2.0, lr=1e-3, grad_norm=None)
    log.write("eval", 16, stage="a", loss=2.0, trailing_loss=None, documents=3)


def make_evaluation(folder: Path) -> None:
    folder.mkdir()
    ones, length = np.ones(2), 4
    arrays = dict.fromkeys(("mean", "se", "count", "clusters"), ones)
    arrays |= {"max_length": np.array(length), "edges": np.arange(3) * 2, "trailing": np.ones(4)}
    arrays |= {"position_mean": np.ones(length), "position_count": np.ones(length)}
    arrays |= {"document_ids": np.array(["a", "b"]), "document_keys": np.array(["c", "d"])}
    np.savez(folder / "a.npz", document_loss=np.ones((2, 2)), document_clusters=np.array(["a", "b"]), **arrays)
    (folder / "a.json").write_text(json.dumps({"num_non_finite": 0, "cohort": "fixed: x", "tokens": 7}))


def make_model(folder: Path) -> None:
    from transformers import LlamaConfig

    folder.mkdir()
    LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    ).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"max_length": 8, "eos_token_id": [1, 2]}))
    save_file({"w": torch.zeros(2)}, folder / "model-00001.safetensors")
    index = {"metadata": {"total_size": 8}, "weight_map": {"w": "model-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copyfile(EMBEDDED / "bpe-4k.json", folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|endoftext|>"}}))


def make_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models

    folder.mkdir()
    backend = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    backend.add_special_tokens(["<|endoftext|>"])
    backend.save(str(folder / "tokenizer.json"))


def fuzz(folder: Path, path: str, how) -> None:
    """Reads the file again and again with other content; at the end it is as it was."""
    case, file = CASES[path], folder / path
    valid = file.read_bytes()
    seen = {"valid": 0, "refused": 0, "all": 0}

    def check(given_content):
        content, is_valid = given_content
        seen["all"] += 1
        file.write_bytes(content)
        try:
            case.read(folder)
            seen["valid"] += is_valid
        except MISTAKES as error:
            assert not is_valid, error
            seen["refused"] += 1
            lines = error.problems if isinstance(error, ConfigError) else [error]
            for line in lines:
                assert_one_line(line, *([] if case.names is None else [case.names or Path(path).name]))
        assert file.read_bytes() == content, "nothing is written over"

    try:
        in_equal_parts(how, half_valid(valid, json.loads(valid) if case.json else None), check)
    finally:
        file.write_bytes(valid)
    print(case.name, seen)
    assert seen["valid"] >= seen["all"] / 3 and seen["refused"] > 0, seen


@pytest.mark.parametrize("path", CASES, ids=[case.name for case in CASES.values()])
def test_whatever_a_file_holds(folder, path):
    """Catches tracebacks, and messages without the file's name, for bytes and shapes that no one foresaw."""
    fuzz(folder, path, quick(20))


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("path", CASES, ids=[case.name for case in CASES.values()])
def test_whatever_a_file_holds_at_length(folder, path):
    """The same for many more examples, other ones each time."""
    fuzz(folder, path, thorough(LONG))


@pytest.mark.parametrize("path", [path for path in CASES if not path.endswith(".jinja")])
def test_depth_is_an_error_of_one_line(folder, path):
    """Catches a RecursionError or a crash of a parser on 50,000 brackets."""
    file = folder / path
    valid = file.read_bytes()
    file.write_bytes(b'{"a": ' + DEEP.encode() + b"\n")
    try:
        with pytest.raises(MISTAKES) as error:
            CASES[path].read(folder)
        for line in error.value.problems if isinstance(error.value, ConfigError) else [error.value]:
            assert_one_line(line)
    finally:
        file.write_bytes(valid)
