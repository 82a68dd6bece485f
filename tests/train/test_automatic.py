"""What `auto` becomes on a machine, and that the plan says so."""

from dataclasses import replace

import pytest
import torch

import train.model.decoder
from conf.hardware import Hardware
from conf.schema import OFFLOAD, OFFLOAD_HEADS, ModelConfig
from conf.validate import freeze, to_dict, trajectory_diff
from moba.documents import Documents
from train.model.decoder import Decoder
from train.plan.automatic import settle
from train.plan.plan import make_plan

GPU = Hardware(num_gpus=1)
SHAPE = {"hidden_size": 64, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 96}


def config_of(model=None, **sections):
    return freeze(
        {
            "model": SHAPE | (model or {}),
            "data": {"sources": {"a": {"path": "a.txt"}}},
            "schedule": {"seq_len": 256, "batch_tokens": "1K", "stages": {"a": {"tokens": "32K"}}},
            **sections,
        }
    )


def text_of(config, hardware):
    return " ".join(make_plan(config, 384, hardware).text().split())


@pytest.mark.parametrize(
    ("sections", "hardware", "compiled", "words"),
    [
        ({}, GPU, True, "first steps"),
        ({}, Hardware(), False, "CPU"),
        ({"run": {"device": "cpu"}}, GPU, False, "CPU"),
        ({"deepspeed": {"zero_stage": 3}}, GPU, False, "ZeRO 3"),
        ({"run": {"deterministic": True}}, GPU, False, "run.deterministic=true"),
        ({}, replace(GPU, has_triton=False), False, "triton"),
    ],
)
def test_compile(sections, hardware, compiled, words):
    """Catches a default that needs a compiler on a CPU, that ZeRO 3 refuses, or that a plan does not mention; and a
    choice that another machine could not resume."""
    config = config_of(**sections)
    settled = settle(config, 384, hardware).config
    assert settled.model.compile is compiled
    reason = f"model.compile={str(compiled).lower()}: "
    assert reason in text_of(config, hardware) and words in text_of(config, hardware).partition(reason)[2]
    assert ("torch.compile" in text_of(config, hardware).partition(reason)[0]) == compiled
    assert trajectory_diff(config, settled) == trajectory_diff(settled, config) == []
    freeze(to_dict(settled), hardware)
    assert settle(settled, 384, hardware) == (settled, ())


def big(seq_len="32K", **model):
    """A model of 545M parameters at ZeRO 1."""
    shape = {"hidden_size": 1536, "num_layers": 16, "num_heads": 12, "ffn_size": 4096}
    schedule = {"seq_len": seq_len, "batch_tokens": seq_len, "stages": {"a": {"tokens": "1M"}}}
    return config_of(shape | {"num_kv_heads": None} | model, schedule=schedule)


def needed(mode):
    """Bytes of a GPU that the plan finds just large enough for this way."""
    return -(-make_plan(big(activation_checkpointing=mode), 384, GPU).memory.total * 100 // 92)


def test_activation_checkpointing_is_the_cheapest_that_fits():
    """Catches recomputation where memory is plenty, too little of it, a choice that the verdict contradicts, and one
    that the plan does not mention with its cost."""
    keeps, half, lean, host, least = (needed(mode) for mode in (False, "mlp", True, OFFLOAD, OFFLOAD_HEADS))
    assert least < host < lean < half < keeps
    cases = [
        (2 * keeps, False, "nothing is recomputed"),
        (keeps + 100, False, "nothing is recomputed"),
        (keeps - 100, "mlp", "two of a layer's seven matrix products"),
        (half + 100, "mlp", "two of a layer's seven matrix products"),
        (half - 100, True, "every layer's forward pass, about a third"),
        (lean - 100, OFFLOAD, "copies layers' inputs to the host and back"),
        (host - 100, OFFLOAD_HEADS, "attention's twice"),
        (least - 100, OFFLOAD_HEADS, "attention's twice"),
    ]
    for memory, mode, words in cases:
        hardware = replace(GPU, gpu_memory=memory)
        settled = settle(big(), 384, hardware).config
        assert settled.model.activation_checkpointing == mode
        assert type(settled.model.activation_checkpointing) is type(mode)
        text = text_of(big(), hardware)
        assert f"model.activation_checkpointing={str(mode).lower()}: " in text and words in text
        verdict = make_plan(big(), 384, hardware).verdict
        assert verdict.startswith("fits") if memory > least else "deepspeed=zero3" in verdict or "GPUs would" in verdict
        assert trajectory_diff(big(), settled) == []


def test_activation_checkpointing_sees_the_longest_stage_and_all_processes():
    """Catches a choice for the first stage alone, and one that forgets that ZeRO shares the optimizer's state."""
    hardware = replace(GPU, gpu_memory=needed("mlp") + 100)
    stages = {"a": {"tokens": "1M", "seq_len": "2K"}, "b": {"tokens": "1M"}}
    schedule = {"seq_len": "32K", "batch_tokens": "32K", "stages": stages}
    config = replace(big(), schedule=config_of(schedule=schedule).schedule)
    assert settle(config, 384, hardware).config.model.activation_checkpointing == "mlp"
    assert settle(big("2K"), 384, hardware).config.model.activation_checkpointing is False
    tight = replace(GPU, gpu_memory=needed(False) - 100)
    assert settle(big(), 384, replace(tight, world_size=8)).config.model.activation_checkpointing is False


@pytest.mark.parametrize("hardware", [Hardware(), replace(GPU, gpu_memory=None)], ids=["cpu", "unknown"])
def test_nothing_is_recomputed_where_it_is_not_known_to_help(hardware):
    """Catches a CPU run that computes twice, and a plan without the GPU's size that fails."""
    assert settle(big(), 384, hardware).config.model.activation_checkpointing is False
    assert "model.activation_checkpointing=false: " in text_of(big(), hardware)


@pytest.mark.parametrize("key", ["compile", "activation_checkpointing"])
@pytest.mark.parametrize("value", [True, False])
def test_what_the_user_names_stays(key, value):
    """Catches an automatic choice over the user's, and a plan that calls it automatic."""
    config = config_of({key: value})
    for hardware in (replace(GPU, gpu_memory=1 << 20), Hardware()):
        assert getattr(settle(config, 384, hardware).config.model, key) is value
        assert f"model.{key}={str(value).lower()}: " not in text_of(config, hardware)


def test_a_model_without_a_plan_is_eager(monkeypatch):
    """Catches `auto` taken for true where nobody chose: evaluations and exports on machines without a compiler."""
    monkeypatch.setattr(train.model.decoder, "_compiled", None)
    model = Decoder(ModelConfig(**SHAPE, loss_tile=8), 64)
    tokens = torch.arange(8)
    assert model(tokens, tokens, Documents.from_lengths([8]), tokens).shape == (8,)
