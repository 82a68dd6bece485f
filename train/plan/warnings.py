"""Warnings of a plan: valid settings that are probably mistakes. No torch."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from conf.numbers import format_length, format_tokens
from conf.schema import LRConfig, RunConfig
from data.mixture import Mixture
from data.sources import Source
from train.schedule import Schedule, Stage

LR_RANGE = 1e-7, 0.03
"""The range of plausible peak learning rates for transformers with AdamW."""
FEW_STEPS = 3
LONG_WARMUP = 0.5  # of the tokens that a learning-rate schedule spans
FAR_OFF = 0.05  # of a stage's tokens
MOST_DRAWS = 20_000  # with more documents a mixture comes close to its shares anyway


def warnings_of(config: RunConfig, schedule: Schedule, sources: Mapping[str, Source]) -> list[str]:
    """A line for each. `sources` are those that are tokenised already."""
    shared = sum(stage.tokens for stage in schedule.stages if config.schedule.stages[stage.name].lr is None)
    lines = _rate_warnings("optim.lr", config.optim.lr, shared) if shared else []
    for stage in schedule.stages:
        own = config.schedule.stages[stage.name].own_lr
        if own is not None:
            lines += _rate_warnings(f"schedule.stages.{stage.name}.lr", own, stage.tokens)
        lines += _stage_warnings(stage)
    if config.optim.weight_decay > 1:
        lines.append(f"optim.weight_decay={config.optim.weight_decay:g} pulls weights to zero; 0.1 is usual")
    return lines + _mixture_warnings(config, schedule, sources)


def _rate_warnings(key: str, lr: LRConfig, span: int) -> list[str]:
    lines, (least, most) = [], LR_RANGE
    if not least <= lr.peak <= most:
        lines.append(f"{key}.peak={lr.peak:g} is outside the usual range for AdamW ({least:g} to {most:g})")
    if lr.warmup_tokens > LONG_WARMUP * span:
        lines.append(f"{key}.warmup_tokens: {lr.warmup_tokens / span:.0%} of the tokens are warm-up")
    return lines


def _stage_warnings(stage: Stage) -> list[str]:
    lines, length = [], format_length(stage.seq_len)
    sizes = {spec.routing.block_size for spec in stage.attention if spec.routing is not None}
    for size in sorted(size for size in sizes if stage.seq_len % size and size < stage.seq_len):
        near = [n for n in range(1, stage.seq_len + 1) if stage.seq_len % n == 0]
        below, above = max(n for n in near if n < size), min(n for n in near if n > size)
        lines.append(
            f"{stage.name}: blocks of {size} do not divide the length of {length}; the last block has "
            f"{stage.seq_len % size} tokens ({below} or {above} would divide it)"
        )
    if stage.num_steps < FEW_STEPS:
        plural = "" if stage.num_steps == 1 else "s"
        batch = f"{format_length(stage.batch_tokens)} tokens"
        lines.append(f"{stage.name}: only {stage.num_steps} step{plural} of {batch}")
    return lines


def unfilled(asked: int | None, schedule: Schedule) -> list[str]:
    """The warning that the stages do not use up the budget of `asked` tokens."""
    total = schedule.total_tokens
    if asked is None or total >= asked:
        return []
    left = f"{(asked - total) / asked:.0%}"
    return [f"the stages take {format_tokens(total)} of schedule.tokens={format_tokens(asked)}; {left} is not used"]


def _mixture_warnings(config: RunConfig, schedule: Schedule, sources: Mapping[str, Source]) -> list[str]:
    """Warnings about stages of few documents, whose shares come out far from those asked for. Simulates the run's own
    draws, except for pieces carried over between stages."""
    if not set(config.data.sources) <= set(sources):
        return []
    assert config.data.seed is not None
    mixture, lines = Mixture({name: source.lengths for name, source in sources.items()}, config.data.seed), []
    for stage in schedule.stages:
        used = inputs_used(sources, stage.seq_len)
        if any(stage.mix.get(name, 0) > 0 and not counts.any() for name, counts in used.items()):
            return lines  # which training refuses
        mixture.set_mix(stage.mix, stage.long_documents, used)
        got, draws = dict.fromkeys(stage.mix, 0), 0
        while sum(got.values()) < stage.tokens and draws < MOST_DRAWS:
            window = mixture.draw()
            got[window.source] += int(used[window.source][window.document])
            draws += 1
        if draws == MOST_DRAWS:
            return lines
        total = sum(got.values())
        if any(abs(got[name] / total - share) > FAR_OFF for name, share in stage.mix.items()):
            shares = ", ".join(
                f"{name} {got[name] / total:.0%} instead of {share:.0%}" for name, share in stage.mix.items()
            )
            lines.append(
                f"{stage.name}: the shares of its {draws} documents differ from those asked for: {shares}. A larger "
                "budget or shorter documents would bring them closer"
            )
    return lines


def inputs_used(sources: Mapping[str, Source], seq_len: int) -> dict[str, np.ndarray]:
    """Inputs of each document that training at this length uses, int64 [num_documents] per source."""
    return {
        name: source.usable_inputs(seq_len) if source.is_chat else source.lengths - 1
        for name, source in sources.items()
    }
