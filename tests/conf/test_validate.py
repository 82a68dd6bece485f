"""Freezing a configuration: gaps filled, quantities exact, every mistake named with key, value and a way out."""

import subprocess
import sys

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import data.synthetic
from conf import checks
from conf.hardware import Hardware
from conf.schema import RunConfig
from conf.validate import ConfigError, freeze, to_dict, trajectory_diff
from moba.kinds import Full
from train.schedule import build_schedule

STAGES = "schedule.stages"
CPU = Hardware(num_gpus=0)
GPU = Hardware(num_gpus=1)


def valid() -> dict:
    """A small valid configuration, as composed."""
    return {
        "model": {"hidden_size": 64, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2},
        "data": {"sources": {"books": {"path": "books.txt"}}},
        "schedule": {
            "tokens": "100K",
            "seq_len": "1K",
            "batch_tokens": "4K",
            "stages": {"sparse": {"tokens": "90%", "attention": {"block_size": 64}}, "full": {"tokens": "10%"}},
        },
    }


def changed(*assignments: tuple[str, object]) -> dict:
    """`valid` with dotted keys set."""
    config = valid()
    for key, value in assignments:
        node, *path = config, *key.split(".")
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
    return config


def problems_of(config: dict, hardware: Hardware | None = None) -> list[str]:
    """The problems that freezing reports; there must be some."""
    with pytest.raises(ConfigError) as error:
        freeze(config, hardware)
    return error.value.problems


def test_fills_every_gap():
    """Catches a null that reaches the trainer, a budget that isn't whole steps, a share of the wrong total."""
    config = freeze(valid())
    sparse, full = config.schedule.stages.values()
    assert list(config.schedule.stages) == ["sparse", "full"]
    assert sparse.tokens == 22 * 4096 and full.tokens == 3 * 4096
    assert config.schedule.tokens == 25 * 4096
    assert (sparse.seq_len, sparse.batch_tokens, sparse.attention.options["block_size"]) == (1024, 4096, 64)
    assert (full.attention.options["block_size"], full.attention.options["top_k"]) == (512, 3)
    assert config.optim.lr.warmup_tokens == 1024 and config.optim.lr.options == {"decay_tokens": 10240}
    assert config.eval.every_tokens == 20480 and config.checkpoint.every_tokens == 10240
    assert (config.model.head_dim, config.model.num_kv_heads) == (16, 2)
    assert (config.run.name, config.run.dir, config.data.seed) == ("run", "runs/run", 0)
    assert config.logging.every_tokens == 0 and config.model.loss_tile == 2048


def test_budget_without_a_total():
    """Catches absolute stages that need schedule.tokens repeated."""
    config = freeze(
        changed(("schedule.tokens", None), (f"{STAGES}.sparse.tokens", "9M"), (f"{STAGES}.full.tokens", "1M"))
    )
    assert config.schedule.tokens == sum(stage.tokens for stage in config.schedule.stages.values())
    assert config.schedule.stages["sparse"].tokens == -(-9_000_000 // 4096) * 4096


def test_num_blocks_is_a_block_size():
    """Catches num_blocks that only holds at the schedule's own length."""
    config = freeze(
        changed(
            (f"{STAGES}.sparse.attention", {"num_blocks": 64}),
            (f"{STAGES}.full.seq_len", "2K"),
            (f"{STAGES}.full.attention", {"num_blocks": 64}),
        )
    )
    assert [stage.attention.options["block_size"] for stage in config.schedule.stages.values()] == [16, 32]


def test_shorthands_and_streams():
    """Catches data.path that is ignored, and a stream without an end."""
    assert freeze({**valid(), "data": {"path": "x/*.txt"}}).data.sources["main"].path == "x/*.txt"
    config = freeze({**valid(), "data": {"name": "owner/set", "sources": {"main": {"streaming": True}}}})
    assert config.data.sources["main"].name == "owner/set" and config.data.name is None
    assert config.data.sources["main"].max_tokens == config.schedule.tokens
    (problem,) = problems_of(changed(("data.path", "x.txt")))
    assert "data.path=x.txt" in problem and "books" in problem and "data=files data.path=x.txt" in problem


CASES = [
    # (what is set, words that one problem must contain: key, value, what would work)
    ([("model.num_kv_heads", 3)], ["model.num_kv_heads=3", "model.num_heads=4", "1, 2, 4"]),
    ([("model.hidden_size", 66)], ["model.hidden_size=66", "64 or 68", "model.head_dim"]),
    ([("model.head_dim", 15)], ["model.head_dim=15", "even", "16"]),
    ([("model.num_layers", 0)], ["model.num_layers=0", "at least 1"]),
    ([("model.num_heads", "four")], ["model.num_heads=four", "whole number"]),
    ([("model.tie_embeddings", "maybe")], ["model.tie_embeddings=maybe", "true or false"]),
    ([("model.hiden_size", 64)], ["model.hiden_size=64", "unknown key", "hidden_size"]),
    ([("modle", {})], ["modle={}", "did you mean model"]),
    ([("model", 3)], ["model=3", "keys below it", "hidden_size"]),
    ([("model.rope_scaling", {"type": "spiral"})], ["rope_scaling.rope_type=spiral", "llama3"]),
    ([("data.sources", {})], ["data.sources={}", "data=embedded"]),
    ([("data.sources.books.path", None)], ["data.sources.books.path=null", "data.sources.books.name"]),
    ([("data.sources.books.name", "a/b")], ["data.sources.books.path=books.txt", "name=a/b", "null"]),
    ([("data.sources.books.streaming", True)], ["data.sources.books.streaming=true", "hub"]),
    ([("data.sources.books.weight", 0)], ["data.sources=[books]", "above 0"]),
    ([("data.sources.books.max_tokens", "many")], ["data.sources.books.max_tokens=many", "27B"]),
    ([("schedule.stages", {})], ["schedule.stages={}", "+exp=quickstart", "schedule=moba_then_full"]),
    ([("schedule.seq_len", "1Q")], ["schedule.seq_len=1Q", "'Q'", "K, M"]),
    ([("schedule.batch_tokens", "2500")], ["schedule.batch_tokens=2,500", "seq_len=1K", "2K or 3K"]),
    ([("schedule.batch_tokens", 512)], ["schedule.batch_tokens=512", "seq_len=1K", "use 1K"]),
    ([("schedule.micro_tokens", "1.5K")], ["schedule.micro_tokens=1,536", "seq_len=1K", "null", "2K"]),
    ([("schedule.micro_tokens", "3K")], ["schedule.micro_tokens=3K", "batch_tokens=4K", "6K"]),
    ([(f"{STAGES}.full.tokens", "11%")], ["schedule.tokens=100K", "sparse 90% + full 11%", "100%"]),
    ([(f"{STAGES}.full.tokens", "20M")], ["schedule.tokens=100K", "full 20M", "schedule.tokens=200M"]),
    ([("schedule.tokens", None)], [f"{STAGES}.sparse.tokens=90%", "share of what", "schedule.tokens"]),
    ([(f"{STAGES}.full.tokens", 0)], [f"{STAGES}.full.tokens=0", f"~{STAGES}.full"]),
    ([(f"{STAGES}.full.tokens", "110%")], [f"{STAGES}.full.tokens=110%", "between 0% and 100%"]),
    ([(f"{STAGES}.full.tokns", 0)], [f"{STAGES}.full.tokns=0", "did you mean tokens"]),
    ([(f"{STAGES}.sparse.attention.kind", "sparse")], ["attention.kind=sparse", "moba, full"]),
    ([(f"{STAGES}.sparse.attention.top_k", 0)], ["attention.top_k=0", "at least 1"]),
    ([(f"{STAGES}.sparse.attention.block_size", 0)], ["attention.block_size=0", "at least 1"]),
    ([(f"{STAGES}.full.attention", {"num_blocks": 3})], ["attention.num_blocks=3", "seq_len=1K", "1, 2, 4, 8"]),
    ([(f"{STAGES}.sparse.attention.num_blocks", 4)], ["attention.num_blocks=4", "block_size=64", "block_size=null"]),
    ([(f"{STAGES}.sparse.attention.full_last", 5)], ["attention.full_last=5", "model.num_layers=4"]),
    ([(f"{STAGES}.sparse.attention.pattern", "MXF")], ["attention.pattern=MXF", "MMMF"]),
    ([(f"{STAGES}.sparse.attention.pattern", "MMMMF")], ["pattern=MMMMF", "5 letters", "num_layers=4"]),
    (
        [(f"{STAGES}.sparse.attention.pattern", "MF"), (f"{STAGES}.sparse.attention.full_last", 1)],
        ["attention.pattern=MF", "full_last=1", "set one"],
    ),
    (
        [(f"{STAGES}.full.attention", {"kind": "full", "pattern": "SM", "window": 8})],
        ["pattern=SM", "write F instead of M"],
    ),
    ([(f"{STAGES}.sparse.attention.pattern", "SM")], ["sparse.attention.window=null", "schedule.window", "256"]),
    ([(f"{STAGES}.sparse.attention.window", 64)], ["sparse.attention.window=64", "no effect", "SM"]),
    ([(f"{STAGES}.sparse.attention", {"pattern": "SM", "window": 0})], ["attention.window=0", "at least 1"]),
    ([("schedule.window", 64)], ["schedule.window=64", "no effect", "SM"]),
    ([("model.rope_pattern", "RX")], ["model.rope_pattern=RX", "RN"]),
    ([("model.rope_pattern", "RRRRN")], ["model.rope_pattern=RRRRN", "5 letters", "num_layers=4"]),
    ([("model.key_conv", 4)], ["model.key_conv=4", "3 or 5"]),
    ([("model.key_conv_pattern", "-K")], ["model.key_conv_pattern=-K", "no effect", "model.key_conv=3"]),
    ([("model", {"key_conv": 3, "key_conv_pattern": "C"})], ["model.key_conv_pattern=C", "-K"]),
    ([(f"{STAGES}.full.attention", {"kind": "full", "full_last": 2})], ["full_last=2", "kind=moba"]),
    ([(f"{STAGES}.full.attention", {"kind": "full", "backend": "triton"})], ["backend=triton", "auto"]),
    ([(f"{STAGES}.sparse.attention.backend", "cudnn")], ["backend=cudnn", "full attention", "triton"]),
    ([("data.sources.books.synthetic", {"task": "mqar"})], ["books.path=books.txt", "synthetic"]),
    ([("data.sources.x", {"synthetic": {"task": "recall"}})], ["task=recall", "mqar", "straddle"]),
    ([("data.sources.x", {"synthetic": {"pairs": 4, "min_pairs": 8}})], ["min_pairs=8", "pairs=4"]),
    ([(f"{STAGES}.full.attention", {"kind": "full", "gate": "random"})], ["gate=random", "kind=moba"]),
    ([(f"{STAGES}.sparse.attention", {"gate": "local", "backend": "reference"})], ["=reference", "gate", "triton"]),
    ([(f"{STAGES}.sparse.attention.gate", "best")], ["gate=best", "oracle"]),
    ([(f"{STAGES}.full.attention", {"kind": "full", "first_blocks": 1})], ["first_blocks=1", "kind=moba"]),
    ([(f"{STAGES}.sparse.attention", {"top_k": 1, "first_blocks": 1})], ["first_blocks=1", "top_k=1"]),
    ([(f"{STAGES}.sparse.attention.first_blocks", -1)], ["first_blocks=-1", "at least 0"]),
    ([(f"{STAGES}.full.attention.backend", "cuda")], ["attention.backend=cuda", "flash, triton, cudnn"]),
    ([(f"{STAGES}.full.rope", {"scaling": "dynamic"})], ["rope.scaling=dynamic", "linear, ntk, yarn, llama3"]),
    ([(f"{STAGES}.full.rope", {"scaling": "ntk"})], ["rope.factor=1.0", "changes nothing"]),
    ([(f"{STAGES}.full.rope", {"scaling": "llama3", "factor": 4})], ["rope.original_length=null", "such as 8K"]),
    ([(f"{STAGES}.full.rope", {"scaling": "linear", "factor": 0.5})], ["rope.factor=0.5", "at least 1"]),
    ([(f"{STAGES}.full.rope", {"factor": 4})], ["rope.factor=4", "no effect", "scaling=linear"]),
    ([(f"{STAGES}.full.rope", {"scaling": "linear", "original_length": "8K"})], ["original_length=8192", "yarn"]),
    ([(f"{STAGES}.full.rope", {"theta": 0})], ["rope.theta=0", "above 0"]),
    ([(f"{STAGES}.full.mix", {"code": 1})], [f"{STAGES}.full.mix.code=1", "books"]),
    ([(f"{STAGES}.full.mix", {"books": 0})], [f"{STAGES}.full.mix={{books: 0.0}}", "null"]),
    ([(f"{STAGES}.full.long_documents", {"share": 50})], ["long_documents.share=50", "from 0 to 1"]),
    ([(f"{STAGES}.full.long_documents", {"length": 0})], ["long_documents.length=0", "at least 1"]),
    ([("optim.lr", {"peak": 0})], ["optim.lr.peak=0", "above 0"]),
    ([("optim.lr", {"peak": "fast"})], ["optim.lr.peak=fast", "a number"]),
    ([("optim.lr", {"min_ratio": 2})], ["optim.lr.min_ratio=2", "from 0 to 1"]),
    ([("optim.lr", {"kind": "cos"})], ["optim.lr.kind=cos", "cosine"]),
    ([("optim.lr", {"warmup_tokens": "1M"})], ["optim.lr.warmup_tokens=1M", "102.4K", "1%"]),
    (
        [("optim.lr", {"kind": "wsd", "warmup_tokens": "50%", "decay_tokens": "60%"})],
        ["optim.lr.decay_tokens=61.44K", "51.2K at most"],
    ),
    ([(f"{STAGES}.full.lr", {"warmup_tokens": "20M"})], [f"{STAGES}.full.lr.warmup_tokens=20M", "12,288"]),
    ([("optim.betas", [0.9, 1.0])], ["optim.betas=[0.9, 1.0]", "[0.9, 0.95]"]),
    ([("optim.betas", "high")], ["optim.betas=high", "a list"]),
    ([("deepspeed.zero_stage", 4)], ["deepspeed.zero_stage=4", "0, 1, 2 or 3"]),
    ([("deepspeed", {"zero_stage": 0, "precision": "bf16"})], ["deepspeed.precision=bf16", "zero1", "fp32"]),
    ([("deepspeed", {"zero_stage": 0, "offload_optimizer": True})], ["offload_optimizer=true", "zero1_offload"]),
    ([("deepspeed", {"zero_stage": 2, "offload_params": True})], ["offload_params=true", "zero3_offload"]),
    ([("deepspeed.precision", "fp16")], ["deepspeed.precision=fp16", "bf16, fp32"]),
    ([("model.activation_checkpointing", "all")], ["model.activation_checkpointing=all", "auto, false, mlp, true"]),
    ([("model.compile", "always")], ["model.compile=always", "auto, false, true"]),
    ([("deepspeed.extra", {"optimizer": {"type": "Adam"}})], ["deepspeed.extra.optimizer={type: Adam}", "optim.*"]),
    ([("deepspeed.extra", {"fp16": {}, "steps_per_print": 1})], ["deepspeed.extra.fp16={}", "deepspeed.precision"]),
    ([("deepspeed.extra", {"sequence_parallel_size": 2})], ["sequence_parallel_size=2", "set by parallel.sequence"]),
    ([("deepspeed.extra", {"tensor_parallel": {}})], ["tensor_parallel={}: tensor parallelism is not supported"]),
    ([(f"{STAGES}.full.parallel", {"sequence": 2})], [f"{STAGES}.full.parallel={{sequence: 2}}", "unknown key"]),
    ([("run.device", "gpu")], ["run.device=gpu", "cuda, cpu"]),
    ([("logging.wandb", "yes")], ["logging.wandb=yes", "offline"]),
    ([("logging.samples", 2), ("deepspeed.zero_stage", 3)], ["logging.samples=2", "zero_stage 0 to 2"]),
    ([("checkpoint.keep", 0)], ["checkpoint.keep=0", "at least 1"]),
    ([("run.on_spike", "retry")], ["run.on_spike=retry", "off, skip, rollback, stop"]),
    ([("run.spike_deviations", 0)], ["run.spike_deviations=0", "above 0"]),
    ([("run.spike_window", 1)], ["run.spike_window=1", "at least 2"]),
    ([("run.seed", -1)], ["run.seed=-1", "at least 0"]),
    ([("data.interleave", 0)], ["data.interleave=0", "at least 1"]),
    ([("checkpoint.every_tokens", "often")], ["checkpoint.every_tokens=often", "27B"]),
    ([("init.optimizer", True)], ["init.optimizer=true", "init.source"]),
    (
        [("init", {"source": "x", "optimizer": True}), (f"{STAGES}.sparse.reset_optimizer", True)],
        [f"{STAGES}.sparse.reset_optimizer=true", "init.optimizer=true"],
    ),
]


@pytest.mark.parametrize("assignments, words", CASES, ids=[case[1][0] for case in CASES])
def test_each_mistake_is_named(assignments, words):
    """Catches a mistake that passes, and a message without the key, the value or what would work."""
    problems = problems_of(changed(*assignments))
    assert any(all(word in problem for word in words) for problem in problems), problems
    assert all("None" not in problem and "\n" not in problem for problem in problems), problems


def test_all_mistakes_come_at_once():
    """Catches an error that hides the next one, also across sections and kinds (type, quantity, unknown key, rule)."""
    problems = problems_of(
        changed(
            ("model.num_kv_heads", 3),
            ("model.ffn_size", "wide"),
            ("schedule.tokenz", 5),
            (f"{STAGES}.sparse.attention.top_k", 0),
            (f"{STAGES}.full.rope", {"scaling": "yarn", "factor": 2}),
            ("optim.lr", {"peak": -1}),
            ("checkpoint.every_tokens", "often"),
            ("run.device", "tpu"),
        ),
        CPU,
    )
    keys = ["model.num_kv_heads", "model.ffn_size", "schedule.tokenz", "sparse.attention.top_k", "original_length"]
    keys += ["optim.lr.peak", "checkpoint.every_tokens", "run.device"]
    assert len(problems) == len(keys), problems
    for key in keys:
        assert sum(key in problem for problem in problems) == 1, (key, problems)


def test_an_unreadable_quantity_is_one_problem():
    """Catches follow-up complaints about a length or batch that was merely misspelt."""
    assert len(problems_of(changed(("schedule.seq_len", "1Q")))) == 1
    assert len(problems_of(changed(("schedule.batch_tokens", "lots")))) == 1
    assert len(problems_of(changed((f"{STAGES}.full.tokens", "lots")))) == 1


@pytest.mark.parametrize(
    "assignments, hardware, words",
    [
        ([("run.device", "cuda")], CPU, ["run.device=cuda", "cpu"]),
        ([(f"{STAGES}.full.attention.backend", "flash")], CPU, ["full.attention.backend=flash", "GPU", "torch"]),
        ([(f"{STAGES}.sparse.attention.backend", "triton")], CPU, ["sparse.attention.backend=triton", "GPU"]),
        (
            [(f"{STAGES}.full.attention", {"kind": "full", "backend": "cudnn"})],
            CPU,
            ["full.attention.backend=cudnn", "GPU", "torch"],
        ),
        (
            [(f"{STAGES}.full.attention", {"kind": "full", "backend": "cudnn"}), ("run.deterministic", True)],
            GPU,
            ["full.attention.backend=cudnn", "run.deterministic=true", "flash"],
        ),
        (
            [(f"{STAGES}.full.attention", {"kind": "full", "backend": "cudnn"}), ("deepspeed.precision", "fp32")],
            Hardware(num_gpus=1, gpu_name="T4", has_bf16=False),
            ["full.attention.backend=cudnn", "T4", "flash"],
        ),
        (
            [(f"{STAGES}.sparse.attention.backend", "triton")],
            Hardware(num_gpus=1, has_triton=False),
            ["backend=triton", "not installed", "flash"],
        ),
        (
            [("model.compile", True)],
            Hardware(num_gpus=1, has_triton=False),
            ["model.compile=true", "triton", "model.compile=false"],
        ),
        ([("deepspeed.zero_stage", 0)], GPU, ["deepspeed.zero_stage=0", "zero1", "fp32"]),
        (
            [("deepspeed.precision", "bf16")],
            Hardware(num_gpus=1, gpu_name="Tesla V100", has_bf16=False),
            ["deepspeed.precision=bf16", "V100", "fp32"],
        ),
        ([], Hardware(2, world_size=4, local_world_size=4), ["nproc_per_node=4", "2 GPUs", "--nproc_per_node=2"]),
        (
            [],
            Hardware(world_size=3),
            [
                "schedule.batch_tokens=4K",
                "4 micro-batches of 1K",
                "3 processes",
                "batch_tokens=6K",
                "1, 2, 4 processes",
            ],
        ),
        ([("schedule.micro_tokens", "2K")], Hardware(world_size=4), ["batch_tokens=4K", "batch_tokens=8K"]),
    ],
)
def test_the_machine_is_checked(assignments, hardware, words):
    """Catches a choice that only fails after the data is loaded, or ranks with unequal work."""
    assert freeze(changed(*assignments)), "the configuration itself must be fine"
    problems = problems_of(changed(*assignments), hardware)
    assert any(all(word in problem for word in words) for problem in problems), problems


def test_the_machine_is_accepted():
    """Catches refusals of what works: ZeRO 0 in fp32 on a CPU, kernels of a GPU on a GPU, an even split."""
    freeze(changed(("deepspeed.zero_stage", 0)), CPU)
    freeze(changed((f"{STAGES}.sparse.attention.backend", "triton")), GPU)
    freeze(valid(), Hardware(4, world_size=4, local_world_size=4))
    freeze(changed(("deepspeed", {"zero_stage": 0, "precision": "fp32"})), GPU)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 40))
def test_suggested_batches_work(micro_batches, world_size, sequences):
    """Catches advice that does not help: following the message must remove the problem."""
    config = changed(
        ("schedule.seq_len", 32),
        ("schedule.batch_tokens", 32 * micro_batches * sequences),
        ("schedule.micro_tokens", 32 * sequences),
    )
    hardware = Hardware(world_size=world_size)
    if micro_batches % world_size == 0:
        freeze(config, hardware)
        return
    advice = problems_of(config, hardware)[0].split("use batch_tokens=")[1].split(", or ")[0]
    config["schedule"]["batch_tokens"] = advice
    freeze(config, hardware)


def test_freezing_twice_changes_nothing():
    """Catches a config.yaml in a run directory that reads back as another run: through YAML, with odd floats."""
    config = freeze(
        changed(
            ("optim", {"lr": {"peak": 1e-05, "min_ratio": 1 / 3}, "eps": 1e-08}),
            (f"{STAGES}.full.lr", {"kind": "wsd"}),
            (f"{STAGES}.full.reset_optimizer", True),
            (f"{STAGES}.full.long_documents", {"share": 0.3}),
            (f"{STAGES}.full.attention", {"num_blocks": 16}),
            (f"{STAGES}.full.mix", {"books": 2}),
            ("model.rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
            ("model.key_conv_pattern", "-K"),
            ("model.key_conv", 3),
            ("schedule.window", "1K"),
            (f"{STAGES}.sparse.attention.pattern", "SM"),
            ("data.path", None),
        )
    )
    text = yaml.safe_dump(to_dict(config), sort_keys=False)
    assert freeze(yaml.safe_load(text)) == config
    assert list(freeze(yaml.safe_load(text)).schedule.stages) == ["sparse", "full"]


def test_trajectory_differences():
    """Catches a change of the losses that resumes silently, and a harmless change that is refused."""
    old = freeze(valid())
    harmless = changed(
        ("run", {"name": "b", "dir": "elsewhere", "device": "cpu", "notice": "x"}),
        ("logging", {"every_tokens": "1M", "wandb": "disabled"}),
        ("eval", {"every_tokens": 0, "documents": 3}),
        ("checkpoint", {"every_tokens": 0, "keep": 9}),
        ("deepspeed", {"zero_stage": 2, "offload_optimizer": True}),
        ("schedule.micro_tokens", "2K"),
        (f"{STAGES}.sparse.attention.backend", "torch"),
        ("model.activation_checkpointing", True),
        ("data.validation", {"path": "held-out.txt"}),
        ("data.sources.books.path", "moved/books.txt"),
        # The same stages, said differently.
        ("schedule.tokens", None),
        (f"{STAGES}.sparse.tokens", "90K"),
        (f"{STAGES}.full.tokens", "10K"),
        (f"{STAGES}.sparse.attention.num_blocks", 16),
    )
    assert trajectory_diff(old, freeze(harmless)) == []
    harmful = {
        "run.seed": 1,
        "model.ffn_size": 128,
        "model.rope_pattern": "RN",
        "model.key_conv": 3,
        f"{STAGES}.sparse.attention": {"block_size": 64, "pattern": "SM", "window": 64},
        "data.tokenizer": "bpe-32k",
        "data.sources.books.weight": 2,
        f"{STAGES}.sparse.attention.top_k": 2,
        f"{STAGES}.full.tokens": "5%",
        f"{STAGES}.full.rope": {"theta": 5e5},
        "schedule.batch_tokens": "8K",
        "optim.lr": {"peak": 1e-3},
        "optim.grad_clip": 0,
        "deepspeed.precision": "bf16",
        "init.source": "runs/x",
    }
    for key, value in harmful.items():
        lines = trajectory_diff(old, freeze(changed((key, value))))
        assert lines, key
        assert all(" -> " in line for line in lines)
    assert "model.ffn_size: 384 -> 128" in trajectory_diff(old, freeze(changed(("model.ffn_size", 128))))
    reordered = valid()
    reordered["schedule"]["stages"] = dict(reversed(reordered["schedule"]["stages"].items()))
    assert "schedule.stages: sparse, full -> full, sparse" in trajectory_diff(old, freeze(reordered))


def test_choices_agree_with_data():
    """Catches a task that data has and the configuration refuses (conf imports nothing of it)."""
    assert set(checks.SYNTHETIC_TASKS) == set(data.synthetic.SIZES)


def test_every_key_is_documented():
    """Catches a field without its docstring: the dataclasses are the manual."""
    import ast
    import inspect

    from conf import schema

    fields = documented = 0
    for node in ast.parse(inspect.getsource(schema)).body:
        body = node.body if isinstance(node, ast.ClassDef) else []
        for field, after in zip(body, [*body[1:], None]):
            if isinstance(field, ast.AnnAssign) and node.name != "RunConfig":
                fields += 1
                is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert is_text and len(after.value.value) > 5, f"{node.name}.{field.target.id}"
                documented += 1
    assert fields == documented > 80


def test_conf_needs_no_torch():
    """Catches an import that makes `--help` and mistakes wait for torch."""
    code = "import sys, conf.validate; assert not {'torch', 'hydra'} & set(sys.modules), 'torch or hydra was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_defaults_are_a_valid_type():
    """Catches a default that its own field would refuse."""
    from conf.build import Problems, build

    problems = Problems()
    assert build(RunConfig, to_dict(RunConfig()), problems) == RunConfig()
    assert problems.lines == []


PLAN = f"{STAGES}.sparse.attention.plan"
ENTRIES = [["moba", 64, 4, 1], ["full", None, None], ["moba", 128, 3], ["moba", 64, 4]]


def planned(plan: object, *more: tuple[str, object]) -> dict:
    """`valid` with a plan instead of the sparse stage's block size."""
    return changed((f"{STAGES}.sparse.attention", {"plan": plan}), *more)


def test_a_plan_file_says_all_of_every_layer(tmp_path):
    """Catches a plan that is read again on resume, where the file may be another one by then, sizes of the schedule in
    its place, a change of it that a resumed run does not notice, and a backend that is lost."""
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump({"plan": ENTRIES}))
    config = freeze(planned(str(path), (f"{STAGES}.sparse.attention.backend", "torch"), ("schedule.block_size", "256")))
    assert config.schedule.stages["sparse"].attention.plan == ENTRIES
    plan = build_schedule(config).stages[0].attention
    assert [spec.entry() for spec in plan] == ENTRIES and {spec.backend for spec in plan} == {"torch"}
    path.unlink()
    assert freeze(to_dict(config)) == config
    other = freeze(planned([*ENTRIES[:3], ["full", None, None]], ("schedule.block_size", "256")))
    assert [line.partition(":")[0] for line in trajectory_diff(config, other)] == [PLAN]
    assert (
        build_schedule(freeze(planned(ENTRIES, (f"{STAGES}.sparse.attention.backend", "triton"))))
        .stages[0]
        .attention[1]
        == Full()
    )


def test_mistakes_in_a_plan(tmp_path):
    """Catches a key beside a plan that is silently ignored, and a plan of another model."""
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump({"plan": ENTRIES[:3]}))
    (line,) = problems_of(planned(str(path)))
    assert line == f"{PLAN}={path}: {path}: plan has 3 entries for a model of 4 layers"
    (line,) = problems_of(planned([*ENTRIES[:3], ["moba", 8, 1, 1]]))
    assert line.startswith(f"{PLAN}=[") and "plan[3]=['moba', 8, 1, 1]: first_blocks=1" in line
    (line,) = problems_of(planned("nowhere.yaml"))
    assert line.startswith(f"{PLAN}=nowhere.yaml: nowhere.yaml: No such file")
    beside = {"kind": "full", "full_last": 1, "pattern": "M", "block_size": 64, "top_k": 3, "first_blocks": 1}
    found = problems_of(planned(ENTRIES, *((f"{STAGES}.sparse.attention.{k}", v) for k, v in beside.items())))
    for key, value in beside.items():
        assert any(f"attention.{key}={value}: {PLAN} sets it for each layer; set {key}=" in line for line in found), key
    (line,) = problems_of(planned(ENTRIES[:1] * 4, (f"{STAGES}.sparse.attention.backend", "cudnn")))
    assert "backend=cudnn" in line and "support flash, reference, torch, triton or auto" in line
