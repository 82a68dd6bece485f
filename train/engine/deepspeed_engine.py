"""The engine over DeepSpeed: the only place that reads its internals.

In every ZeRO stage the optimizer steps flat fp32 tensors (at stage 0 the parameters themselves), and a parameter is a
range of one of them, so that a checkpoint knows neither the stage nor the number of ranks:

    stage 0        the whole parameter, on every rank
    stages 1, 2    a group's parameters laid end to end and cut into one range per rank: a parameter may span
                   a cut or lie on one rank alone (`_hp_mapping`; None where this rank has nothing of it)
    stage 3        each parameter cut into equal ranges, one per rank, the last ones shorter or empty
    (`grad_position`)

DeepSpeed's own safe_get_full_fp32_param family reads the same ranges, but gathers to every rank, sums floats (which
turns -0.0 into 0.0), knows nothing of stage 0, and its setters reach neither moments that do not exist yet (before
the first step, so on every resume) nor the low-precision weights. Written against DeepSpeed 0.19.8;
tests/train/test_checkpoint.py covers each stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from conf.build import ConfigError
from moba.documents import Documents
from train.engine.adamw import VetoedAdamW
from train.engine.engine import MASTER, MOMENTS, Slot, as_norm
from train.model.decoder import Decoder

GATHER_ELEMENTS = 2**26  # 256 MiB of device memory while a large parameter is collected


class DeepSpeedEngine:
    """The Engine of train/engine/engine.py; built by train/engine/optim.py."""

    def __init__(self, engine: Any):
        """`engine` is what deepspeed.initialize returned. ConfigError for what no checkpoint could hold."""
        self._engine, self._optimizer = engine, engine.optimizer
        if getattr(engine.optimizer, "swap_optimizer", False):
            raise ConfigError(
                ["deepspeed.extra: checkpoints do not cover optimizer state on NVMe; offload to host memory"]
            )
        from deepspeed.runtime.bf16_optimizer import BF16_Optimizer  # slow to import

        if isinstance(engine.optimizer, BF16_Optimizer):
            from train.engine.bf16_optimizer import DeviceOptimizer

            if engine.optimizer.immediate_grad_update:
                raise ConfigError(
                    [
                        "deepspeed.extra: bf16.immediate_grad_update=true: gradients are added up after each backward "
                        "pass at zero_stage=1; leave it out"
                    ]
                )
            engine.optimizer.__class__ = DeviceOptimizer

    @property
    def model(self) -> Decoder:
        return self._engine.module

    @property
    def zero_stage(self) -> int:
        return int(self._engine.zero_optimization_stage())

    @property
    def precision(self) -> str:
        return "bf16" if self._engine.bfloat16_enabled() else "fp32"

    # -------------------- a step

    def __call__(self, tokens_T: Tensor, positions_T: Tensor, documents: Documents, labels_T: Tensor) -> Tensor:
        return self._engine(tokens_T, positions_T, documents, labels_T)

    def backward(self, loss: Tensor, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float, veto: Callable[[Tensor], bool] | None = None) -> tuple[Tensor, Tensor]:
        for group in self._optimizer.param_groups:  # every ZeRO optimizer shares them with the inner one
            group["lr"] = lr
        if self.zero_stage == 0:
            return self._step_plain(veto)
        vetoed = self._step_unless(veto)
        norm = as_norm(self._engine.get_global_grad_norm(), self._engine.device)
        if vetoed or not self._engine.was_step_applied():
            return torch.ones_like(norm, dtype=torch.bool), norm
        return ~norm.isfinite(), norm  # which an optimizer that does not ask the host decides by

    def _step_unless(self, veto: Callable[[Tensor], bool] | None) -> bool:
        """DeepSpeed's step; True if AdamW's part of it was vetoed."""
        if veto is None:
            self._engine.step()
            return False
        answers: list[bool] = []

        def ask() -> bool:
            if not answers:
                answers.append(veto(as_norm(self._optimizer._global_grad_norm, self._engine.device)))
            return answers[0]

        adamw = self._adamw()
        assert isinstance(adamw, VetoedAdamW)
        adamw.veto = ask
        self._engine.step()
        adamw.veto = None
        return any(answers)

    def _step_plain(self, veto: Callable[[Tensor], bool] | None) -> tuple[Tensor, Tensor]:
        """At stage 0, where the optimizer is torch's own and DeepSpeed clips without testing the norm."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        norm = as_norm(norm, self._engine.device)
        skipped = ~norm.isfinite()
        if skipped or (veto is not None and veto(norm)):
            self._engine.zero_grad()
            return torch.ones_like(skipped), norm
        self._engine.step()
        return skipped, norm

    def train(self) -> None:
        self._engine.train()

    def eval(self) -> None:
        self._engine.eval()

    def destroy(self) -> None:
        self._engine.destroy()

    # -------------------- what a checkpoint holds

    def slots(self) -> list[Slot]:
        locate = {0: self._locate_plain, 3: self._locate_zero3}.get(self.zero_stage, self._locate_zero12)
        return [locate(name, param) for name, param in self.model.named_parameters()]

    def _locate_plain(self, name: str, param: torch.nn.Parameter) -> Slot:
        return Slot(name, tuple(param.shape), param, 0, 0, param.numel(), replicated=True)

    def _locate_zero12(self, name: str, param: Any) -> Slot:
        held = param._hp_mapping
        if held is None:
            return Slot(name, tuple(param.shape), None, 0, 0, 0, replicated=False)
        flat = self._optimizer.param_groups[held.param_group_index]["params"][0]
        high, low = held.hp_fragment_address, held.lp_fragment_address
        return Slot(name, tuple(param.shape), flat, high.start, low.start, low.numel, replicated=False)

    def _locate_zero3(self, name: str, param: Any) -> Slot:
        optimizer = self._optimizer
        sub_group, flat_start, share = optimizer.grad_position[optimizer.get_param_id(param)]
        start = min(share * dist.get_rank(), param.ds_numel)
        size = min(share, param.ds_numel - start)
        flat = optimizer.fp32_partitioned_groups_flat[sub_group]
        return Slot(name, tuple(param.ds_shape), flat, flat_start, start, size, replicated=False)

    def _adamw(self) -> torch.optim.AdamW:
        optimizer = self._optimizer
        return optimizer if isinstance(optimizer, torch.optim.AdamW) else optimizer.optimizer

    def _state(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns AdamW's state of one flat tensor, made as its first step would make it if there is none yet."""
        optimizer = self._adamw()
        state = optimizer.state[flat]
        if MOMENTS[0] not in state:
            fused = optimizer.defaults["fused"]
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device if fused else "cpu")
            for key in MOMENTS:
                state[key] = torch.zeros_like(flat, memory_format=torch.preserve_format)
        return state

    def _share(self, slot: Slot, key: str) -> torch.Tensor:
        """Returns the 1-D view of this rank's share of `key`."""
        assert slot.flat is not None, slot.name
        whole = slot.flat if key == MASTER else self._state(slot.flat)[key]
        return whole.detach().reshape(-1).narrow(0, slot.flat_start, slot.size)

    def has_moments(self) -> bool:
        return any(MOMENTS[0] in state for state in self._adamw().state.values())

    def step_count(self) -> int:
        counts = {int(state["step"]) for state in self._adamw().state.values()}
        assert len(counts) <= 1, f"parameters have taken different numbers of steps: {sorted(counts)}"
        return counts.pop() if counts else 0

    def gather(self, slot: Slot, key: str, owner: int, into: Tensor | None = None) -> Tensor | None:
        beside = into is not None
        whole = None
        if dist.get_rank() == owner:
            whole = torch.empty(slot.numel, dtype=torch.float32) if into is None else into
        if slot.replicated:
            return None if whole is None else whole.copy_(self._share(slot, key), beside).reshape(slot.shape)
        # Shares are added up as integers: each element has one rank that holds its bits and zeros elsewhere.
        device = self._engine.device
        for low in range(0, slot.numel, GATHER_ELEMENTS):
            high = min(low + GATHER_ELEMENTS, slot.numel)
            bits = torch.zeros(high - low, dtype=torch.int32, device=device)
            first, last = max(slot.start, low), min(slot.start + slot.size, high)
            if first < last:
                held = self._share(slot, key).narrow(0, first - slot.start, last - first)
                bits[first - low : last - low] = held.view(torch.int32).to(device)
            dist.reduce(bits, dst=owner)
            if whole is not None:
                whole[low:high].copy_(bits.view(torch.float32), beside)  # no copy between: it is slow to allocate
        return None if whole is None else whole.reshape(slot.shape)

    @torch.no_grad()
    def restore(self, read: Callable[[str, Slot], torch.Tensor], *, step: int) -> None:
        for slot in self._held():
            self._share(slot, MASTER).copy_(read(MASTER, slot))
            if step:
                for key in MOMENTS:
                    self._share(slot, key).copy_(read(key, slot))
        if step:
            for state in self._adamw().state.values():
                state["step"].fill_(step)
        self._refresh_weights()

    @torch.no_grad()
    def reset_moments(self) -> None:
        for state in self._adamw().state.values():
            for key in MOMENTS:
                state[key].zero_()
            state["step"].zero_()

    def _held(self) -> Iterator[Slot]:
        return (slot for slot in self.slots() if slot.size)

    def _refresh_weights(self) -> None:
        """Copies the master weights into those of the forward pass, over all ranks."""
        optimizer = self._optimizer
        stage = self.zero_stage
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
