"""The optimizer and the DeepSpeed engine around it.

AdamW is torch's (fused on CUDA), so nothing is compiled; the learning rate is set by the caller before each step, so
there is no scheduler in the engine; and the accumulation boundary is set by the caller too (train/step.py), so the
number of micro-batches a step may change between stages without touching the engine.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch
from torch import nn

from conf.build import ConfigError
from conf.schema import DeepSpeedConfig, RunConfig
from train.engine.world import World


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Returns AdamW's parameter groups: matrices with `weight_decay`, norms and biases with none; none empty."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def resolve_precision(config: DeepSpeedConfig, device: torch.device) -> str:
    """Returns "bf16" or "fp32". Raises ConfigError for bf16 with stage 0.

    Stage 0 with bf16 is DeepSpeed's FP16_UnfusedOptimizer, which steps the optimizer once when it is built: weight
    decay is applied before training and AdamW's step count is one ahead.
    """
    if config.precision not in ("auto", "bf16", "fp32"):
        raise ConfigError([f"deepspeed.precision={config.precision!r}: choose one of auto, bf16, fp32"])
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    if precision == "bf16" and config.zero_stage == 0:
        raise ConfigError(
            [
                "deepspeed.zero_stage=0 with bf16: DeepSpeed applies weight decay once before the first step there; "
                "use deepspeed.zero_stage=1 (deepspeed=zero1), or deepspeed.precision=fp32"
            ]
        )
    return precision


def deepspeed_config(config: RunConfig, world: World) -> dict[str, Any]:
    """Returns DeepSpeed's configuration for a run; `deepspeed.extra` is merged last, key by key. Raises ConfigError.

    Batch sizes are 1: the engine only needs them to divide, and losses are scaled and boundaries set by train/step.py.
    """
    ds = config.deepspeed
    zero: dict[str, Any] = {"stage": ds.zero_stage}
    pin = world.device.type == "cuda"
    if ds.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pin}
    if ds.offload_params:
        zero["offload_param"] = {"device": "cpu", "pin_memory": pin}
    base = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 10**9,
        "gradient_clipping": config.optim.grad_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # Otherwise offloading insists on DeepSpeed's own Adam, which it compiles.
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": resolve_precision(ds, world.device) == "bf16"},
        # In bf16 the sum over micro-batches would be kept in bf16.
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    return _merge(base, ds.extra)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def build_engine(model: nn.Module, config: RunConfig, world: World) -> Any:
    """Returns the DeepSpeed engine around `model`, which it moves to the device (and casts to bf16 where that is
    asked for). Raises ConfigError for what DeepSpeed does not take.

    Every rank must hold the same weights, whatever the stage; ZeRO partitions them afterwards. Needs
    `init_world` first.
    """
    import deepspeed  # after init_world, which decides what it finds
    from pydantic import ValidationError  # with which DeepSpeed reads its configuration

    optim = config.optim
    optimizer = torch.optim.AdamW(
        param_groups(model.to(world.device), optim.weight_decay),
        lr=optim.lr.peak,
        betas=(optim.betas[0], optim.betas[1]),
        eps=optim.eps,
        fused=world.device.type == "cuda",
    )
    # Its bf16 optimizer prints a dozen lines of memory usage while it is built.
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(config, world))
    except ValidationError as error:
        wrong = [(".".join(map(str, one["loc"])), one["input"], one["msg"]) for one in error.errors()]
        raise ConfigError(
            [f"deepspeed.extra: DeepSpeed does not take {k}={v}: {why}" for k, v, why in wrong]
        ) from error
    return engine


def set_lr(engine: Any, lr: float) -> None:
    """Sets the learning rate of the next step (every ZeRO optimizer forwards `param_groups` to the inner one)."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
