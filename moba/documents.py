"""Documents: where the documents of a pack begin and end, and all that attention derives from it, made once per pack.

Bounds lie on the device; lengths and their maxima lie on the host, so that nobody has to ask the device for them. The
block layout of a block size, which every layer of that size needs in both passes, is made when it is first asked for
and kept.

Shapes: T queries, S keys, N documents, M block slots.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from moba.checks import check_documents

if TYPE_CHECKING:
    from moba.backends.triton_lists import Layout
    from moba.routing import BlockLayout

T = TypeVar("T")


class Documents:
    """The documents of a pack of T queries and S keys, or the pieces of documents that a process holds.

    Create it with `from_lengths`, or with `from_bounds` if only `cu_seqlens` is available.
    """

    def __init__(
        self,
        cu_seqlens: Tensor,
        cu_seqlens_k: Tensor | None,
        num_queries: int,
        num_keys: int,
        lengths: tuple[int, ...] | None,
        lengths_k: tuple[int, ...] | None,
        starts: tuple[int, ...] | None = None,
    ):
        """See the attributes; `lengths` are None where they are not known on the host."""
        self.cu_seqlens = cu_seqlens
        """int32 [N+1], on the device: document i has the queries [cu_seqlens[i], cu_seqlens[i+1])."""
        self.cu_seqlens_k = cu_seqlens_k
        """The same of the keys; None: as the queries."""
        self.num_queries, self.num_keys = num_queries, num_keys
        self.lengths, self.lengths_k = lengths, lengths_k
        """Queries, and keys, of each document."""
        self.starts = starts
        """Where each piece begins: position of its first query among the keys of its document; None: queries are the
        last of their document's keys."""
        self._made: dict[tuple[str, int], Any] = {}

    @classmethod
    def from_lengths(
        cls,
        lengths: Sequence[int],
        lengths_k: Sequence[int] | None = None,
        starts: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> Documents:
        """Returns Documents from the number of queries of each, and of keys where it differs, without waiting for the
        device.

        `starts`: position of each piece's first query among its document's keys; None: queries come last.
        """
        own, keys = tuple(lengths), None if lengths_k is None else tuple(lengths_k)
        assert keys is None or len(keys) == len(own), (len(own), len(keys or ()))
        if keys == own and starts is None:
            keys = None
        total, total_k = sum(own), sum(own if keys is None else keys)
        bounds_k = None if keys is None else _bounds_of(keys, device)
        kept = None if starts is None else tuple(starts)
        return cls(_bounds_of(own, device), bounds_k, total, total_k, own, own if keys is None else keys, kept)

    @classmethod
    def from_bounds(
        cls,
        cu_seqlens: Tensor | None,
        cu_seqlens_k: Tensor | None,
        num_queries: int,
        num_keys: int,
        device: torch.device,
    ) -> Documents:
        """Returns Documents from bounds, int32 [N+1]; None is one document. Lengths are known only if the bounds are on
        the host.

        Raises ValueError for bounds that do not fit, as far as they can be read without waiting for a device.
        """
        check_documents(cu_seqlens, cu_seqlens_k, num_queries, num_keys)
        if cu_seqlens is None:
            return one_document(num_queries, num_keys, device)
        lengths = _lengths_of(cu_seqlens, num_queries)
        if cu_seqlens_k is cu_seqlens:
            cu_seqlens_k = None
        lengths_k = lengths if cu_seqlens_k is None else _lengths_of(cu_seqlens_k, num_keys)
        if cu_seqlens_k is not None and lengths is not None and lengths == lengths_k:
            cu_seqlens_k = None
        bounds, bounds_k = (
            None if bounds is None else bounds.to(device, non_blocking=True) for bounds in (cu_seqlens, cu_seqlens_k)
        )
        assert bounds is not None
        return cls(bounds, bounds_k, num_queries, num_keys, lengths, lengths_k)

    def __repr__(self) -> str:
        return f"Documents({self.number}: {self.num_queries} queries, {self.num_keys} keys, on {self.device})"

    def to(self, device: torch.device | str) -> Documents:
        """The same documents with their bounds on `device`; lengths stay on the host."""
        if self.device == torch.device(device):
            return self
        bounds = self.cu_seqlens.to(device, non_blocking=True)
        bounds_k = None if self.cu_seqlens_k is None else self.cu_seqlens_k.to(device, non_blocking=True)
        sizes = (self.num_queries, self.num_keys, self.lengths, self.lengths_k, self.starts)
        return Documents(bounds, bounds_k, *sizes)

    def pin(self) -> Documents:
        """The same documents with their bounds in pinned host memory."""
        bounds_k = None if self.cu_seqlens_k is None else self.cu_seqlens_k.pin_memory()
        sizes = (self.num_queries, self.num_keys, self.lengths, self.lengths_k, self.starts)
        return Documents(self.cu_seqlens.pin_memory(), bounds_k, *sizes)

    @property
    def key_bounds(self) -> Tensor:
        """Where each document's keys begin and the last one's end, int32 [N+1]."""
        return self.cu_seqlens if self.cu_seqlens_k is None else self.cu_seqlens_k

    @property
    def device(self) -> torch.device:
        """Where the bounds lie."""
        return self.cu_seqlens.device

    @property
    def number(self) -> int:
        """Documents, N, empty ones included."""
        return self.cu_seqlens.numel() - 1

    @property
    def bounds(self) -> dict[str, Tensor | None]:
        """cu_seqlens and cu_seqlens_k, as the public functions take them."""
        return {"cu_seqlens": self.cu_seqlens, "cu_seqlens_k": self.cu_seqlens_k}

    @property
    def longest(self) -> int:
        """Queries of the document that has most; where lengths are not known, all there are."""
        return self.num_queries if self.lengths is None else max(self.lengths, default=0)

    @property
    def longest_k(self) -> int:
        """Keys of the document that has most; where lengths are not known, all there are."""
        return self.num_keys if self.lengths_k is None else max(self.lengths_k, default=0)

    @property
    def ends_with_queries(self) -> bool:
        """True if queries are the last of their document's keys."""
        return self.starts is None

    def host_lengths(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Queries and keys of each document; waits for the device where they are not known yet, once."""
        if self.lengths is None:
            self.lengths = tuple(self.cu_seqlens.diff().tolist())
        if self.lengths_k is None:
            bounds_k = self.cu_seqlens_k
            self.lengths_k = self.lengths if bounds_k is None else tuple(bounds_k.diff().tolist())
        return self.lengths, self.lengths_k

    def first_positions(self) -> Tensor:
        """int64 [N], on the device: position of each document's first query among its keys."""
        if self.starts is not None:
            return torch.tensor(self.starts, dtype=torch.int64, device=self.device)
        if self.cu_seqlens_k is None:
            return torch.zeros(self.number, dtype=torch.int64, device=self.device)
        return self.cu_seqlens_k.long().diff() - self.cu_seqlens.long().diff()

    # -------------------- made once, when first asked for

    def layout(self, block_size: int) -> BlockLayout:
        """The blocks of the pack, for torch code (moba/routing.py)."""
        from moba.routing import BlockLayout

        return self._once("layout", block_size, lambda: BlockLayout.build(block_size, self))

    def kernel_layout(self, block_size: int) -> Layout:
        """The blocks of the pack, for the Triton kernels; two small launches."""
        from moba.backends.triton_lists import build_layout

        return self._once("kernel", block_size, lambda: build_layout(self, block_size))

    def stretch(self, start: int, stop: int) -> tuple[slice, Documents]:
        """(which keys of the pack, the documents of the queries [start, stop), each with its keys up to the last of
        these), of a pack whose queries are all its keys: so queries are the last of their document's keys again."""
        assert self.cu_seqlens_k is None and self.starts is None, self

        def make() -> tuple[slice, Documents]:
            lengths, lengths_k, first_key = [], [], stop
            ends = accumulate(self.host_lengths()[0])
            for length, end in zip(self.host_lengths()[0], ends):
                begin, last = end - length, min(end, stop)
                if max(begin, start) < last:
                    first_key = min(first_key, begin)
                    lengths.append(last - max(begin, start))
                    lengths_k.append(last - begin)
            return slice(first_key, stop), Documents.from_lengths(lengths, lengths_k, device=self.device)

        return self._once(f"stretch from {start}", stop, make)

    def offsets(self) -> Tensor:
        """int64 [T], on the device: tokens of the own document before each token, of those the pack holds."""

        def make() -> Tensor:
            bounds = self.cu_seqlens.long()
            token_T = torch.arange(self.num_queries, device=self.device)
            return token_T - bounds[torch.searchsorted(bounds, token_T, right=True) - 1]

        return self._once("offsets", 0, make)

    def _once(self, what: str, size: int, make: Callable[[], T]) -> T:
        if (what, size) not in self._made:
            with torch.inference_mode(False):  # what is kept may serve a backward pass later
                self._made[what, size] = make()
        return self._made[what, size]


@functools.lru_cache(maxsize=16)
def one_document(num_queries: int, num_keys: int, device: torch.device) -> Documents:
    """One document, whose queries are its last tokens; layers and steps that ask for the same share one."""
    return Documents.from_lengths([num_queries], [num_keys], device=device)


@functools.lru_cache(maxsize=16)
def last_tokens(lengths: tuple[int, ...], lengths_k: tuple[int, ...], device: torch.device) -> Documents:
    """The last tokens of some documents, so many of so many each; layers that ask for the same share them."""
    return Documents.from_lengths(lengths, lengths_k, device=device)


def _bounds_of(lengths: Sequence[int], device: torch.device | str) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)


def _lengths_of(bounds: Tensor, total: int) -> tuple[int, ...] | None:
    """Lengths of bounds that lie on the host, or that are those of one document; else None."""
    if bounds.numel() == 2:
        return (total,)
    return tuple(bounds.diff().tolist()) if bounds.device.type == "cpu" else None
