"""DeepSpeed's optimizer for bf16 and ZeRO 1, without waiting for the device.

BF16_Optimizer (DeepSpeed 0.19.8) reads the gradients' norm on the host before AdamW, so that a step begins with an
empty queue, and passes several times over gradients that one pass can serve. Here torch's fused AdamW decides on the
device, as it does for torch.amp: `found_inf` has it leave the step out, `grad_scale` is what it divides gradients by.
The layout of weights, gradients and moments is DeepSpeed's, and so is everything else, reductions over ranks included.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor

from train.engine.adamw import VetoedAdamW

CLIP_EPSILON = 1e-6  # DeepSpeed's


class DeviceOptimizer(BF16_Optimizer):
    """A BF16_Optimizer of a dense model with fp32 gradients, made from one by `adopt`."""

    @staticmethod
    def adopt(optimizer: BF16_Optimizer) -> DeviceOptimizer:
        """Has `optimizer` step as this class does. DeepSpeed builds it where nobody can name a class."""
        optimizer.__class__ = DeviceOptimizer
        assert isinstance(optimizer, DeviceOptimizer)
        return optimizer

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Clips and steps; nothing changes where the norm is not finite, which `_global_grad_norm` then says as inf.
        With a veto, which the host asks, DeepSpeed's own step."""
        adamw = self.optimizer
        if isinstance(adamw, VetoedAdamW) and adamw.veto is not None:
            super().step(closure)
            return
        self.overflow = False
        norm = torch.nn.utils.get_total_norm(self.fp32_groups_gradients_flat)
        bad = ~norm.isfinite()
        self._global_grad_norm = torch.where(bad, torch.inf, norm)
        for weights, gradient in zip(self.fp32_groups_flat_partition, self.fp32_groups_gradient_flat_partition):
            weights.grad = gradient
        adamw.found_inf = bad.float()
        if self.clip_grad > 0:
            adamw.grad_scale = ((norm + CLIP_EPSILON) / self.clip_grad).clamp(min=1)
        adamw.step()
        adamw.found_inf = adamw.grad_scale = None
        self._lazy_init_hp_params_optimizer_state()
        self.update_lp_params()

    def _update_hp_grad(self, lp: Any, group_idx: int, param_idx: int, clear_lp_grads: bool) -> None:
        """The first gradient of a step is copied, so that nobody needs to set sums to zero; others are added in one
        pass. Sums are DeepSpeed's to the bit."""
        total, seen = self.fp32_groups_gradients[group_idx][param_idx], self.fp32_groups_has_gradients[group_idx]
        if lp.grad is not None:
            gradient = lp.grad.view(total.shape)
            total.add_(gradient) if seen[param_idx] else total.copy_(gradient)
        elif not seen[param_idx]:
            total.zero_()
        lp._hp_grad = total  # where DeepSpeed looks for it
        lp.grad = None  # rather than zeroed and added to by the next backward pass
        seen[param_idx] = True

    def get_grads_for_reduction(self) -> Any:
        """On one rank nothing, which spares two copies of all gradients."""
        return super().get_grads_for_reduction() if dist.get_world_size() > 1 else ([], {})

    def get_grads_for_norm(self, for_clipping: bool = False) -> Any:
        """Flat tensors: clipping concerns what this rank's AdamW reads; the norm is that of all."""
        if for_clipping:
            return self.fp32_groups_gradient_flat_partition
        flat: list[Tensor] = self.fp32_groups_gradients_flat
        return flat, {}

    def clear_hp_grads(self) -> None:
        """Begins a step's sums anew."""
        self.fp32_groups_has_gradients = [[False] * len(group) for group in self.fp32_groups_gradients]
