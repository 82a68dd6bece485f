"""What `auto` becomes on a machine, and that the plan says so."""

from dataclasses import replace

import pytest
import torch

import train.model.decoder
from conf.hardware import Hardware
from conf.schema import ModelConfig
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
    settled = settle(config, hardware).config
    assert settled.model.compile is compiled
    reason = f"model.compile={str(compiled).lower()}: "
    assert reason in text_of(config, hardware) and words in text_of(config, hardware).partition(reason)[2]
    assert ("torch.compile" in text_of(config, hardware).partition(reason)[0]) == compiled
    assert trajectory_diff(config, settled) == trajectory_diff(settled, config) == []
    freeze(to_dict(settled), hardware)
    assert settle(settled, hardware) == (settled, ())


@pytest.mark.parametrize("value", [True, False])
def test_what_the_user_names_stays(value):
    """Catches an automatic choice over the user's, and a plan that calls it automatic."""
    config = config_of({"compile": value})
    for hardware in (GPU, Hardware()):
        assert settle(config, hardware).config.model.compile is value
        assert "model.compile=" not in text_of(config, hardware)


def test_a_model_without_a_plan_is_eager(monkeypatch):
    """Catches `auto` taken for true where nobody chose: evaluations and exports on machines without a compiler."""
    monkeypatch.setattr(train.model.decoder, "_compiled", None)
    model = Decoder(ModelConfig(**SHAPE, loss_tile=8), 64)
    tokens = torch.arange(8)
    assert model(tokens, tokens, Documents.from_lengths([8]), tokens).shape == (8,)
