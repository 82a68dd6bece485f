"""Documents to packs of exactly L tokens, planned from lengths alone, and the Batch that a pack becomes.

A document of n tokens has n - 1 inputs, each labelled with the token after it. A window is a run of inputs of one
document that is attended within itself; its positions count from 0. A document longer than L gives windows that each
fill a pack, at once. What is left of it, and short documents, fill the open pack in order; a piece that does not fit is
cut at the pack's end, and its rest opens the next pack as a window of its own. So every pack is full, and every input
is used exactly once.

Shapes: T inputs in a batch, N windows in it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

IGNORED = -100


class Window(NamedTuple):
    """`length` inputs of a document from its input `start`; the label of the last is token start + length."""

    source: str
    document: int
    start: int
    length: int


@dataclass
class Batch:
    """One or more packs, end to end.

    tokens, labels, positions: int64 [T]; labels are already shifted, -100 = ignored; positions count within the window.
    cu_seqlens: int32 [N + 1], where each window starts, and T. windows: where each window came from (may be empty).
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    windows: Sequence[Window] = ()

    @property
    def lengths(self) -> list[int]:
        """Inputs of each window (reads cu_seqlens: ask before moving the batch to a GPU, or pay a synchronisation)."""
        return self.cu_seqlens.diff().tolist()

    def to(self, device) -> Batch:
        """The same batch with its tensors on `device`."""
        tensors = (self.tokens, self.labels, self.positions, self.cu_seqlens)
        return Batch(*(t.to(device, non_blocking=True) for t in tensors), windows=self.windows)


class Packer:
    """Turns a stream of whole documents into packs of `seq_len` inputs.

    draw() gives the next document as a Window over all its inputs. Between packs the packer's only state is `pieces`,
    what was drawn and not yet put into a pack; a new packer, of any seq_len, given these pieces goes on without losing
    or repeating an input.
    """

    def __init__(self, seq_len: int, draw: Callable[[], Window], pieces: Sequence[Window] = ()):
        self.seq_len, self._draw = seq_len, draw
        self._waiting = deque(pieces)
        self._open: list[Window] = []
        self._free = seq_len  # inputs that the open pack still takes

    @property
    def pieces(self) -> list[Window]:
        """Windows drawn but not in a pack yet, in the order they are to be packed."""
        return self._open + list(self._waiting)

    def next_pack(self) -> list[Window]:
        """The windows of the next pack; their lengths sum to seq_len."""
        while True:
            piece = self._waiting.popleft() if self._waiting else self._draw()
            if piece.length >= self.seq_len:
                head, rest = _cut(piece, self.seq_len)
                self._waiting.extendleft([rest] if rest.length else [])
                return [head]
            if piece.length > 0 and (pack := self._add(piece)):
                return pack

    def _add(self, piece: Window) -> list[Window] | None:
        """Put a piece shorter than a pack into the open one; the open pack if that fills it."""
        head, rest = _cut(piece, min(piece.length, self._free))
        self._open.append(head)
        self._free -= head.length
        if self._free:
            return None
        pack, self._open = self._open, [rest] if rest.length else []
        self._free = self.seq_len - rest.length
        return pack


def _cut(window: Window, length: int) -> tuple[Window, Window]:
    source, document, start, total = window
    return Window(source, document, start, length), Window(source, document, start + length, total - length)


def make_batch(windows: Sequence[Window], fetch: Callable[[Window], np.ndarray]) -> Batch:
    """The batch of these windows. fetch(window) gives its length + 1 tokens: the inputs and the label of the last."""
    lengths = np.array([w.length for w in windows], dtype=np.int64)
    ends = np.cumsum(lengths)
    tokens, labels = np.empty((2, int(ends[-1])), dtype=np.int64)
    for window, end in zip(windows, ends):
        fetched = fetch(window)
        assert len(fetched) == window.length + 1, (window, len(fetched))
        tokens[end - window.length : end] = fetched[:-1]
        labels[end - window.length : end] = fetched[1:]
    positions = np.arange(len(tokens)) - np.repeat(ends - lengths, lengths)
    cu_seqlens = np.concatenate([[0], ends]).astype(np.int32)
    return Batch(*map(torch.from_numpy, (tokens, labels, positions, cu_seqlens)), windows=tuple(windows))
