"""DeepSpeed's optimizer for bf16 and ZeRO 1, without a host synchronisation.

BF16_Optimizer (DeepSpeed 0.19.8) reads the gradients' norm on the host before AdamW, so a step begins with an empty
queue, and it passes several times over the gradients. Here torch's fused AdamW decides on the device, as for torch.amp:
it skips the step by `found_inf` and divides gradients by `grad_scale`. The layout of weights, gradients and moments,
and all else, is DeepSpeed's, including reductions over ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor

CLIP_EPSILON = 1e-6  # DeepSpeed's


class DeviceOptimizer(BF16_Optimizer):
    """A BF16_Optimizer of a dense model with fp32 gradients. DeepSpeed has no setting for the class that it builds: an
    instance of its own is made one of this class."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Clips and steps; nothing changes where the norm is not finite (`_global_grad_norm` is then inf). With a veto,
        which needs the host, DeepSpeed's own step."""
        adamw: Any = self.optimizer
        if getattr(adamw, "veto", None) is not None:
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
        """Copies the first gradient of a step, so that sums need no zeroing, and adds the others in one pass. Sums are
        DeepSpeed's bit for bit, but for the sign of zeros."""
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
        """Nothing on one rank, which saves two copies of all gradients."""
        return super().get_grads_for_reduction() if dist.get_world_size() > 1 else ([], {})

    def get_grads_for_norm(self, for_clipping: bool = False) -> Any:
        """Flat tensors: clipping scales what this rank's AdamW reads; the norm is over all gradients."""
        if for_clipping:
            return self.fp32_groups_gradient_flat_partition
        flat: list[Tensor] = self.fp32_groups_gradients_flat
        return flat, {}

    def clear_hp_grads(self) -> None:
        """Resets a step's sums."""
        self.fp32_groups_has_gradients = [[False] * len(group) for group in self.fp32_groups_gradients]
