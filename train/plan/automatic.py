"""Resolves what is left to the machine, `auto` in the model's section and the size of micro-batches, before a model is
built: `settle`.

This changes how the same sums are computed, not the trajectory, so a run may resume where they resolve differently. In
a configuration that was not settled `auto` counts as false, and a micro-batch is one sequence. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from conf.hardware import Hardware, data_size
from conf.numbers import format_length, format_memory
from conf.schema import AUTO, OFFLOAD, OFFLOAD_HEADS, OFFLOADED, RunConfig
from train.model.sizes import num_parameters
from train.plan.describe import uses_bf16
from train.plan.host import HostMemory, host_memory, lacks
from train.plan.memory import Memory, most_memory, room
from train.schedule import Stage, build_schedule

MICRO_TOKENS = 32 * 1024
"""Tokens of a micro-batch that keep an H100 busy: for 125m at 8K, four sequences at once took 86 ms, one by one 225, of
which the GPU idled 67 % (benchmarks/results/micro_batches)."""
KEPT: dict[bool | str, str] = {
    False: "all activations",
    "mlp": "without the MLPs'",
    True: "layers' inputs only",
    OFFLOAD: "these on the host",
    OFFLOAD_HEADS: "with heads in groups",
}
"""The ways to save activations, the cheapest first, by what they keep."""
COSTS: dict[bool | str, str] = {
    False: "nothing is recomputed",
    "mlp": "recomputes the MLPs in the backward pass (two of a layer's seven matrix products), not attention",
    True: "recomputes every layer's forward pass, about a third more work",
    OFFLOAD: "recomputes every layer's forward pass and copies layers' inputs to the host and back",
    OFFLOAD_HEADS: "recomputes every layer's forward pass, attention's twice, and copies inputs to the host and back",
}


class Settled(NamedTuple):
    """A configuration with every `auto` and the size of micro-batches resolved."""

    config: RunConfig
    reasons: tuple[str, ...]
    """For each of them: what it became, why, and what that costs."""


def settle(config: RunConfig, vocab_size: int, hardware: Hardware) -> Settled:
    """The configuration as it runs on this machine, for `vocab_size` embedding rows. The same if it has no `auto`."""
    config, reasons = settle_for(config, build_schedule(config).stages, vocab_size, hardware)
    config, larger = _micro_batches(config, vocab_size, hardware)
    return Settled(config, (*reasons, *larger))


def settle_for(
    config: RunConfig, stages: Sequence[Stage], vocab_size: int, hardware: Hardware
) -> tuple[RunConfig, list[str]]:
    """The configuration with a model as it runs these stages, and the reasons."""
    reasons = []
    if config.model.activation_checkpointing == AUTO:
        chosen, why = _activation_checkpointing(config, stages, vocab_size, hardware)
        config = _with_recomputation(config, chosen)
        reasons.append(f"model.activation_checkpointing={str(chosen).lower()}: {why}")
    if config.model.compile == AUTO:
        chosen, why = _compile(config, hardware)
        config = replace(config, model=replace(config.model, compile=chosen))
        reasons.append(f"model.compile={str(chosen).lower()}: {why}")
    return config, reasons


def _micro_batches(config: RunConfig, vocab_size: int, hardware: Hardware) -> tuple[RunConfig, list[str]]:
    """The configuration with micro-batches of several sequences on GPUs, in stages that do not set it: the most that
    divide the batch, hold at most MICRO_TOKENS, and fit in memory with the present activation checkpointing. And a
    reason for each."""
    if hardware.device(config.run.device) == "cpu" or hardware.gpu_memory is None:
        return config, []
    most = room(hardware.gpu_memory)
    stages, reasons = dict(config.schedule.stages), []
    for stage in build_schedule(config).stages:
        if stages[stage.name].micro_tokens is not None:
            continue
        sequences = stage.batch_tokens // stage.seq_len // data_size(config, hardware)
        limit = MICRO_TOKENS * config.parallel.sequence // stage.seq_len
        for count in range(min(sequences, limit), 1, -1):
            micro = count * stage.seq_len
            if sequences % count:
                continue
            needed = needs(config, [replace(stage, micro_tokens=micro)], vocab_size, hardware)[0].total
            if needed <= most:
                stages[stage.name] = replace(stages[stage.name], micro_tokens=micro)
                reasons.append(
                    f"schedule.stages.{stage.name}.micro_tokens={format_length(micro)}: {count} sequences at a time; "
                    f"memory: {format_memory(needed)} of {format_memory(most)} available"
                )
                break
    return replace(config, schedule=replace(config.schedule, stages=stages)), reasons


def needs(config: RunConfig, stages: Sequence[Stage], vocab_size: int, hardware: Hardware) -> tuple[Memory, HostMemory]:
    """GPU and host memory of the stage that needs most."""
    options = {"bf16": uses_bf16(config, hardware), "world_size": hardware.world_size}
    memory = most_memory(config, stages, vocab_size, **options)
    tokens = max(stage.micro_tokens for stage in stages) // config.parallel.sequence
    parameters = num_parameters(config.model, vocab_size)["total"]
    return memory, host_memory(config, memory, parameters, tokens, hardware)


def _with_recomputation(config: RunConfig, mode: bool | str) -> RunConfig:
    return replace(config, model=replace(config.model, activation_checkpointing=mode))


def _activation_checkpointing(
    config: RunConfig, stages: Sequence[Stage], vocab_size: int, hardware: Hardware
) -> tuple[bool | str, str]:
    """The least recomputation with which the estimate fits. Nothing is offloaded beyond the host's memory: a GPU out of
    memory raises an error, a host kills processes without a message."""
    if hardware.device(config.run.device) == "cpu":
        return False, "nothing is recomputed on a CPU"
    if hardware.gpu_memory is None:
        return False, "the GPU's memory is not known; set gpu_memory=80GB"
    most, no_room = room(hardware.gpu_memory), ""
    tried: dict[bool | str, str] = {}
    for mode, kept in KEPT.items():
        memory, host = needs(_with_recomputation(config, mode), stages, vocab_size, hardware)
        if mode in OFFLOADED and lacks(host.total, hardware):
            assert hardware.host_memory is not None
            there = f"{format_memory(room(hardware.host_memory))} of the host's memory"
            no_room = f"; not offloaded: that needs {format_memory(host.total)} of {there}"
            break
        tried[mode] = f"{kept} {format_memory(memory.total)}"
        if memory.total <= most:
            break
    *_, chosen = tried
    compared = f"memory: {', '.join(tried.values())}, of {format_memory(most)} available"
    return chosen, f"{COSTS[chosen]}; {compared}{no_room}"


def _compile(config: RunConfig, hardware: Hardware) -> tuple[bool, str]:
    """Whether layers are compiled, and why."""
    if hardware.device(config.run.device) == "cpu":
        return False, "off on a CPU, where it needs a C++ compiler; set it to true if there is one"
    if config.deepspeed.zero_stage == 3:
        return False, "its speed with ZeRO 3 was not measured on GPUs; set it to true to try"
    if config.run.deterministic:
        return False, "compiled kernels may not be bitwise reproducible, which run.deterministic=true asks for"
    if not hardware.has_triton:
        return False, "triton is not installed"
    return True, "faster, but the first steps, and the first with another length, wait for the compiler"
