"""Held-out documents for the loss by position: one document a batch, from its beginning.

Two cohorts, never mixed. "fixed": every document is long enough for the whole length, so each position averages the
same documents and the curve shows what context does, not which documents are long. "available" (MoBA paper, appendix
A.1): every document counts in the buckets that it fills, so more documents are used, and which ones changes with the
position.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import overload

import numpy as np

from data.errors import DataError
from data.packing import Batch, Window, make_batch
from data.sources import Source

COHORTS = ("fixed", "available")


class HeldOut(Sequence[tuple[str, Batch]]):
    """(document id, Batch) pairs; the tokens are read when an item is asked for, so ranks may share them out by
    index."""

    def __init__(self, source: Source, seq_len: int, documents: Sequence[int], lengths: Sequence[int]):
        """lengths: predictions of each document, from its start."""
        self._source, self.seq_len = source, seq_len
        self._documents, self._lengths = list(documents), list(lengths)
        names = source.ids
        self.ids = [names[d] for d in self._documents]

    def __len__(self) -> int:
        return len(self._documents)

    @overload
    def __getitem__(self, index: int) -> tuple[str, Batch]: ...

    @overload
    def __getitem__(self, index: slice) -> list[tuple[str, Batch]]: ...

    def __getitem__(self, index: int | slice) -> tuple[str, Batch] | list[tuple[str, Batch]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = (self._documents[index], 0, self._lengths[index])
        window = Window(self._source.name, *place)
        return self.ids[index], make_batch(
            [window], lambda _: self._source.window(*place), lambda _: self._source.supervised(*place)
        )


def held_out_documents(source: Source, seq_len: int, limit: int, edges: np.ndarray | None = None) -> HeldOut:
    """Up to `limit` documents of at least seq_len + 1 tokens, each cut to its first seq_len + 1: seq_len predictions.

    With `edges` (int64 [B + 1], of buckets from 0 to seq_len) the available cohort: up to `limit` documents that fill
    the first bucket, each cut to the last bucket that it fills.

    Where there are more, the choice goes by a hash of the id: a fixed sample of the whole source, and mostly the same
    documents at every length. Of conversations those count, in either cohort, that training at this length would use
    (data/sft.py); shorter ones are padded: the loss late in the context is that of the answers which stand there.
    Raises DataError if there is no document.
    """
    shortest = seq_len if edges is None else int(edges[1])
    usable = source.usable_inputs(seq_len) > 0 if source.is_chat else source.lengths > shortest
    long_enough = np.flatnonzero(usable).tolist()
    if source.is_chat and not long_enough:
        raise DataError(
            f"validation: none of {source.num_documents} conversations has an answer within the first {seq_len:,} "
            "tokens; set eval.seq_len higher"
        )
    if not long_enough:
        raise DataError(
            f"validation: 0 of {source.num_documents} documents have the {shortest + 1:,} tokens that an evaluation at "
            f"length {seq_len:,} "
            f"needs; the longest has {int(source.lengths.max()):,}. Set eval.seq_len lower, or give data.validation "
            "longer documents"
        )
    names = source.ids
    by_hash = sorted(long_enough, key=lambda d: hashlib.sha256(names[d].encode()).digest())
    chosen = sorted(by_hash[:limit])
    if source.is_chat:
        return HeldOut(source, seq_len, chosen, [seq_len] * len(chosen))
    stops = np.array([0, seq_len]) if edges is None else edges
    filled = np.searchsorted(stops, source.lengths[chosen] - 1, side="right") - 1
    return HeldOut(source, seq_len, chosen, stops[filled].tolist())
