"""Documents to packs of exactly L tokens, planned from lengths alone, and the Batch that a pack becomes.

A document of n tokens has n - 1 inputs, each labelled with the token after it. A window is a run of inputs of one
document that is attended within itself; its positions count from 0. A document longer than L gives windows that each
fill a pack. What is left of it, and short documents, fill the open pack in order; a piece that does not fit is cut at
the pack's end, and its rest opens the next pack as a window of its own. So every pack is full, and every input is used
exactly once.

A conversation (data/sft.py) is not cut: it goes whole into the fullest of a few open packs that has room for it. What
is left of a pack is padding behind its last window, a window of its own: token 0, no labels. A conversation longer than
L is used up to its input L alone, or not at all (data.sft.usable_inputs).

Shapes: T inputs in a batch, N windows in it.
"""

from __future__ import annotations

import zlib
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch

from moba.documents import Documents

IGNORED = -100
OPEN_PACKS = 4  # of conversations
AGE = (1 << 32) - 1  # the bits of a pack's place among those opened, behind the inputs it still takes


class Window(NamedTuple):
    """`length` inputs of a document from its input `start`; the label of the last is token start + length. Inputs
    behind the end of a conversation are padding."""

    source: str
    document: int
    start: int
    length: int


@dataclass
class Batch:
    """One or more packs, end to end.

    tokens, labels, positions: int64 [T]; labels are already shifted, -100 = ignored; positions count within the window.
    documents: the windows, as attention takes them. windows: where each window came from (may be empty).
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    documents: Documents
    windows: Sequence[Window] = ()

    @property
    def cu_seqlens(self) -> torch.Tensor:
        """int32 [N + 1]: where each window starts, and T."""
        return self.documents.cu_seqlens

    @property
    def lengths(self) -> tuple[int, ...]:
        """Inputs of each window."""
        return self.documents.host_lengths()[0]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        return self._with(lambda t: t.to(device, non_blocking=True), self.documents.to(device))

    def pin(self) -> Batch:
        """The same batch in pinned host memory, from where a GPU fetches it without the host waiting."""
        return self._with(torch.Tensor.pin_memory, self.documents.pin())

    def _with(self, moved: Callable[[torch.Tensor], torch.Tensor], documents: Documents) -> Batch:
        return Batch(moved(self.tokens), moved(self.labels), moved(self.positions), documents, self.windows)


class DocumentStream(Protocol):
    """The documents that a Packer packs, in order (data.mixture.Mixture)."""

    def draw(self) -> Window:
        """The next document: a Window over all its inputs."""
        ...

    def ahead(self, length: int, without: Collection[str]) -> np.ndarray:
        """The inputs of some documents to come, int64 [n]: up to the first that has `length` or is of a source in
        `without`, or fewer."""
        ...

    def ahead_of(self, used: Mapping[str, np.ndarray]) -> tuple[list[int], Callable[[int], Window]]:
        """What `used` says of some documents to come, up to the first that is of another source, or fewer; and what
        gives the i-th of them, whole. used: source -> int64, a number for each of its documents."""
        ...

    def skip(self, count: int) -> None:
        """Pass over `count` documents, of those that `ahead` or `ahead_of` gave."""
        ...


class Packer:
    """Turns a stream of whole documents into packs of `seq_len` inputs.

    Up to `interleave` documents of at least seq_len inputs are read side by side, a window of one of them at a time, so
    that the packs of a step do not all come from one book. Between packs the packer's only state is `pieces`, what was
    drawn and not yet put into a pack; a new packer, of any seq_len, given these pieces goes on without losing or
    repeating an input.
    """

    def __init__(
        self,
        seq_len: int,
        stream: DocumentStream,
        pieces: Sequence[Window] = (),
        interleave: int = 1,
        conversations: Mapping[str, np.ndarray] | None = None,
    ):
        """conversations: source name -> int64, the inputs used of each of its documents at this seq_len (0 = none);
        sources left out hold text."""
        assert seq_len >= 1 and interleave >= 1, (seq_len, interleave)
        self.seq_len, self.interleave, self._stream = seq_len, interleave, stream
        self.conversations = conversations or {}
        waits_long = [piece.length >= seq_len and piece.source not in self.conversations for piece in pieces]
        self._long = [_spelt(piece) for piece, is_long in zip(pieces, waits_long) if is_long]
        self._short = deque(piece for piece, is_long in zip(pieces, waits_long) if not is_long)
        self._open: list[Window] = []
        self._free = seq_len  # inputs that the open pack still takes
        self._bins: list[_Bin] = []
        self._placed = 0

    @property
    def pieces(self) -> list[Window]:
        """Windows drawn but not in a pack yet. Conversations stand in the order of their draws: put into empty packs
        in this order, they fall as they fell, since those in packs that are gone took no other's place."""
        placed = sorted(one for pack in self._bins for one in pack.windows)
        return [*self._open, *(window for _, window in placed), *self._short, *(piece for piece, _ in self._long)]

    def next_pack(self) -> list[Window]:
        """The windows of the next pack; their lengths sum to seq_len."""
        while self._short or len(self._long) < self.interleave:
            piece = self._short.popleft() if self._short else self._stream.draw()
            if piece.source in self.conversations:
                if pack := self._add_conversation(piece):
                    return pack
            elif piece.length >= self.seq_len:
                self._long.append(_spelt(piece))
            elif piece.length > 0 and (pack := self._add(piece)):
                return pack
        place = self._choose()
        head, rest = _cut(self._long[place][0], self.seq_len)
        if rest.length >= self.seq_len:
            self._long[place] = _spelt(rest)
        else:
            del self._long[place]
            self._short.append(rest)
        return [head]

    def skip(self, count: int) -> None:
        """Go on as after `count` calls of next_pack. Packs of texts that are all shorter than one are counted, not
        made; of conversations, it is worked out which pack takes each, and no more."""
        while count > 0:
            passed = self._skip_texts(count) or self._skip_conversations(count)
            if passed is None:
                self.next_pack()
            count -= 1 if passed is None else passed

    def _skip_texts(self, most: int) -> int:
        """Pass over up to `most` packs that come next and are filled by short texts alone; returns how many."""
        if self._short or len(self._long) >= self.interleave:
            return 0
        ends = self.seq_len - self._free + np.cumsum(self._stream.ahead(self.seq_len, self.conversations))
        passed = min(most, int(ends[-1]) // self.seq_len) if len(ends) else 0
        if passed:
            last = int(np.searchsorted(ends, passed * self.seq_len))  # the text that fills the last of them
            self._stream.skip(last)
            piece, over = self._stream.draw(), int(ends[last]) - passed * self.seq_len
            self._begin(_cut(piece, piece.length - over)[1])
        return passed

    def _skip_conversations(self, most: int) -> int | None:
        """Put away some conversations that come next, as _add_conversation does, until `most` packs are full or give
        way; returns how many did, None if no conversation comes next."""
        if not self.conversations or self._short or len(self._long) >= self.interleave:
            return None
        coming, window = self._stream.ahead_of(self.conversations)
        if not coming:
            return None
        takes: dict[int, list[int]] = {age: [] for age in range(len(self._bins))}  # of the packs that are open
        order = sorted(pack.free << 32 | age for age, pack in enumerate(self._bins))  # the fullest first, then by age
        whole, age, passed, looked = self.seq_len << 32, len(takes), 0, 0
        for used in coming:
            looked += 1
            if used == 0:
                continue
            place = bisect_left(order, used << 32)
            opens = place == len(order)
            if opens:
                key, takes[age] = whole | age, []
                age += 1
            else:
                key = order.pop(place)
            key -= used << 32
            takes[key & AGE].append(looked - 1)
            if key > AGE:
                insort(order, key)
                if not opens or len(order) <= OPEN_PACKS:
                    continue
                key = order.pop(0) if order[0] != key else order.pop(1)
            del takes[key & AGE]
            passed += 1
            if passed == most:
                break
        free = {key & AGE: key >> 32 for key in order}
        packs = []
        for age, places in takes.items():
            pack = self._bins[age] if age < len(self._bins) else _Bin(self.seq_len)
            pack.windows += [(self._placed + place, window(place)) for place in places]
            pack.free = free[age]
            packs.append(pack)
        self._bins = packs
        self._placed += looked
        self._stream.skip(looked)
        return passed

    def _begin(self, rest: Window) -> None:
        """Open a pack with what is left of the piece that filled the one before."""
        self._open = [rest] if rest.length else []
        self._free = self.seq_len - rest.length

    def _choose(self) -> int:
        """Which long document gives the next window: a hash of where they all stand, so that it needs no state, and
        documents that were begun together do not end together."""
        return zlib.crc32(f"[{', '.join(text for _, text in self._long)}]".encode()) % len(self._long)

    def _add(self, piece: Window) -> list[Window] | None:
        """Put a piece shorter than a pack into the open one; the open pack if that fills it."""
        head, rest = _cut(piece, min(piece.length, self._free))
        self._open.append(head)
        self._free -= head.length
        if self._free:
            return None
        pack = self._open
        self._begin(rest)
        return pack

    def _add_conversation(self, whole: Window) -> list[Window] | None:
        """Put a conversation into the fullest pack that has room; a pack that is full, or has to give way to it."""
        used = self.conversations[whole.source].item(whole.document)
        if used == 0:
            return None
        pack, leaves = None, None
        for one in self._bins:
            if one.free >= used and (pack is None or one.free < pack.free):
                pack = one
        if pack is None:
            if len(self._bins) == OPEN_PACKS:
                leaves = min(self._bins, key=lambda pack: pack.free)
            pack = _Bin(self.seq_len)
            self._bins.append(pack)
        pack.windows.append((self._placed, whole))
        pack.free -= used
        self._placed += 1
        leaves = pack if pack.free == 0 else leaves
        return None if leaves is None else self._close(leaves)

    def _close(self, pack: _Bin) -> list[Window]:
        """The windows of a pack that is not to take more, the padding behind the last as a window of its own: it is no
        context of anything."""
        self._bins.remove(pack)
        used = [int(self.conversations[window.source][window.document]) for _, window in pack.windows]
        windows = [window._replace(length=length) for (_, window), length in zip(pack.windows, used)]
        last = windows[-1]
        padding = [Window(last.source, last.document, last.start + last.length, pack.free)] if pack.free else []
        return windows + padding


@dataclass(eq=False)
class _Bin:
    """An open pack of conversations: its windows, each with its place in the order of draws, and the inputs it still
    takes."""

    free: int
    windows: list[tuple[int, Window]] = field(default_factory=list)


def _spelt(window: Window) -> tuple[Window, str]:
    """A long document with its part of the text that `_choose` hashes, which is written once and read many times."""
    return window, repr(tuple(window))


def _cut(window: Window, length: int) -> tuple[Window, Window]:
    source, document, start, total = window
    return Window(source, document, start, length), Window(source, document, start + length, total - length)


def make_batch(
    windows: Sequence[Window],
    fetch: Callable[[Window], np.ndarray],
    supervised: Callable[[Window], np.ndarray | None] = lambda window: None,
) -> Batch:
    """The batch of these windows. fetch(window) gives its length + 1 tokens: the inputs and the label of the last.
    supervised(window) says which of them are supervised (bool; None = all); where it does, both may stop at the
    padding."""
    lengths = np.array([w.length for w in windows], dtype=np.int64)
    ends = np.cumsum(lengths)
    tokens = np.zeros(int(ends[-1]), dtype=np.int64)
    labels = np.full(int(ends[-1]), IGNORED, dtype=np.int64)
    for window, end in zip(windows, ends):
        fetched, mask = fetch(window), supervised(window)
        first, last = end - window.length, end - window.length + len(fetched) - 1
        assert last == end if mask is None else last <= end and len(mask) == len(fetched), (window, len(fetched))
        tokens[first:last] = fetched[:-1]
        labels[first:last] = fetched[1:]
        if mask is not None:
            labels[first:last][~mask[1:]] = IGNORED
    positions = np.arange(len(tokens)) - np.repeat(ends - lengths, lengths)
    documents = Documents.from_lengths(lengths.tolist())
    whole = (torch.from_numpy(tokens), torch.from_numpy(labels), torch.from_numpy(positions))
    return Batch(*whole, documents, windows=tuple(windows))
