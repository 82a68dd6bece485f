"""Kinds of attention: one file each, and the table of those that are known. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moba.kinds.base import BACKENDS, AttentionSpec, Backend, BadOption, Option, QueryShape, Routing
from moba.kinds.full import Full
from moba.kinds.moba import GATES, Moba
from moba.kinds.sliding import Sliding

__all__ = [
    "BACKENDS",
    "GATES",
    "KINDS",
    "AttentionSpec",
    "Backend",
    "BadOption",
    "Full",
    "Moba",
    "Option",
    "QueryShape",
    "Routing",
    "Sliding",
    "all_options",
    "from_entry",
    "stage_kinds",
]

KINDS: dict[str, type[AttentionSpec]] = {kind.name: kind for kind in (Moba, Full, Sliding)}


def stage_kinds() -> tuple[str, ...]:
    """The names that attention.kind can have."""
    return tuple(name for name, kind in KINDS.items() if kind.is_stage_kind)


def all_options() -> dict[str, Option]:
    """Every option of every kind, by name."""
    return {name: option for kind in KINDS.values() for name, option in kind.options.items()}


def from_entry(entry: Sequence[Any]) -> AttentionSpec:
    """The attention that an entry [kind, block_size, top_k] of a config.json's plan stands for, of MoBA perhaps with
    first_blocks behind; ValueError for none."""
    if len(entry) not in (3, 4):
        raise ValueError("needs [kind, block_size, top_k], or [kind, block_size, top_k, first_blocks]")
    name, *sizes = entry
    if name not in KINDS:
        raise ValueError(f"kind={name!r}: choose one of {', '.join(KINDS)}")
    return KINDS[name].from_entry(sizes)
