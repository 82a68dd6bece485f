"""Held-out documents for the loss by position: one document a batch, from its beginning, all of the same length.

This is the "fixed" cohort: every document is long enough for the whole length, so each position averages the same
documents and the curve shows what context does, not which documents are long.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from data.errors import DataError
from data.packing import Batch, Window, make_batch
from data.sources import Source

COHORT = "fixed"


class HeldOut(Sequence):
    """(document id, Batch) pairs; the tokens are read when an item is asked for, so ranks may share them out by
    index."""

    def __init__(self, source: Source, seq_len: int, documents: Sequence[int]):
        self._source, self.seq_len, self._documents = source, seq_len, list(documents)
        names = source.ids
        self.ids = [names[d] for d in self._documents]

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> tuple[str, Batch]:
        document = self._documents[index]
        window = Window(self._source.name, document, 0, self.seq_len)
        return self.ids[index], make_batch([window], lambda w: self._source.tokens(w.document, 0, w.length + 1))


def held_out_documents(source: Source, seq_len: int, limit: int) -> HeldOut:
    """Up to `limit` documents of at least seq_len + 1 tokens, each cut to its first seq_len + 1: seq_len predictions.

    Where there are more, the choice goes by a hash of the id: a fixed sample of the whole source, and mostly the same
    documents at every length. Raises DataError if no document is long enough.
    """
    long_enough = np.flatnonzero(source.lengths > seq_len).tolist()
    if not long_enough:
        raise DataError(
            f"validation: 0 of {source.num_documents} documents have the {seq_len + 1:,} tokens that an evaluation at "
            f"length {seq_len:,} "
            f"needs; the longest has {int(source.lengths.max()):,}. Set eval.seq_len lower, or give data.validation "
            "longer documents"
        )
    names = source.ids
    by_hash = sorted(long_enough, key=lambda d: hashlib.sha256(names[d].encode()).digest())
    return HeldOut(source, seq_len, sorted(by_hash[:limit]))
