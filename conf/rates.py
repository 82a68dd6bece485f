"""Kinds of learning rate: what each does between its warm-up and its end, the options of its own, and their checks.

A kind is a function of the tokens seen and an entry in RATES (docs/extending.md). No torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from conf.numbers import format_tokens
from moba.kinds import BadOption, Option

if TYPE_CHECKING:
    from conf.schema import LRConfig


def no_problem(lr: LRConfig, span: int) -> Iterator[BadOption]:
    """The check of a kind that takes any options."""
    yield from ()


class Rate(NamedTuple):
    """One kind."""

    ratio: Callable[[LRConfig, float, float], float]
    """ratio(lr, tokens, span): the learning rate over its peak, `tokens` after the warm-up, where `span` tokens follow
    it in all: from 1 at 0 tokens, where the warm-up ends, to lr.min_ratio at `span`."""
    options: Mapping[str, Option] = {}
    """Settings of the kind's own, beside `peak` and the others (optim.lr.<name>, and of a stage's lr); two kinds may
    share one."""
    check: Callable[[LRConfig, int], Iterator[BadOption]] = no_problem
    """check(lr, span): what is wrong with the options, where the learning rate spans so many tokens, its warm-up
    included."""
    is_constant: bool = False
    """Never falls, so that min_ratio says nothing."""


def falling(lr: LRConfig, left: float, over: float, shape: Callable[[float], float]) -> float:
    """From 1 to min_ratio over the last `over` tokens, `left` of which are to come. shape: from 1 at 0 to 0 at 1."""
    if over == 0:
        return 1.0
    fallen = min(1.0, max(0.0, 1 - left / over))
    return lr.min_ratio + (1 - lr.min_ratio) * shape(fallen)


def _straight(fallen: float) -> float:
    return 1 - fallen


def _cosine(lr: LRConfig, tokens: float, span: float) -> float:
    return falling(lr, span - tokens, span, lambda fallen: 0.5 * (1 + math.cos(math.pi * fallen)))


def _linear(lr: LRConfig, tokens: float, span: float) -> float:
    return falling(lr, span - tokens, span, _straight)


def _wsd(lr: LRConfig, tokens: float, span: float) -> float:
    return falling(lr, span - tokens, lr.options["decay_tokens"], _straight)


def _check_wsd(lr: LRConfig, span: int) -> Iterator[BadOption]:
    decay = lr.options["decay_tokens"]
    if decay is not None and lr.warmup_tokens + decay > span:
        hint = (
            f"together with warmup_tokens={format_tokens(lr.warmup_tokens)} exceeds the {format_tokens(span)} tokens"
            f" this learning rate spans; use {format_tokens(span - lr.warmup_tokens)} at most"
        )
        yield BadOption("decay_tokens", format_tokens(decay), hint)


RATES: dict[str, Rate] = {
    "cosine": Rate(_cosine),
    "wsd": Rate(
        _wsd,
        {"decay_tokens": Option(int, "Tokens of the final, linear decay.", default="10%", is_share=True)},
        _check_wsd,
    ),
    "linear": Rate(_linear),
    "constant": Rate(lambda lr, tokens, span: 1.0, is_constant=True),
}


def all_rate_options() -> dict[str, Option]:
    """Every option of every kind, by name."""
    return {name: option for rate in RATES.values() for name, option in rate.options.items()}
