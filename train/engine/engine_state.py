"""What a DeepSpeed engine holds, parameter by parameter: fp32 master weights, AdamW's moments and the step count.

This hides how the ZeRO stages lay them out, so that a checkpoint knows neither the stage nor the number of ranks. In
every stage the optimizer steps flat fp32 tensors (at stage 0 the parameters themselves), and a parameter is a range
of one of them:

    stage 0        the whole parameter, on every rank
    stages 1, 2    a group's parameters laid end to end and cut into one stretch a rank: a parameter may straddle
                   a cut or lie on one rank alone (`_hp_mapping`; None where this rank has nothing of it)
    stage 3        each parameter cut into equal stretches, one a rank, the last ones shorter or empty (`grad_position`)

DeepSpeed's own safe_get_full_fp32_param family reads the same ranges, but gathers to every rank, sums floats (which
turns -0.0 into 0.0), knows nothing of stage 0, and its setters reach neither moments that do not exist yet (before
the first step, so on every resume) nor the low-precision weights. Written against DeepSpeed 0.19.8;
tests/train/test_checkpoint.py covers each stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from conf.build import ConfigError

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")
GATHER_ELEMENTS = 2**26  # 256 MiB of device memory while a large parameter is collected


@dataclass(frozen=True)
class Slot:
    """Where this rank keeps its share of one parameter."""

    name: str
    shape: tuple[int, ...]
    flat: torch.Tensor | None
    """fp32 tensor the optimizer steps; None if this rank holds nothing of the parameter."""
    flat_start: int
    """First element of the share in `flat`."""
    start: int
    """First element of the share in the parameter."""
    size: int
    """Elements of the share."""
    replicated: bool
    """True if every rank holds all of it (stage 0)."""

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return math.prod(self.shape)


def slots(engine: Any) -> list[Slot]:
    """Returns one Slot a parameter, in the model's order (the same on every rank); tied parameters appear once."""
    stage = engine.zero_optimization_stage()
    locate = _locate_plain if stage == 0 else _locate_zero3 if stage == 3 else _locate_zero12
    if getattr(engine.optimizer, "swap_optimizer", False):
        raise ConfigError(["deepspeed.extra: checkpoints do not cover optimizer state on NVMe; offload to host memory"])
    return [locate(engine, name, param) for name, param in engine.module.named_parameters()]


def _locate_plain(engine: Any, name: str, param: torch.nn.Parameter) -> Slot:
    return Slot(name, tuple(param.shape), param, 0, 0, param.numel(), replicated=True)


def _locate_zero12(engine: Any, name: str, param: torch.nn.Parameter) -> Slot:
    held = param._hp_mapping
    if held is None:
        return Slot(name, tuple(param.shape), None, 0, 0, 0, replicated=False)
    flat = engine.optimizer.param_groups[held.param_group_index]["params"][0]
    high, low = held.hp_fragment_address, held.lp_fragment_address
    return Slot(name, tuple(param.shape), flat, high.start, low.start, low.numel, replicated=False)


def _locate_zero3(engine: Any, name: str, param: torch.nn.Parameter) -> Slot:
    optimizer = engine.optimizer
    sub_group, flat_start, share = optimizer.grad_position[optimizer.get_param_id(param)]
    start = min(share * dist.get_rank(), param.ds_numel)
    size = min(share, param.ds_numel - start)
    flat = optimizer.fp32_partitioned_groups_flat[sub_group]
    return Slot(name, tuple(param.ds_shape), flat, flat_start, start, size, replicated=False)


def _adamw(engine: Any) -> torch.optim.AdamW:
    optimizer = engine.optimizer
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


def _state(engine: Any, flat: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns AdamW's state of one flat tensor, made as its first step would make it if there is none yet."""
    optimizer = _adamw(engine)
    state = optimizer.state[flat]
    if MOMENTS[0] not in state:
        fused = optimizer.defaults["fused"]
        state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device if fused else "cpu")
        for key in MOMENTS:
            state[key] = torch.zeros_like(flat, memory_format=torch.preserve_format)
    return state


def _share(engine: Any, slot: Slot, key: str) -> torch.Tensor:
    """Returns the 1-D view of this rank's share of `key`."""
    whole = slot.flat if key == MASTER else _state(engine, slot.flat)[key]
    return whole.detach().reshape(-1).narrow(0, slot.flat_start, slot.size)


def has_moments(engine: Any) -> bool:
    """True, on all ranks alike, once the optimizer has stepped or was loaded."""
    return any(MOMENTS[0] in state for state in _adamw(engine).state.values())


def step_count(engine: Any) -> int:
    """Returns how many steps AdamW has taken (bias correction depends on it); 0 before the first."""
    counts = {int(state["step"]) for state in _adamw(engine).state.values()}
    assert len(counts) <= 1, f"parameters have taken different numbers of steps: {sorted(counts)}"
    return counts.pop() if counts else 0


def gather(engine: Any, slot: Slot, key: str, owner: int) -> torch.Tensor | None:
    """Returns the whole fp32 tensor, on the CPU, on rank `owner`, and None elsewhere. A collective; bit-exact.

    Shares are added up as integers: each element has one rank that holds its bits and zeros elsewhere.
    """
    mine = dist.get_rank() == owner
    if slot.replicated:
        return _share(engine, slot, key).cpu().clone().reshape(slot.shape) if mine else None
    whole = torch.empty(slot.numel, dtype=torch.float32) if mine else None
    device = engine.device
    for low in range(0, slot.numel, GATHER_ELEMENTS):
        high = min(low + GATHER_ELEMENTS, slot.numel)
        bits = torch.zeros(high - low, dtype=torch.int32, device=device)
        first, last = max(slot.start, low), min(slot.start + slot.size, high)
        if first < last:
            held = _share(engine, slot, key).narrow(0, first - slot.start, last - first)
            bits[first - low : last - low] = held.view(torch.int32).to(device)
        dist.reduce(bits, dst=owner)
        if mine:
            whole[low:high] = bits.view(torch.float32).cpu()
    return whole.reshape(slot.shape) if mine else None


@torch.no_grad()
def restore(engine: Any, read: Callable[[str, Slot], torch.Tensor], *, step: int) -> None:
    """Sets this rank's share of the master weights, and then the weights of the forward pass as a step would.

    `read(key, slot)` returns elements [slot.start, slot.start + slot.size) of a parameter as fp32. With `step` > 0 it
    also sets the moments, and AdamW's step count to `step`; with 0 the optimizer stays as it is.
    """
    for slot in _held(engine):
        _share(engine, slot, MASTER).copy_(read(MASTER, slot))
        if step:
            for key in MOMENTS:
                _share(engine, slot, key).copy_(read(key, slot))
    if step:
        for state in _adamw(engine).state.values():
            state["step"].fill_(step)
    _refresh_weights(engine)


@torch.no_grad()
def reset_moments(engine: Any) -> None:
    """Makes the optimizer one that has taken no step; the weights stay as they are."""
    for state in _adamw(engine).state.values():
        for key in MOMENTS:
            state[key].zero_()
        state["step"].zero_()


def _held(engine: Any) -> Iterator[Slot]:
    return (slot for slot in slots(engine) if slot.size)


def _refresh_weights(engine: Any) -> None:
    """Copies the master weights into those of the forward pass, over all ranks."""
    optimizer = engine.optimizer
    stage = engine.zero_optimization_stage()
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        optimizer._partition_all_parameters()
        for sub_group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
        # Small parameters stay whole on every rank between steps.
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        optimizer.invalidate_secondary_tensor()
