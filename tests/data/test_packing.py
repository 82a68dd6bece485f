"""Packing against a second implementation that moves single tokens, and the shape of a batch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.packing import Packer, Window, make_batch

DOCUMENTS = st.lists(st.integers(0, 70), min_size=1, max_size=30)


def naive_packs(num_inputs, seq_len):
    """Packs as lists of windows, a window as a list of (document, offset); token by token, from the rule in the
    docs."""
    packs, current = [], []
    for document, count in enumerate(num_inputs):
        inputs = [(document, offset) for offset in range(count)]
        while len(inputs) >= seq_len:
            packs.append([inputs[:seq_len]])
            inputs = inputs[seq_len:]
        window = []
        for one in inputs:
            window.append(one)
            if sum(map(len, current)) + len(window) == seq_len:
                packs.append([*current, window])
                current, window = [], []
        if window:
            current.append(window)
    return packs, current


class Stream:
    """A DocumentStream of a list; counts the documents that were made."""

    def __init__(self, documents):
        self.documents, self.place, self.num_made = list(documents), 0, 0

    def draw(self):
        if self.place == len(self.documents):
            raise StopIteration
        self.place += 1
        self.num_made += 1
        return self.documents[self.place - 1]

    def ahead(self, length, without):
        inputs = []
        for window in self.documents[self.place :][:7]:  # as far as is known: not to the end
            if window.length >= length or window.source in without:
                break
            inputs.append(window.length)
        return np.array(inputs, np.int64)

    def ahead_of(self, used):
        coming = self.documents[self.place :][:7]
        other = (i for i, window in enumerate(coming) if window.source not in used)
        return [used[one.source].item(one.document) for one in coming[: next(other, None)]], coming.__getitem__

    def skip(self, count):
        self.place += count


def texts(num_inputs):
    return Stream(Window("s", d, 0, n) for d, n in enumerate(num_inputs))


def drain(num_inputs, seq_len, pieces=(), interleave=1):
    """All packs the packer makes of these documents, and the pieces left; as the naive packer gives them."""
    packer, packs = Packer(seq_len, texts(num_inputs), pieces, interleave), []
    try:
        while True:
            packs.append(packer.next_pack())
    except StopIteration:
        return [[spelt(w) for w in pack] for pack in packs], packer.pieces


def spelt(window):
    return [(window.document, window.start + i) for i in range(window.length)]


@settings(deadline=None, max_examples=100)
@given(DOCUMENTS, st.integers(1, 20))
def test_packs_equal_a_naive_packer(num_inputs, seq_len):
    """Catches lost, repeated or reordered tokens, windows cut elsewhere, packs that are not full."""
    packs, pieces = drain(num_inputs, seq_len)
    wanted, open_windows = naive_packs(num_inputs, seq_len)
    assert packs == wanted
    assert [spelt(p) for p in pieces] == open_windows
    assert all(sum(map(len, pack)) == seq_len for pack in packs)


@settings(deadline=None, max_examples=100)
@given(DOCUMENTS, st.integers(1, 20), st.integers(1, 20), st.integers(0, 8), st.integers(1, 4))
def test_change_of_length_loses_nothing(num_inputs, first, second, packs_before, interleave):
    """Catches pieces of the open pack or of a half-used document that are dropped or repeated when the length
    changes."""
    stream = texts(num_inputs)
    packer, seen, lengths = Packer(first, stream, interleave=interleave), [], set()
    try:
        for _ in range(packs_before):
            seen += packer.next_pack()
        packer = Packer(second, stream, packer.pieces, interleave)
        while True:
            pack = packer.next_pack()
            lengths.add(sum(w.length for w in pack))
            seen += pack
    except StopIteration:
        seen += packer.pieces
    inputs = [one for w in seen for one in spelt(w)]
    assert sorted(inputs) == [(d, i) for d, n in enumerate(num_inputs) for i in range(n)]
    assert lengths <= {second}


@pytest.mark.parametrize("interleave", [1, 3])
def test_a_packer_continued_at_the_same_length_is_the_same(interleave):
    """Catches a state that is not the whole state: handing the pieces over after every pack must change nothing."""
    num_inputs = [5, 33, 2, 9, 40, 1, 7, 50, 3, 28]
    whole, rest = drain(num_inputs, 8, interleave=interleave)
    stream = texts(num_inputs)
    pieces, packs = [], []
    for _ in whole:
        packer = Packer(8, stream, pieces, interleave)
        packs.append([spelt(w) for w in packer.next_pack()])
        pieces = packer.pieces
    assert packs == whole and pieces and pieces == rest[: len(pieces)]


def documents_of(kinds):
    """Lists of (source, length), the sources as often as in `kinds`."""
    return st.lists(st.tuples(st.sampled_from(kinds), st.integers(0, 40)), min_size=20, max_size=120)


@settings(deadline=None, max_examples=250)
@given(
    st.one_of(documents_of("ssst"), documents_of("sttttttttt"), documents_of("t")),
    st.integers(1, 30),
    st.integers(1, 4),
    st.booleans(),
    st.data(),
)
def test_skipping_packs_is_making_them_and_dropping_them(documents, seq_len, interleave, with_talks, data):
    """Catches packs that are miscounted, and pieces lost at the border of what is skipped: short and long texts, empty
    ones, and conversations, skipped and made in turns."""
    drawn = [Window(source, number, 0, length) for number, (source, length) in enumerate(documents)]
    used = {"t": np.array([min(length, seq_len) for _, length in documents])} if with_talks else None
    made, states = Packer(seq_len, Stream(drawn), (), interleave, used), []
    packs, stream = [], made._stream
    try:
        while True:
            states.append((stream.place, made.pieces))
            packs.append(made.next_pack())
    except StopIteration:
        stream = Stream(drawn)
    skipping, at = Packer(seq_len, stream, (), interleave, used), 0
    while at < len(packs):
        count = data.draw(st.integers(0, len(packs) - at))
        skipping.skip(count)
        at += count
        assert (stream.place, skipping.pieces) == states[at]
        if at < len(packs):
            assert skipping.next_pack() == packs[at]
            at += 1


def test_what_is_skipped_is_not_made():
    """Catches a skip that plans every pack after all: of 1000 short texts, a few are looked at."""
    stream = texts([3, 5, 2, 6] * 250)
    packer = Packer(16, stream)
    packer.skip(200)
    assert stream.place >= 790 and stream.num_made < 300


def test_conversations_that_are_skipped_are_not_made():
    """Catches a skip that makes the packs of conversations after all: of 1000, a few are drawn and none is put away
    twice."""
    stream = Stream(Window("t", number, 0, (3, 5, 2, 6)[number % 4]) for number in range(1000))
    packer = Packer(64, stream, conversations={"t": np.array([3, 5, 2, 6] * 250)})
    packer.skip(60)
    assert stream.place >= 930 and stream.num_made < 300
    assert len({piece.document for piece in packer.pieces}) == len(packer.pieces)


def test_long_documents_are_read_side_by_side():
    """Catches an interleave that is not one: a step's packs out of one book, or windows of a book out of order."""
    packs, _ = drain([400] * 12, 10, interleave=4)
    sources = [pack[0][0][0] for pack in packs]
    assert all(len(set(sources[i : i + 32])) >= 3 for i in range(0, 256, 32))
    alone, _ = drain([400] * 12, 10)
    assert [pack[0][0][0] for pack in alone[:32]] == [0] * 32  # what it is there to avoid
    for document in set(sources):
        offsets = [pack[0][0][1] for pack in packs if pack[0][0][0] == document]
        assert offsets == sorted(offsets)


def test_batch_by_hand():
    """Catches labels off by one or across documents, positions that do not restart, cu_seqlens of the wrong kind."""
    documents = {0: np.array([10, 11, 12, 13, 2], np.uint16), 1: np.array([20, 21, 2], np.uint16)}
    windows = [Window("s", 0, 1, 2), Window("s", 1, 0, 2), Window("s", 0, 3, 1)]
    batch = make_batch(windows, lambda w: documents[w.document][w.start : w.start + w.length + 1])
    assert batch.tokens.tolist() == [11, 12, 20, 21, 13]
    assert batch.labels.tolist() == [12, 13, 21, 2, 2]  # a cut window's last label is the document's next token
    assert batch.positions.tolist() == [0, 1, 0, 1, 0]
    assert batch.cu_seqlens.tolist() == [0, 2, 4, 5] and batch.lengths == (2, 2, 1)
    assert batch.cu_seqlens.dtype == torch.int32
    assert {batch.tokens.dtype, batch.labels.dtype, batch.positions.dtype} == {torch.int64}
    moved = batch.to("cpu")
    assert moved.windows == tuple(windows) and torch.equal(moved.labels, batch.labels)
