"""What every evaluation gets: the model, its device, and this process's share of the work.

The same for an eval of a finished run (launch/evaluate.py) and for the evaluations during training (launch/observe.py),
so that a measurement written for one serves the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from moba.documents import Documents
from train.model.decoder import Decoder

LossFn = Callable[[Tensor, Tensor, Documents, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Context:
    """A model to be measured, by one process or by several that share the work."""

    model: Decoder
    """With its current attention plan. An evaluation that swaps the plan restores it."""
    device: torch.device | str
    engine: LossFn | None = None
    """In training the engine: only its forward pass gathers sharded weights."""
    rank: int = 0
    world_size: int = 1
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor
    """Sums a tensor over the processes."""
    cluster_of: Callable[[str], str] = str
    """From a document's id to its cluster (clusters_by)."""
    bars: bool = False
    """Whether loops show progress bars: on rank 0 and a terminal."""

    @property
    def loss_fn(self) -> LossFn:
        """(tokens, positions, documents, labels) -> float `[T]` losses."""
        return self.model if self.engine is None else self.engine

    def share(self, count: int, what: str) -> Iterator[tuple[int, bool]]:
        """(index, whether it counts) of this process's share of `count` items, every world_size-th.

        All processes get the same number, as sharded parameters need: a process with one fewer repeats the first, which
        does not count. `what` names the progress bar.
        """
        for start in self.watch(range(0, count, self.world_size), what):
            index = start + self.rank
            yield (index, True) if index < count else (0, False)

    def watch(self, items: Iterable[Any], what: str) -> Iterable[Any]:
        """The items, in a progress bar."""
        return tqdm(items, desc=what, leave=False, disable=None) if self.bars and self.rank == 0 else items


def clusters_by(pattern: str | None) -> Callable[[str], str]:
    """From a document's id to its cluster: what the regular expression's first group, or all of it, matches at the
    beginning; the id where it does not match, and with None. ValueError for an invalid regular expression."""
    try:
        expression = None if pattern is None else re.compile(pattern)
    except re.error as error:
        raise ValueError(f"cluster={pattern}: not a regular expression ({error})") from error

    def cluster_of(document_id: str) -> str:
        found = None if expression is None else expression.match(document_id)
        return found[found.re.groups and 1] if found else document_id

    return cluster_of
