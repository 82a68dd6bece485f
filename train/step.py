"""One optimizer step, to be read in order: count valid tokens, forward and backward each micro-batch, clip, finite?,
step.

The loss of a step is the sum of its per-token losses over the valid tokens of the whole global batch, so it does not
depend on how tokens fall on ranks and micro-batches.

Non-finite steps. The loss of each micro-batch is tested on the device before its backward pass; a bad one multiplies
the loss by NaN, so that its gradients, and after the reduction every rank's, are NaN. The gradient norm is tested
before the optimizer, on all ranks alike since the gradients are reduced by then, and a bad step is skipped: no
parameter, moment or step count changes. Where the norm is tested:

    stage 0                 DeepSpeedEngine._step_plain
    stage 1 bf16            torch's fused AdamW, on the device (train/engine/bf16_optimizer.py)
    stages 1, 2, 3          DeepSpeed's ZeRO optimizers' step, bf16 and fp32, offloaded or not

A spike (train/spikes.py, where run.on_spike asks for it) is skipped in the same way. Its loss, summed over the ranks,
and its norm are compared on the device, between DeepSpeed's reading of the norm and the optimizer
(train/engine/adamw.py); the result is read there, where only the comparison is left to wait for.

So there is no stage where a non-finite gradient reaches the weights, and no collective or host synchronisation is spent
on the test of the loss. Host synchronisations: at stage 1 in bf16 without spike detection, the host waits only for the
counts of valid tokens, which the device computes at the step's beginning, and stays a step ahead of the device.
Elsewhere DeepSpeed's step reads the norm (at stage 2 in bf16 an overflow flag too), which waits for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from data.packing import IGNORED, Batch
from train.engine.collectives import OnHost, all_reduce_sum, on_device
from train.engine.engine import Engine
from train.engine.world import World
from train.spikes import Spikes


@dataclass(frozen=True)
class StepResult:
    """What one step did."""

    loss_sum: torch.Tensor
    """Sum of the per-token losses of this rank's sequences; float64 [], on the device. Not finite where the step was
    skipped for it."""
    num_tokens: int
    """Valid tokens of the global batch: the mean loss is loss_sum, summed over the data axis, over this."""
    grad_norm: torch.Tensor
    """Global L2 norm of the gradients before clipping; float32 [], on the device. inf or nan in a skipped step
    that is no spike."""
    skipped: torch.Tensor
    """True, on all ranks, if the loss or the gradients were not finite, or a spike, and nothing was updated; bool [],
    on the device."""
    spike: bool
    """True, on all ranks, if it was skipped as a spike."""
    stop: bool
    """True, on all ranks, if any rank asked to stop."""


def train_step(
    engine: Engine,
    batches: Sequence[Batch],
    *,
    lr: float,
    world: World,
    stop: bool = False,
    on_losses: Callable[[torch.Tensor, Batch], None] | None = None,
    on_micro_batch: Callable[[int, int], None] | None = None,
    spikes: Spikes | None = None,
) -> StepResult:
    """Returns the result of one optimizer step on this rank's micro-batches; every rank must pass the same number of
    them, and ranks that share sequences the same ones.

    `stop` asks, from this rank, to end the run after this step. `on_losses(losses float32 [T], batch)` gets every
    micro-batch's detached per-token losses, on the device, after the step; those of a skipped step are all NaN.
    `on_micro_batch(k, n)` is told when the host is done with micro-batch k of n. `spikes` tests the step, and adds a
    good one to its statistics.
    """
    valid = torch.stack([(batch.labels != IGNORED).sum() for batch in batches]).sum()
    counts = all_reduce_sum(on_device(torch.stack([valid, valid.new_tensor(int(stop))]), world.device))
    counts[0] //= world.sequence_size  # each rank of a sequence has counted all of it
    counts_on_host = OnHost(counts)
    # The engine averages gradients over ranks; the loss is a sum over them. Ranks that share a sequence have the same
    # loss, and each the gradients of its own slice.
    scale = world.world_size / counts[0].clamp(min=1)

    seen = []
    for index, batch in enumerate(batches):
        batch = batch.to(world.device)
        losses = engine(batch.tokens, batch.positions, batch.documents, batch.labels)
        loss = losses.sum() * scale
        loss = loss * torch.where(loss.isfinite(), 1.0, torch.nan)
        engine.backward(loss, last=index == len(batches) - 1)
        seen.append((losses.detach(), batch))
        if on_micro_batch is not None:
            on_micro_batch(index + 1, len(batches))

    loss_sum = torch.stack([losses.sum(dtype=torch.float64) for losses, _ in seen]).sum()
    loss = None if spikes is None else world.sum_over_data(loss_sum.clone()) / counts[0].clamp(min=1)
    spike = False

    def is_spike(norm: torch.Tensor) -> bool:
        nonlocal spike
        assert spikes is not None and loss is not None
        spike = bool(spikes.is_spike(loss, norm))
        return spike

    num_tokens, num_stops = counts_on_host.read()[0].tolist()
    skipped, grad_norm = engine.step(lr, None if spikes is None else is_spike)
    if spikes is not None and loss is not None and not skipped:
        spikes.add(loss, grad_norm)
    if on_losses is not None:
        for losses, batch in seen:
            on_losses(losses.masked_fill(skipped, torch.nan), batch)
    return StepResult(loss_sum, num_tokens, grad_norm, skipped, spike, stop=num_stops > 0)
