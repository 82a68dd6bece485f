"""One sequence over several processes gives what one process gives: outputs, gradients and selections.

The processes are threads with a mailbox in the place of torch.distributed, so that hypothesis can try many packs;
tests/train/test_sequence_training.py does it with real processes.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moba.documents import Documents
from moba.kinds import Full, Moba, Sliding
from moba.layer import MoBAAttention
from moba.reference import reference_selection
from moba.routing import layout_means, select_blocks
from moba.sequence import BlockAxis, SequenceAxis
from moba.stats import mean_stats, record_routing

KINDS = (Full(), Moba(4, 2), Moba(4, 3), Moba(2, 3, first_blocks=1), Moba(3, 2, gate="random"), Sliding(5))
HEADS = ((4, 2), (3, 1), (7, 7), (9, 3), (6, 2), (4, 4), (5, 1))


class Mailbox:
    """What `size` threads send each other."""

    def __init__(self, size: int):
        self.barrier, self.sent = threading.Barrier(size, timeout=60), [None] * size

    def meet(self, rank: int, value):
        """Every thread's value, once all have brought one."""
        self.sent[rank] = value
        self.barrier.wait()
        everything = list(self.sent)
        self.barrier.wait()
        return everything


class OverThreads:
    """What makes an axis one over threads."""

    def __init__(self, mailbox: Mailbox, rank: int, size: int):
        super().__init__(None, rank, size)
        self.mailbox = mailbox

    def _send(self, sent, sizes, shapes):
        parts = self.mailbox.meet(self.rank, sent.detach().split(sizes))
        received = torch.cat([theirs[self.rank] for theirs in parts])
        assert received.numel() == sum(torch.Size(shape).numel() for shape in shapes)
        return received

    def sum(self, x):
        return x.copy_(torch.stack(self.mailbox.meet(self.rank, x.clone())).sum(0))


class ThreadAxis(OverThreads, SequenceAxis):
    """By heads."""


class ThreadBlockAxis(OverThreads, BlockAxis):
    """By blocks."""


AXES = (ThreadAxis, ThreadBlockAxis)


def in_threads(size, work, axis=ThreadAxis):
    """work(axis) of each of `size` threads."""
    mailbox = Mailbox(size)

    def one(rank):
        try:
            return work(axis(mailbox, rank, size))
        except BaseException:
            mailbox.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


def make_layer(kind, heads, key_conv, norm, rope):
    torch.manual_seed(0)
    layer = MoBAAttention(6, *heads, 4, qk_norm=norm, rope=rope, key_conv=key_conv, spec=kind).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


def run(layer, x, angles, documents, weight, axis=None):
    """Output, and gradients of x and of the parameters, of this thread's rows."""
    layer.axis = axis
    own = (lambda t: t) if axis is None else axis.own
    x, (cos, sin) = own(x).clone().requires_grad_(), map(own, angles)
    out = layer(x, cos, sin, documents)
    gradients = torch.autograd.grad((out * own(weight)).sum(), [x, *layer.parameters()])
    return [out.detach(), *gradients]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=6),
    st.integers(2, 5),
    st.sampled_from(KINDS),
    st.sampled_from(HEADS),
    st.sampled_from([0, 3, 5]),
    st.booleans(),
    st.sampled_from(AXES),
)
def test_slices_attend_as_one_sequence(lengths, size, kind, heads, key_conv, norm, axis):
    """Catches heads, rows or documents that get mixed up on the way, gradients of shared key/value heads that are not
    added up, and convolutions that stop at a slice's start: documents end anywhere, one may lie over all slices."""
    lengths = [*lengths, 8 * size + 1]  # at least four tokens a slice
    if axis is ThreadAxis:
        size = min(size, heads[0])
    elif kind.routing is not None and kind.routing.gate == "random":
        kind = Moba(3, 2, gate="local")
    check_slices(lengths, size, kind, heads, key_conv, norm, axis)


@pytest.mark.parametrize("axis", AXES)
def test_packs_may_have_fewer_tokens_than_slices(axis):
    """Catches a process without tokens that fails, or leaves the others waiting for it in the backward pass."""
    check_slices([1, 2], 4, Moba(4, 2), (4, 2), 0, False, axis)


def check_slices(lengths, size, kind, heads, key_conv, norm, axis):
    """Asserts that `size` processes compute what one does."""
    total = sum(lengths)
    layer = make_layer(kind, heads, key_conv, norm, rope=not norm)
    documents = Documents.from_lengths(lengths)
    x, weight = torch.randn(2, total, 6, dtype=torch.float64)
    angles = torch.rand(total, 4, dtype=torch.float64), torch.rand(total, 4, dtype=torch.float64)

    expected = run(layer, x, angles, documents, weight)
    copies = [make_layer(kind, heads, key_conv, norm, rope=not norm) for _ in range(size)]
    found = in_threads(size, lambda axis: run(copies[axis.rank], x, angles, documents, weight, axis), axis)

    order = torch.cat([axis(None, rank, size).own(torch.arange(total)) for rank in range(size)]).argsort()
    for place, (one, *parts) in enumerate(zip(expected, *found)):
        together = torch.cat(parts)[order] if place < 2 else torch.stack(parts).sum(0)
        torch.testing.assert_close(together, one, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("heads", HEADS)
def test_a_heads_selection_does_not_depend_on_the_processes(heads):
    """Catches routing that looks at one slice alone ("top-k of my slice"): blocks are dropped, over all of the pack."""
    torch.manual_seed(0)
    documents, size, kind = Documents.from_lengths([5, 58, 1, 16]), 3, Moba(4, 3)
    q, k = torch.randn(80, heads[0], 8), torch.randn(80, heads[1], 8)
    seen = {}

    def selection(q, k):
        layout = documents.layout(kind.block_size)
        return select_blocks(q, layout_means(k, layout), layout, kind.top_k)

    def work(axis):
        q_all, k_all, _ = axis.to_heads(axis.own(q), axis.own(k), axis.own(k), 80)
        seen[axis.rank] = selection(q_all, k_all)

    in_threads(size, work)
    expected = selection(q, k)
    assert (expected[:, 60:62, 0] > 0).any(), "no block is dropped: nothing would be seen"
    torch.testing.assert_close(torch.cat([seen[rank] for rank in range(size)]), expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_slices_queries_select_what_they_select_in_the_whole_pack(backend):
    """By blocks: catches queries that route among the blocks of their slice alone, or from a wrong place of their
    document: documents end at, before and after slices' ends, one has a single token, one lies over all slices."""
    torch.manual_seed(0)
    lengths, kind = [10, 3, 1, 58, 8], Moba(4, 3)
    documents, q, k = Documents.from_lengths(lengths), torch.randn(80, 4, 8), torch.randn(80, 2, 8)
    options = {"block_size": kind.block_size, "top_k": kind.top_k}

    def selection(q, k, documents):
        if backend == "reference":
            return reference_selection(q, k, **documents.bounds, **options)
        layout = documents.layout(kind.block_size)
        return select_blocks(q, layout_means(k, layout), layout, kind.top_k)

    expected = selection(q, k, documents)
    assert (expected[:, 30:, 0] > 0).any(), "no block is dropped: nothing would be seen"
    for size in (2, 3, 4, 5):
        for rank in range(size):
            for rows in BlockAxis(None, rank, size).slices(80):
                keys, pieces = documents.stretch(rows.start, rows.stop)
                torch.testing.assert_close(selection(q[rows], k[keys], pieces), expected[:, rows], rtol=0, atol=0)


def test_slices_from_front_and_back_have_the_same_work():
    """Catches slices in order, of which the last sees seven times the keys of the first of four."""
    seen = [
        sum(sum(range(rows.start, rows.stop)) for rows in BlockAxis(None, rank, 4).slices(800)) for rank in range(4)
    ]
    assert max(seen) == min(seen)


@pytest.mark.parametrize("axis", AXES)
def test_what_the_router_does_is_measured_over_all_heads(axis):
    """Catches diagnostics of one process's heads that pass for the layer's."""
    documents, total = Documents.from_lengths([40, 24]), 64
    x, angles = torch.randn(total, 6, dtype=torch.float64), torch.rand(2, total, 4, dtype=torch.float64)

    # Made one after another: threads would draw from one generator.
    layers = [make_layer(Moba(4, 2), (5, 1), 0, False, True) for _ in range(3)]

    def measured(axis=None):
        layer = layers[0 if axis is None else axis.rank]
        layer.axis = axis
        own = (lambda t: t) if axis is None else axis.own
        with record_routing(layer) as recorded, torch.no_grad():
            layer(own(x), *map(own, angles), documents)
        return mean_stats(recorded)

    expected = measured()
    for found in in_threads(3, measured, axis):
        assert found == pytest.approx(expected, rel=1e-5)


def test_more_processes_than_heads_are_refused():
    """Catches a process without a head, which would fail somewhere inside a kernel."""
    with pytest.raises(ValueError, match="4 processes for a sequence of 3 heads"):
        SequenceAxis(None, 0, 4).heads(3, 1)


def test_a_slice_shorter_than_the_convolution_is_refused():
    """Catches keys from two slices before, which nobody sends."""
    with pytest.raises(ValueError, match="a pack of 7 tokens over 2 processes leaves 3 to each:"):
        SequenceAxis(None, 0, 2).halo(torch.zeros(4, 2), 4, 7)
    with pytest.raises(ValueError, match="a pack of 15 tokens over 2 processes leaves 3 to each slice"):
        BlockAxis(None, 0, 2).halo(torch.zeros(8, 2), 4, 15)
