"""The staged schedule as pure data, and two pure functions of the tokens seen: which stage, and which learning rate.

Progress is counted in tokens only, so that batch size, number of processes and length can change without moving it. A
stage covers [start, end): at tokens_seen == end the next one begins. No torch.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from conf.rates import RATES
from conf.schema import AttentionConfig, LongDocumentsConfig, LRConfig, RopeConfig, RunConfig
from moba.kinds import KINDS, AttentionSpec, Full, from_entry
from train.model.sizes import layer_letters


@dataclass(frozen=True)
class Stage:
    """One stage of training: everything that may change between stages, resolved."""

    name: str
    index: int
    start: int
    """Tokens seen when it begins."""
    end: int
    """Tokens seen when the next one begins; end - start is a multiple of batch_tokens."""
    seq_len: int
    batch_tokens: int
    """Tokens of one optimizer step over all ranks."""
    micro_tokens: int
    """Tokens a rank processes at a time."""
    attention: tuple[AttentionSpec, ...]
    """One spec per layer."""
    rope: RopeConfig
    mix: dict[str, float]
    """Source name -> share of tokens; sums to 1."""
    long_documents: LongDocumentsConfig | None
    """The share from long documents, its length filled in; None = as they come."""
    lr: LRConfig
    """The learning-rate schedule: the stage's own or the run's."""
    lr_before: int
    """Tokens of `lr_span` that lie before this stage."""
    lr_span: int
    """Tokens that `lr` covers, from warm-up to its end."""
    reset_optimizer: bool
    """The moments and the step count are reset at its start."""

    @property
    def tokens(self) -> int:
        """Tokens of this stage."""
        return self.end - self.start

    @property
    def num_steps(self) -> int:
        """Optimizer steps of this stage."""
        return self.tokens // self.batch_tokens


@dataclass(frozen=True)
class Schedule:
    """All stages, in order and without gaps."""

    stages: tuple[Stage, ...]

    @property
    def total_tokens(self) -> int:
        """Tokens of the run."""
        return self.stages[-1].end

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return sum(stage.num_steps for stage in self.stages)

    def lookup(self, tokens_seen: int) -> Stage:
        """The stage of the step that begins after `tokens_seen` tokens, 0 <= tokens_seen < total_tokens."""
        assert 0 <= tokens_seen < self.total_tokens, (tokens_seen, self.total_tokens)
        return self.stages[bisect_right([stage.start for stage in self.stages], tokens_seen) - 1]

    def learning_rate(self, tokens_seen: int) -> float:
        """The learning rate of the step that begins after `tokens_seen` tokens.

        It is the schedule's value at that step's end: the first step of a warm-up is not wasted at a learning rate of
        0, and the last step of a decay has the final one.
        """
        stage = self.lookup(tokens_seen)
        return lr_at(stage.lr, stage.lr_before + tokens_seen - stage.start + stage.batch_tokens, stage.lr_span)


def lr_at(lr: LRConfig, tokens: float, span: int) -> float:
    """The value of `lr` after `tokens` of the `span` tokens it covers: continuous, 0 at 0 where there is a warm-up.

    Warm-up is linear from 0 to the peak; then its kind decides (conf/rates.py).
    """
    if tokens < lr.warmup_tokens:
        return lr.peak * tokens / lr.warmup_tokens
    return lr.peak * RATES[lr.kind].ratio(lr, tokens - lr.warmup_tokens, span - lr.warmup_tokens)


def layer_plan(attention: AttentionConfig, num_layers: int) -> tuple[AttentionSpec, ...]:
    """The spec of each layer. `attention` is frozen: its options are filled in, or it has a plan."""
    if attention.plan is not None:
        return tuple(from_entry(entry).on(attention.backend) for entry in attention.plan)

    def spec(kind: type[AttentionSpec]) -> AttentionSpec:
        return kind.from_options(attention.options, attention.backend)

    main = spec(KINDS[attention.kind])
    if attention.pattern is None:
        return (main,) * (num_layers - attention.full_last) + (spec(Full),) * attention.full_last
    letters = layer_letters(attention.pattern, num_layers)
    specs = {kind.letter: spec(kind) for kind in KINDS.values() if kind.letter in letters}
    return tuple(specs[letter] for letter in letters)


def build_schedule(config: RunConfig) -> Schedule:
    """The schedule of a frozen configuration."""
    weights = {name: source.weight for name, source in config.data.sources.items()}
    shared_span = sum(stage.tokens for stage in config.schedule.stages.values() if stage.lr is None)
    stages, start, shared_before = [], 0, 0
    for index, (name, stage) in enumerate(config.schedule.stages.items()):
        own = stage.lr is not None
        stages.append(
            Stage(
                name=name,
                index=index,
                start=start,
                end=start + stage.tokens,
                seq_len=stage.seq_len,
                batch_tokens=stage.batch_tokens,
                micro_tokens=stage.micro_tokens or stage.seq_len,
                attention=layer_plan(stage.attention, config.model.num_layers),
                rope=stage.rope,
                mix=_normalised(weights if stage.mix is None else stage.mix),
                long_documents=stage.long_documents,
                lr=stage.own_lr or config.optim.lr,
                lr_before=0 if own else shared_before,
                lr_span=stage.tokens if own else shared_span,
                reset_optimizer=stage.reset_optimizer,
            )
        )
        start += stage.tokens
        shared_before += 0 if own else stage.tokens
    return Schedule(tuple(stages))


def last_sparse(stages: Sequence[Stage]) -> tuple[AttentionSpec, ...] | None:
    """The attention of the last of these stages in which a layer has MoBA, or another kind that replaces full
    attention; None if none has."""
    plans = (stage.attention for stage in reversed(stages))
    return next((plan for plan in plans if any(spec.replaces_full for spec in plan)), None)


def _normalised(shares: dict[str, float]) -> dict[str, float]:
    total = sum(shares.values())
    return {name: share / total for name, share in shares.items() if share > 0}
