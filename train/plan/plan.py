"""What a run will do, computed before anything is allocated: `make_plan` gives a Plan, `Plan.text()` is for reading.

Stages with their tokens, steps, attention and share of attended pairs; the model's size; FLOPs; an estimate of memory;
where outputs go. No torch.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from conf.exchange import most_processes
from conf.files import user_path
from conf.hardware import Hardware, data_size
from conf.numbers import format_length, format_memory
from conf.schema import OFFLOADED, ModelConfig, ParallelConfig, RunConfig
from data.sources import Source, is_shipped
from moba.flops import attended_pairs, attention_flops, causal_pairs
from train.model.sizes import head_dim, matmul_flops_per_token, num_parameters
from train.plan.automatic import KEPT, needs, settle
from train.plan.describe import (
    describe_data,
    describe_engine,
    describe_kernels,
    describe_layers,
    describe_lr,
    describe_model,
    describe_outputs,
    describe_rope,
    describe_stage_lr,
    reach,
    uses_bf16,
)
from train.plan.host import HostMemory, lacks
from train.plan.memory import Memory, most_memory, room, saving_bytes
from train.plan.warnings import unfilled, warnings_of
from train.record.progress import clock
from train.record.throughput import peak_tflops
from train.schedule import Schedule, Stage, build_schedule

MOST_GPUS = 4096
GPU_SHARE = 0.4  # of the peak: what training steps reach (benchmarks/results/step_profile_h100)
SHORT_SECONDS = 600
SLOW = 1e13
WIDTH = 118


@dataclass(frozen=True)
class StagePlan:
    """One stage in figures. Shares and FLOPs are those of documents (or windows) of the full length."""

    name: str
    tokens: int
    steps: int
    seq_len: int
    batch_tokens: int
    micro_batches: int
    """Micro-batches a process computes for one step."""
    attention: str
    attended_share: float
    """Attended (query, key) pairs / causal pairs, over all layers."""
    covers: tuple[str, ...]
    """Warnings about layers that are dense at this length."""
    rope: str
    lr: str
    """Its schedule in words."""
    reset_optimizer: bool
    lr_first: float
    lr_last: float
    mix: dict[str, float]
    long_share: float | None
    """Share of the tokens that come from documents of at least seq_len inputs; None where lengths are not known yet."""
    flops: float
    """Training FLOPs with attended pairs."""
    dense_flops: float
    """The same if every layer attended to all earlier tokens."""


@dataclass(frozen=True)
class Plan:
    """Everything `text` prints, as data."""

    name: str
    run_dir: str
    model: str
    parameters: dict[str, int]
    vocab_size: int
    stages: tuple[StagePlan, ...]
    total_tokens: int
    total_steps: int
    lr: str
    engine: str
    kernels: tuple[str, ...]
    """What computes each kind of attention, and why nothing faster."""
    world_size: int
    memory: Memory
    host: HostMemory | None
    """Host memory of GPU processes; None on a CPU."""
    verdict: str
    time: str | None
    """Estimated time at best; None where unknown or short."""
    data: tuple[str, ...]
    outputs: tuple[str, ...]
    warnings: tuple[str, ...]
    automatic: tuple[str, ...]
    """What each `auto` of the model became, and why."""
    notice: str | None

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain dictionaries and scalars."""
        return asdict(self)

    def text(self) -> str:
        """The plan in lines of at most 118 characters, a long path apart."""
        return "\n".join(_lines(self))


def make_plan(
    config: RunConfig,
    vocab_size: int,
    hardware: Hardware | None = None,
    sources: Mapping[str, Source] | None = None,
    asked_tokens: int | None = None,
) -> Plan:
    """The plan of a frozen configuration for a model with `vocab_size` embedding rows (train/model/sizes.py).

    `hardware` says how many processes share the work and how much memory a GPU has; without it, one GPU of unknown
    size. `sources` are those whose documents are tokenised already. `asked_tokens` is the budget before it was divided
    among stages.
    """
    hardware = hardware or Hardware(num_gpus=1)
    config, automatic = settle(config, vocab_size, hardware)
    schedule = build_schedule(config)
    sources = sources or {}
    lengths = {name: source.lengths for name, source in sources.items() if not source.is_chat}
    stages = tuple(_stage_plan(config, stage, schedule, vocab_size, hardware, lengths) for stage in schedule.stages)
    memory, verdict = _memory(config, schedule.stages, vocab_size, hardware)
    on_gpus = hardware.device(config.run.device) == "cuda"
    host = needs(config, schedule.stages, vocab_size, hardware)[1] if on_gpus else None
    if host is not None and lacks(host.total, hardware):
        verdict += f", {_host_verdict(host, hardware)}"
    assert config.run.name is not None and config.run.dir is not None  # filled in when frozen
    return Plan(
        name=config.run.name,
        run_dir=str(user_path(config.run.dir).absolute()),
        model=describe_model(config),
        parameters=num_parameters(config.model, vocab_size),
        vocab_size=vocab_size,
        stages=stages,
        total_tokens=schedule.total_tokens,
        total_steps=schedule.total_steps,
        lr=describe_lr(config),
        engine=describe_engine(config, hardware),
        kernels=describe_kernels(config, schedule.stages, hardware, uses_bf16(config, hardware)),
        world_size=hardware.world_size,
        memory=memory,
        host=host,
        verdict=verdict,
        time=_time(config, stages, hardware),
        data=describe_data(config, schedule.stages, sources),
        outputs=describe_outputs(config, hardware, num_parameters(config.model, vocab_size)["total"]),
        warnings=(*unfilled(asked_tokens, schedule), *warnings_of(config, schedule, sources)),
        automatic=automatic,
        notice=_notice(config),
    )


def _notice(config: RunConfig) -> str | None:
    """Advice to be printed: the run's, and that on the embedded corpus if used."""
    shipped = any(source.path is not None and is_shipped(source.path) for source in config.data.sources.values())
    parts = [config.run.notice, config.data.notice if shipped else None]
    return " ".join(part for part in parts if part) or None


def _stage_plan(
    config: RunConfig,
    stage: Stage,
    schedule: Schedule,
    vocab_size: int,
    hardware: Hardware,
    lengths: Mapping[str, np.ndarray],
) -> StagePlan:
    model, whole = config.model, [stage.seq_len]
    attended = sum(attended_pairs(spec, whole) for spec in stage.attention)
    causal = causal_pairs(whole) * model.num_layers
    matmul = matmul_flops_per_token(model, vocab_size) * stage.tokens

    def total_flops(pairs: int) -> float:
        sequences = stage.tokens // stage.seq_len
        return float(matmul + sequences * attention_flops(pairs, model.num_heads, head_dim(model), backward=True))

    return StagePlan(
        name=stage.name,
        tokens=stage.tokens,
        steps=stage.num_steps,
        seq_len=stage.seq_len,
        batch_tokens=stage.batch_tokens,
        micro_batches=stage.batch_tokens // stage.micro_tokens // data_size(config, hardware),
        attention=describe_layers(stage.attention),
        attended_share=attended / causal,
        covers=_covers(stage),
        rope=describe_rope(stage.rope, config),
        lr=describe_stage_lr(config, stage.name),
        reset_optimizer=stage.reset_optimizer,
        lr_first=schedule.learning_rate(stage.start),
        lr_last=schedule.learning_rate(stage.end - stage.batch_tokens),
        mix=stage.mix,
        long_share=reach(stage, lengths),
        flops=total_flops(attended),
        dense_flops=total_flops(causal),
    )


def _covers(stage: Stage) -> tuple[str, ...]:
    """Each attention kind's warning about layers that are dense at the stage's length, once."""
    kinds = {type(spec) for spec in stage.attention if spec.covers and spec.is_dense_at(stage.seq_len)}
    return tuple(sorted(kind.covers.format(length=format_length(stage.seq_len)) for kind in kinds))


def _memory(config: RunConfig, stages: tuple[Stage, ...], vocab_size: int, hardware: Hardware) -> tuple[Memory, str]:
    """The stage that needs most, and whether it fits."""
    bf16 = uses_bf16(config, hardware)

    def need(
        model=config.model,
        engine=config.deepspeed,
        parallel=config.parallel,
        world_size=hardware.world_size,
        one_sequence=False,
    ) -> Memory:
        changed = replace(config, model=model, deepspeed=engine, parallel=parallel)
        options = {"bf16": bf16, "world_size": world_size, "one_sequence": one_sequence}
        return most_memory(changed, stages, vocab_size, **options)

    memory = need()
    if hardware.device(config.run.device) == "cpu":
        elsewhere = "launch/plan.py num_gpus=1 gpu_memory=80GB plans for a GPU"
        saving = saving_bytes(config, num_parameters(config.model, vocab_size)["total"], hardware.world_size)
        needed = (memory.total + saving) * hardware.local_world_size
        if hardware.host_memory is not None and needed > room(hardware.host_memory):
            there = f"does not fit the {format_memory(hardware.host_memory)} of this host's memory"
            return memory, f"{there} ({elsewhere}; +exp=moba_32k_small is a long-context schedule for a CPU)"
        return memory, f"in main memory ({elsewhere})"
    if hardware.gpu_memory is None:
        return memory, "compare with your GPU's memory, or set gpu_memory=80GB"
    most = room(hardware.gpu_memory)
    of_gpu = f"{format_memory(hardware.gpu_memory)} per GPU"
    if memory.total <= most:
        return memory, f"fits {of_gpu}"
    return memory, f"does not fit {of_gpu}{_advice(config, hardware, need, most)}"


def _host_verdict(host: HostMemory, hardware: Hardware) -> str:
    """The message for a host with too little memory."""
    assert hardware.host_memory is not None
    text = f"but {format_memory(host.total)} do not fit the {format_memory(hardware.host_memory)} of the host's memory"
    return text if lacks(host.running, hardware) else f"{text}; checkpoint.asynchronous=false would"


def _time(config: RunConfig, stages: Sequence[StagePlan], hardware: Hardware) -> str | None:
    """The time that the FLOPs of the stages take, and each of them where there are several."""
    if hardware.device(config.run.device) == "cpu":
        if hardware.cpu_flops is None:
            return None
        rate, at = (
            hardware.cpu_flops * hardware.local_world_size,
            "at least {} on this CPU, whose matrix products run at {}",
        )
    else:
        peak = peak_tflops(hardware.gpu_name)
        if peak is None:
            return None
        rate, at = GPU_SHARE * peak * 1e12 * hardware.world_size, "about {} if the GPUs reach {}, 40 % of their peak"
    seconds = sum(stage.flops for stage in stages) / rate
    if seconds < SHORT_SECONDS:
        return None
    each = ", ".join(f"{stage.name} {clock(stage.flops / rate)}" for stage in stages)
    of_which = f"; {each}" if len(stages) > 1 else ""
    small = "; +exp=quickstart and +exp=moba_32k_small are sized for CPUs" if rate < SLOW else ""
    return at.format(clock(seconds), f"{rate / 1e12:.3g} TFLOP/s") + of_which + small


def _advice(config: RunConfig, hardware: Hardware, need, most: int) -> str:
    """How to make it fit: the first of ever larger changes with which it does, or that there is none."""
    modes = list(KEPT)
    leaner = modes[modes.index(config.model.activation_checkpointing) :]
    models = {mode: replace(config.model, activation_checkpointing=mode) for mode in leaner}
    zero3 = replace(config.deepspeed, zero_stage=3)
    shared, limit = config.parallel.sequence, most_processes(config)

    def is_too_long(shared: int) -> bool:
        arguments = {"parallel": replace(config.parallel, sequence=shared), "world_size": MOST_GPUS}
        smallest = need(model=models[leaner[-1]], engine=zero3, one_sequence=True, **arguments)
        return smallest.activations + smallest.working > most

    shares = [shared * 2**n for n in range(12) if shared * 2**n <= limit or n == 0]
    shares = [share for share in shares if not is_too_long(share)]
    num_gpus = max([hardware.world_size, *shares[:1]])
    while shares and num_gpus <= MOST_GPUS:
        for share in shares:
            if share <= num_gpus and num_gpus % share == 0:
                split = replace(config.parallel, sequence=share)
                if (found := _changes(config, hardware, need, most, models, split, num_gpus)) is not None:
                    return f"; {' '.join(found)} would"
        num_gpus *= 2
    heads = "as there are heads" if limit < MOST_GPUS else f"as {MOST_GPUS:,}"
    return f": the activations of one sequence are too large even when split over as many GPUs {heads}"


def _changes(
    config: RunConfig,
    hardware: Hardware,
    need: Callable[..., Memory],
    most: int,
    models: Mapping[bool | str, ModelConfig],
    split: ParallelConfig,
    num_gpus: int,
) -> list[str] | None:
    """The fewest changes with which it fits on `num_gpus` GPUs that share sequences as `split` says; None if nothing
    does.

    Adds one setting after another, first with activation checkpointing that offloads nothing, then with offloading.
    """
    zero3 = replace(config.deepspeed, zero_stage=3)
    settings = (
        (f"parallel.sequence={split.sequence}", "parallel", split, config.parallel == split),
        ("schedule.micro_tokens=null", "one_sequence", True, _one_sequence(config)),
        ("deepspeed=zero3", "engine", zero3, config.deepspeed == zero3),
    )
    for on_host in (False, True):
        for count in range(1, len(settings) + 1):
            arguments = {name: value for _, name, value, _ in settings[:count]} | {"world_size": num_gpus}
            for mode, model in models.items():
                if (mode in OFFLOADED) == on_host and need(model=model, **arguments).total <= most:
                    changes = [text for text, _, _, in_force in settings[:count] if not in_force]
                    if mode != config.model.activation_checkpointing:
                        changes.append(f"model.activation_checkpointing={str(mode).lower()}")
                    return [*changes, f"on {num_gpus} GPUs"] if num_gpus > hardware.world_size else changes
    return None


def _one_sequence(config: RunConfig) -> bool:
    """Whether no stage takes several sequences at a time."""
    return all(stage.micro_tokens in (None, stage.seq_len) for stage in config.schedule.stages.values())


def _lines(plan: Plan) -> list[str]:
    size = plan.parameters
    lines = [
        f"Plan of {plan.name}",
        *_block(
            "model",
            plan.model,
            f"{size['total']:,} parameters, {size['non_embedding']:,} without embeddings;"
            f" vocabulary {plan.vocab_size:,}",
        ),
        *_block("budget", f"{plan.total_tokens:,} tokens in {plan.total_steps:,} steps"),
        *_block("learning rate", plan.lr),
        *_block("engine", plan.engine),
        *_block("kernels", *plan.kernels),
        *_block("auto", *plan.automatic),
        "",
        *_stage_table(plan.stages),
        "",
    ]
    for index, stage in enumerate(plan.stages):
        lines += _stage_details(stage, later=index > 0)
    flops, dense = sum(s.flops for s in plan.stages), sum(s.dense_flops for s in plan.stages)
    lines += [
        "",
        *_block(
            "compute",
            f"{flops:.3g} FLOPs with attended pairs, {dense:.3g} if attention were full throughout (forward and"
            " backward; a multiply-add counts 2; recomputation not counted; full-length documents assumed)",
        ),
        *_block(
            "memory",
            f"estimated {format_memory(plan.memory.total)} per process: {_memory_parts(plan.memory)}",
            *([_host_parts(plan.host)] if plan.host else []),
            plan.verdict,
        ),
        *_block("time", *([plan.time] if plan.time else [])),
        *_block("data", *plan.data),
        *_block("outputs", plan.run_dir, *plan.outputs),
    ]
    lines += ["", *_block("warning", *plan.warnings)] if plan.warnings else []
    return lines + (["", *_block("note", plan.notice)] if plan.notice else [])


def _block(title: str, *entries: str) -> list[str]:
    """Entries under a title in the margin, wrapped."""
    lines: list[str] = []
    for entry in entries:
        for line in textwrap.wrap(entry, WIDTH - 17, break_long_words=False, break_on_hyphens=False):
            lines.append(f"  {'' if lines else title:<14} {line}")
    return lines


def _memory_parts(memory: Memory) -> str:
    return ", ".join(f"{name} {format_memory(value)}" for name, value in asdict(memory).items() if name != "host")


def _host_parts(host: HostMemory) -> str:
    parts = [("offloaded", host.offloaded), ("the processes themselves", host.own)]
    parts += [("what checkpoint.asynchronous=true copies into", host.saving)]
    shown = ", ".join(f"{name} {format_memory(value)}" for name, value in parts if value)
    return f"a host: {format_memory(host.total)} of main memory: {shown}"


def _stage_table(stages: tuple[StagePlan, ...]) -> list[str]:
    rows = [("stage", "tokens", "steps", "length", "tokens per step", "micro-batches", "attended", "learning rate")]
    for stage in stages:
        rows.append(
            (
                stage.name,
                f"{stage.tokens:,}",
                f"{stage.steps:,}",
                format_length(stage.seq_len),
                format_length(stage.batch_tokens),
                str(stage.micro_batches),
                f"{stage.attended_share:.1%}",
                f"{stage.lr_first:.3g} -> {stage.lr_last:.3g}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def _stage_details(stage: StagePlan, later: bool) -> list[str]:
    lines = textwrap.wrap(
        f"{stage.name}: attention {stage.attention}; RoPE {stage.rope}",
        WIDTH,
        initial_indent="  ",
        subsequent_indent="    ",
    )
    sequences = stage.batch_tokens // stage.seq_len
    plural = "" if sequences == 1 else "s"
    moments = "; fresh optimizer moments" if stage.reset_optimizer else "; optimizer moments kept" if later else ""
    text = f"{sequences:,} sequence{plural} per step; learning rate {stage.lr}{moments}"
    lines += textwrap.wrap(text, WIDTH, initial_indent="    ", subsequent_indent="    ")
    if len(stage.mix) > 1:
        lines.append("    mix " + ", ".join(f"{name} {share:.1%}" for name, share in stage.mix.items()))
    return lines + [f"    warning: {text}" for text in stage.covers]
