"""Parameter groups and the configuration handed to DeepSpeed; what they do is tested in test_step.py."""

import os
from dataclasses import replace

import pytest
import torch
from engine_runs import build_model

from conf.schema import DeepSpeedConfig, RunConfig
from train.engine.optim import deepspeed_config, param_groups, resolve_precision
from train.engine.world import World, own_cores

CPU = World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
CUDA = World(rank=0, world_size=1, local_rank=0, device=torch.device("cuda", 0))


def config(**options):
    return replace(RunConfig(), deepspeed=DeepSpeedConfig(**options))


def test_only_matrices_decay_and_tied_weights_count_once():
    """Catches decayed norms and biases, a parameter in no group or in two."""
    model = build_model()
    decayed, others = param_groups(model, 0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in others["params"]} == {1}
    assert sorted(map(id, decayed["params"] + others["params"])) == sorted(map(id, model.parameters()))


def test_a_model_of_matrices_has_one_group():
    """Catches an empty group, which AdamW and ZeRO refuse."""
    assert len(param_groups(torch.nn.Linear(2, 2, bias=False), 0.1)) == 1


@pytest.mark.parametrize(("world", "stage", "precision"), [(CPU, 0, "fp32"), (CPU, 3, "fp32"), (CUDA, 1, "bf16")])
def test_auto_precision_follows_the_device(world, stage, precision):
    """Catches a CPU run in bf16 or a GPU run in fp32 by default."""
    assert resolve_precision(DeepSpeedConfig(zero_stage=stage), world.device) == precision


@pytest.mark.parametrize(
    ("options", "world", "says"),
    [
        ({"zero_stage": 0, "precision": "bf16"}, CPU, r"zero_stage=0 with bf16.*zero_stage=1"),
        ({"zero_stage": 0}, CUDA, r"zero_stage=0 with bf16"),
        ({"precision": "fp16"}, CPU, r"precision='fp16'.*bf16"),
    ],
)
def test_what_cannot_work_is_refused_by_name(options, world, says):
    """Catches a setting that DeepSpeed would take and this project would contradict or get wrong."""
    with pytest.raises(ValueError, match=says):
        deepspeed_config(config(**options), world)


def test_deepspeed_measures_no_time():
    """Catches its stop watch, which waits for the device before each forward pass and after each step."""
    from deepspeed.utils.config import get_timers_config

    assert get_timers_config({}).enabled and not get_timers_config(deepspeed_config(config(), CPU)).enabled


def test_extra_is_merged_last_and_deep():
    """Catches an `extra` that replaces a whole section, or that cannot override."""
    extra = {"zero_optimization": {"reduce_bucket_size": 7}, "gradient_clipping": 0.5}
    merged = deepspeed_config(config(zero_stage=2, offload_optimizer=True, extra=extra), CPU)
    assert merged["zero_optimization"]["stage"] == 2
    assert merged["zero_optimization"]["reduce_bucket_size"] == 7
    assert merged["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": False}
    assert merged["gradient_clipping"] == 0.5


def test_processes_of_a_host_share_its_cores(monkeypatch):
    """Catches one thread for billions of weights, and processes that take all cores each."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    for processes, cores in ((1, 8), (2, 4), (16, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert own_cores() == cores
