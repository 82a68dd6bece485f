"""The optimizer and the DeepSpeed engine around it.

AdamW is torch's (fused on CUDA), so nothing is compiled; the learning rate is set by the caller before each step, so
there is no scheduler in the engine; and the accumulation boundary is set by the caller too (train/step.py), so the
number of micro-batches per step may change between stages without touching the engine.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch
from torch import nn

from conf.build import ConfigError
from conf.schema import OFFLOADED, DeepSpeedConfig, RunConfig
from train.engine.adamw import VetoedAdamW
from train.engine.deepspeed_engine import DeepSpeedEngine
from train.engine.world import World, own_cores
from train.model.decoder import Decoder, DecoderLayer


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Returns AdamW's parameter groups: matrices with `weight_decay`, norms and biases with none; none empty."""
    sizes = {p: getattr(p, "ds_shape", p.shape) for p in model.parameters()}  # a shard is flat; ds_shape is the whole
    matrices = [p for p, shape in sizes.items() if len(shape) >= 2]
    vectors = [p for p, shape in sizes.items() if len(shape) < 2]
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
        # Its unused timer synchronises before each forward pass and after each step.
        "timers": {"throughput": {"enabled": False}},
    }
    return _merge(base, ds.extra)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def build_model(config: RunConfig, vocab_size: int) -> Decoder:
    """The run's model with `vocab_size` embedding rows, its weights initialised; at ZeRO-3 on the meta device, for
    `build_engine` to initialise the shards."""
    if config.deepspeed.zero_stage == 3:
        with torch.device("meta"):
            model = Decoder(config.model, vocab_size)
        model.set_rope(None)  # its angles are no parameters
        return model
    model = Decoder(config.model, vocab_size)
    model.init_weights(config.run.seed, own_cores())
    return model


def build_engine(model: Decoder, config: RunConfig, world: World) -> DeepSpeedEngine:
    """The engine around `model`, which it moves to the device (and casts to bf16 where that is asked for). Raises
    ConfigError for what DeepSpeed does not take.

    Every rank must hold the same weights. At stage 3, parameters on the meta device are initialised here one at a time,
    and each rank keeps only its share. Needs `init_world` first.
    """
    import deepspeed  # after init_world, which decides what it finds
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
    from pydantic import ValidationError  # with which DeepSpeed reads its configuration

    optim, settings = config.optim, deepspeed_config(config, world)
    if config.deepspeed.offload_optimizer and world.device.type == "cuda":
        # torchrun sets one thread per process, with which AdamW on the host dominates the step at billions of weights.
        torch.set_num_threads(max(torch.get_num_threads(), own_cores()))
    if VetoedAdamW not in ZERO_SUPPORTED_OPTIMIZERS:  # it compares the exact class, and warns of others
        ZERO_SUPPORTED_OPTIMIZERS.append(VetoedAdamW)
    # Its bf16 optimizer prints a dozen lines of memory usage while it is built.
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            if any(parameter.is_meta for parameter in model.parameters()):
                _draw_shards(model, config, settings, world)
            else:
                model.to(world.device)
            optimizer = (torch.optim.AdamW if config.run.on_spike == "off" else VetoedAdamW)(
                param_groups(model, optim.weight_decay),
                lr=optim.lr.peak,
                betas=(optim.betas[0], optim.betas[1]),
                eps=optim.eps,
                # In bf16 on a CPU too: there is one optimizer that decides on the device (bf16_optimizer.py).
                fused=world.device.type == "cuda" or resolve_precision(config.deepspeed, world.device) == "bf16",
            )
            offloads = config.model.activation_checkpointing in OFFLOADED
            if config.deepspeed.zero_stage == 3 and (offloads or config.model.compile is True):
                # Gathers a layer as a whole: offloaded layers use slices of weights outside their modules, and
                # gathering hooks within a compiled function would break its graph and recompile it.
                deepspeed.utils.set_z3_leaf_modules(model, [DecoderLayer])
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
            if config.run.on_spike != "off" and hasattr(engine.optimizer, "backup_optimizer"):
                raise ConfigError(
                    [
                        f"run.on_spike={config.run.on_spike}: not with a part of the optimizer on the host "
                        "(deepspeed.extra, zero_optimization.offload_optimizer.ratio below 1)"
                    ]
                )
    except ValidationError as error:
        wrong = [(".".join(map(str, one["loc"])), one["input"], one["msg"]) for one in error.errors()]
        raise ConfigError(
            [f"deepspeed.extra: DeepSpeed does not take {k}={v}: {why}" for k, v, why in wrong]
        ) from error
    return DeepSpeedEngine(engine)


def _draw_shards(model: Decoder, config: RunConfig, settings: dict[str, Any], world: World) -> None:
    """Initialises the parameters of a model on the meta device one at a time, each sharded before the next is drawn."""
    import deepspeed

    dtype = torch.bfloat16 if resolve_precision(config.deepspeed, world.device) == "bf16" else torch.float32
    cutter = deepspeed.zero.Init(config_dict_or_path=settings, dtype=dtype)
    places: dict[nn.Parameter, list[tuple[str, nn.Module, str]]] = {}  # tied parameters have several
    for path, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            places.setdefault(parameter, []).append((f"{path}.{key}", module, key))
    shapes = [(found[0][0], tuple(parameter.shape)) for parameter, found in places.items()]
    values = model.initial_values(shapes, config.run.seed, own_cores())
    for found, value in zip(places.values(), values, strict=True):
        shard = nn.Parameter(value.to(world.device, dtype))
        cutter._convert_to_zero_parameters([shard])
        for _, module, key in found:
            setattr(module, key, shard)
