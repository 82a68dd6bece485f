"""What `auto` in the model's section becomes on the machine at hand: `settle` says, before a model is built.

It changes no trajectory, only how the same sums are computed, so a run may be resumed where it becomes something else.
A model that is built of a configuration that nobody settled takes it as false. No torch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from conf.hardware import Hardware
from conf.schema import AUTO, RunConfig


class Settled(NamedTuple):
    """A configuration whose model has no `auto` left."""

    config: RunConfig
    reasons: tuple[str, ...]
    """For each that it had: what it became, why, and what that costs."""


def settle(config: RunConfig, hardware: Hardware) -> Settled:
    """The configuration as it runs on this machine. The same if it has no `auto`."""
    reasons = []
    if config.model.compile == AUTO:
        chosen, why = _compile(config, hardware)
        config = replace(config, model=replace(config.model, compile=chosen))
        reasons.append(f"model.compile={str(chosen).lower()}: {why}")
    return Settled(config, tuple(reasons))


def _compile(config: RunConfig, hardware: Hardware) -> tuple[bool, str]:
    """Whether layers are compiled, and why."""
    if hardware.device(config.run.device) == "cpu":
        return False, "not on a CPU, where it takes a compiler; set it to true if there is one"
    if config.deepspeed.zero_stage == 3:
        return False, "ZeRO 3 gathers weights inside what would be compiled"
    if config.run.deterministic:
        return False, "compiled kernels need not repeat bit for bit, as run.deterministic=true asks"
    if not hardware.has_triton:
        return False, "triton is not installed"
    return True, "faster; the first steps, and the first of another length, take up to a minute longer"
