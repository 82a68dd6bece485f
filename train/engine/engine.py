"""The interface of an engine: forward and backward, one optimizer step, and the state that a checkpoint saves.

The loop, checkpoints, Hugging Face imports and evaluations use only this; DeepSpeed is behind it
(train/engine/deepspeed_engine.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moba.documents import Documents
from train.model.decoder import Decoder

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Slot:
    """Where this rank keeps its share of one parameter."""

    name: str
    shape: tuple[int, ...]
    flat: Tensor | None
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


class Engine(Protocol):
    """A model and its optimizer over all ranks of a run."""

    @property
    def model(self) -> Decoder:
        """The model; at ZeRO-3 its parameters are whole within a forward or backward pass only."""
        ...

    @property
    def zero_stage(self) -> int:
        """0 to 3."""
        ...

    @property
    def precision(self) -> str:
        """ "bf16" or "fp32": the weights of the forward pass."""
        ...

    def __call__(self, tokens_T: Tensor, positions_T: Tensor, documents: Documents, labels_T: Tensor) -> Tensor:
        """Per-token loss in nats, float32 `[T]`, as from Decoder.forward."""
        ...

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradients of a scalar loss; `last`: of the step's last micro-batch. They are averaged over ranks."""
        ...

    def step(self, lr: float, veto: Callable[[Tensor], bool] | None = None) -> tuple[Tensor, Tensor]:
        """Clips and steps, unless the gradient norm is not finite or `veto(norm)` is True, both the same on all ranks.
        Returns (skipped: bool [], L2 norm before clipping: float32 []), both on the device. A veto needs run.on_spike
        other than off."""
        ...

    def train(self) -> None:
        """Training mode."""
        ...

    def eval(self) -> None:
        """Evaluation mode."""
        ...

    def slots(self) -> list[Slot]:
        """One Slot per parameter, in the model's order (the same on every rank); tied parameters appear once."""
        ...

    def has_moments(self) -> bool:
        """True, on all ranks alike, once the optimizer has stepped or was loaded."""
        ...

    def step_count(self) -> int:
        """Steps that AdamW has taken (bias correction depends on it); 0 before the first."""
        ...

    def gather(self, slot: Slot, key: str, owner: int, into: Tensor | None = None) -> Tensor | None:
        """The whole fp32 tensor of MASTER or one of MOMENTS, on the CPU, on rank `owner`, and None elsewhere. A
        collective; bit-exact. With `into`, float32 `[numel]` of the owner's pinned memory, the copy is asynchronous in
        the device's stream; work launched later does not change it."""
        ...

    def restore(self, read: Callable[[str, Slot], Tensor], *, step: int) -> None:
        """Sets this rank's share of the master weights, and then the weights of the forward pass as a step would.

        `read(key, slot)` returns elements [slot.start, slot.start + slot.size) of a parameter as fp32. With `step` > 0
        it also sets the moments, and AdamW's step count to `step`; with 0 the optimizer stays as it is.
        """
        ...

    def reset_moments(self) -> None:
        """Resets the optimizer to before its first step; the weights stay."""
        ...

    def destroy(self) -> None:
        """Releases hooks and buffers."""
        ...


def as_norm(value: Tensor | float, device: torch.device) -> Tensor:
    """A gradient norm as Engine.step returns it."""
    return torch.as_tensor(value, dtype=torch.float32, device=device)
