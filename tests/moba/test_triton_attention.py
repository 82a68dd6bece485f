"""The fused Triton kernels against the definition, in Triton's interpreter on a CPU (test_triton_gpu.py: on a GPU).

The interpreter runs kernels program by program in numpy: slow, so shapes are small, and float32 tiles are small too,
so that lists span several tiles and work items. tests/conftest.py switches it on.
"""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packs import by_bounds, documents_of

pytest.importorskip("triton", reason="the triton backend needs triton")

from moba import moba_attention
from moba.backends import triton_attention as backend
from moba.backends import triton_forward, triton_lists
from moba.backends.refusals import BackendUnavailable
from moba.backends.triton_forward import kv_heads_at_once
from moba.backends.triton_lists import build_items, build_lists, item_grid
from moba.backends.triton_routing import block_means, select_blocks
from moba.documents import Documents
from moba.reference import reference_attention, reference_selection
from moba.routing import route

moba_triton = by_bounds(backend.moba_triton)

pytestmark = [
    pytest.mark.skipif(
        not backend.INTERPRETED, reason="these run in the interpreter; test_triton_gpu.py runs on a GPU"
    ),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter computes masked lanes too
]


def tensors(num_tokens, heads, head_dim, dtype=torch.float32, seed=0):
    """q, k, v."""
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = heads
    shapes = [(num_tokens, h, head_dim) for h in (num_heads, num_kv_heads, num_kv_heads)]
    return [torch.randn(s, generator=generator).to(dtype) for s in shapes]


def bounds(values):
    return None if values is None else torch.tensor(values, dtype=torch.int32)


def pack_selection(q, k, cu_seqlens, block_size, top_k, first_blocks=0):
    """The kernels' selection in the reference's form: int32 [H, T, K], block numbers within the document, ascending."""
    layout = documents_of(q, k, cu_seqlens).kernel_layout(block_size)
    selection = select_blocks(q, k, layout, block_size, top_k, first_blocks)
    selection = torch.where(selection >= 0, selection - layout.first_block_T[:, None, None], -1)
    return selection.sort(dim=-1).values.transpose(0, 1)


def dropped(selection):
    """Whether some query left out a past block: else a selection test would show nothing."""
    return bool(((selection >= 0).sum(-1) <= selection[..., -1]).any())


def full_of_nan(x):
    return x.fill_(float("nan")) if x.is_floating_point() else x


def gradients(function, q, k, v, d_out, d_lse):
    """(out, lse, dq, dk, dv)"""
    inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out, lse = function(*inputs)
    return [out, lse, *torch.autograd.grad((out, lse), inputs, (d_out.to(out), d_lse.to(lse)))]


@pytest.fixture(params=[False, True], ids=["own block in a slot", "own block in the merge"])
def own_in_merge(request, monkeypatch):
    """The two ways of short blocks' own rows; long blocks have the first alone."""
    monkeypatch.setattr(triton_forward, "merges_own", lambda *_: request.param)


# (tokens, (H, H_kv), head size, block size, top_k, cu_seqlens, workspace)
CASES = {
    "short blocks, grouped heads": (70, (4, 2), 16, 16, 3, None, None),
    "pack: empty document, short document, ragged tails": (90, (4, 2), 16, 16, 2, [0, 40, 40, 45, 90], None),
    "long blocks, odd sizes, one head at a time": (110, (4, 2), 24, 36, 2, [0, 7, 100, 100, 110], 1),
    "long blocks that key tiles divide": (100, (2, 1), 16, 48, 2, None, None),
    "blocks smaller than a key tile": (60, (2, 2), 16, 10, 4, None, None),
    "top_k 1 is block-local": (60, (2, 1), 16, 16, 1, [0, 25, 60], None),
    "short blocks, one head at a time": (70, (6, 2), 24, 16, 2, [0, 33, 70], 1),
    "more picks than blocks": (50, (2, 1), 16, 16, 6, None, None),
}


@pytest.mark.usefixtures("own_in_merge")
@pytest.mark.parametrize("case", CASES)
def test_matches_reference(case, monkeypatch):
    """Output, log-sum-exp and all gradients, also those through the log-sum-exp.

    Catches any error of routing, lists, masks, merging, the cutting of lists into items, and the grouping of heads
    under the workspace budget. Memory is not zeros, so that a slot that nobody wrote would show.
    """
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *x, **y: full_of_nan(empty(*x, **y)))
    num_tokens, heads, head_dim, block_size, top_k, documents, workspace = CASES[case]
    if workspace is not None:
        monkeypatch.setattr(backend, "WORKSPACE_BYTES", workspace)
    q, k, v = tensors(num_tokens, heads, head_dim)
    options = {"block_size": block_size, "top_k": top_k, "cu_seqlens": bounds(documents)}
    d_out, d_lse = torch.randn_like(q), torch.randn(heads[0], num_tokens)
    got = gradients(lambda *x: moba_triton(*x, **options), q, k, v, d_out, d_lse)
    want = gradients(
        lambda *x: reference_attention(*x, **options, return_lse=True), q.double(), k.double(), v.double(), d_out, d_lse
    )
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, want):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
    if "more picks" not in case:
        assert dropped(reference_selection(q, k, **options))


@pytest.mark.usefixtures("own_in_merge")
@pytest.mark.parametrize(
    ("lengths", "pasts", "block_size", "top_k", "first_blocks"),
    [
        ([23, 1, 20], [40, 30, 0], 8, 3, 0),  # a past that no block ends at, one token alone, no past at all
        ([16, 9], [48, 63], 16, 3, 1),  # a past of whole blocks; the last block has few queries
        ([5, 30], [80, 33], 36, 2, 0),  # long blocks; the own block began before the queries
        ([3], [90], 8, 2, 0),  # hardly any block has queries of its own, and many are nobody's choice
    ],
)
def test_queries_that_are_the_last_of_their_documents_keys(lengths, pasts, block_size, top_k, first_blocks):
    """As a process has them that holds a slice of a pack, or a prompt that goes on: catches queries that route or see
    from a wrong place, causal masks of blocks whose first tokens are no queries, and gradients of keys that nobody
    selected left as they were found in memory. Selections are equal, and blocks are dropped."""
    heads, head_dim = (4, 2), 16
    lengths_k = [length + past for length, past in zip(lengths, pasts)]
    q = tensors(sum(lengths), heads, head_dim)[0]
    _, k, v = tensors(sum(lengths_k), heads, head_dim, seed=1)
    cu_seqlens, cu_seqlens_k = (bounds([0, *accumulate(one)]) for one in (lengths, lengths_k))
    options = {"block_size": block_size, "top_k": top_k, "first_blocks": first_blocks}
    options |= {"cu_seqlens": cu_seqlens, "cu_seqlens_k": cu_seqlens_k}
    want_selection = reference_selection(q, k, **options)
    assert dropped(want_selection)
    torch.testing.assert_close(route(q, k, **options, backend="triton"), want_selection, rtol=0, atol=0)

    del options["cu_seqlens"], options["cu_seqlens_k"]
    documents = Documents.from_lengths(lengths, lengths_k)
    d_out, d_lse = torch.randn_like(q), torch.randn(heads[0], len(q))
    got = gradients(lambda *x: backend.moba_triton(*x, documents, **options), q, k, v, d_out, d_lse)
    of_pack = {**options, **documents.bounds, "return_lse": True}
    want = gradients(lambda *x: reference_attention(*x, **of_pack), q.double(), k.double(), v.double(), d_out, d_lse)
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, want):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


@settings(max_examples=4, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=3).filter(any),
    heads=st.sampled_from([(1, 1), (4, 2)]),
    block_size=st.integers(2, 24),
    top_k=st.integers(1, 5),
    seed=st.integers(0, 999),
    merged=st.booleans(),
)
def test_random_packs_match_reference(lengths, heads, block_size, top_k, seed, merged):
    """Output and all gradients for whatever packs come: documents of no token, of one, of a block and a bit."""
    q, k, v = tensors(sum(lengths), heads, 16, seed=seed)
    options = {"block_size": block_size, "top_k": top_k, "cu_seqlens": bounds([0, *accumulate(lengths)])}
    d_out, d_lse = torch.randn_like(q), torch.randn(heads[0], sum(lengths))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_forward, "merges_own", lambda *_: merged)
        got = gradients(lambda *x: moba_triton(*x, **options), q, k, v, d_out, d_lse)
    want = gradients(
        lambda *x: reference_attention(*x, **options, return_lse=True), q.double(), k.double(), v.double(), d_out, d_lse
    )
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, want):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("top_k", "first_blocks"), [(2, 1), (3, 1), (5, 2)])
def test_first_blocks_match_reference(top_k, first_blocks):
    """Catches the pack's first blocks instead of the document's, in tiles of one document and of several; a running
    choice that gives them up again, or stops where they fill it; and an option that is lost in the operator."""
    q, k, v = tensors(150, (4, 2), 16)
    documents = bounds([0, 90, 93, 150])
    options = {"block_size": 8, "top_k": top_k, "first_blocks": first_blocks, "cu_seqlens": documents}
    selection = reference_selection(q, k, **options)
    assert torch.equal(pack_selection(q, k, documents, 8, top_k, first_blocks), selection) and dropped(selection)
    assert not torch.equal(selection, reference_selection(q, k, **options | {"first_blocks": 0}))
    d_out, d_lse = torch.randn_like(q), torch.randn(4, 150)
    got = gradients(lambda *x: moba_triton(*x, **options), q, k, v, d_out, d_lse)
    exact = [x.double() for x in (q, k, v)]
    want = gradients(lambda *x: reference_attention(*x, **options, return_lse=True), *exact, d_out, d_lse)
    for a, b in zip(got, want):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=2e-5)
    out = moba_attention(q, k, v, **options, backend="triton")
    assert torch.equal(out, got[0])


def test_float16_and_softmax_scale():
    """Half precision takes the split of the means and half-precision operands; the scale reaches both passes."""
    q, k, v = tensors(100, (4, 2), 16, torch.float16)
    options = {"block_size": 32, "top_k": 2, "softmax_scale": 0.4}
    d_out, d_lse = torch.randn_like(q), torch.randn(4, 100)
    got = gradients(lambda *x: moba_triton(*x, **options), q, k, v, d_out, d_lse)
    want = gradients(
        lambda *x: reference_attention(*x, **options, return_lse=True), q.double(), k.double(), v.double(), d_out, d_lse
    )
    for a, b in zip(got, want):
        assert (a.double() - b).norm() / b.norm() < 2e-3


def test_selection_is_the_references():
    """The blocks of the definition, in a pack, for many blocks per tile and few: a slip of the running choice shows."""
    q, k, _ = tensors(230, (4, 2), 16, seed=3)
    for block_size, top_k in ((4, 6), (16, 3)):
        cu_seqlens = bounds([0, 150, 150, 153, 230])
        want = reference_selection(q, k, block_size=block_size, top_k=top_k, cu_seqlens=cu_seqlens)
        assert dropped(want)
        assert torch.equal(pack_selection(q, k, cu_seqlens, block_size, top_k), want)


def test_ties_go_to_the_earlier_block():
    """Keys of -1, 0, 1 make exact and often equal scores; the reference takes the earliest of equals."""
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randint(-1, 2, (120, h, 16), generator=generator).float() for h in (2, 1))
    want = reference_selection(q, k, block_size=4, top_k=4)
    assert dropped(want)
    assert torch.equal(pack_selection(q, k, None, 4, 4), want)
    same = torch.ones(40, 1, 16)
    assert pack_selection(same, same, None, 4, 3)[0, -1].tolist() == [0, 1, 9]


def test_split_means_keep_float32_precision():
    """high + low restores the float32 mean to 2^-20 in float16, where one rounded term is off by 2^-11."""
    _, k, _ = tensors(96, (1, 1), 16, torch.float16)
    high, low = block_means(k, documents_of(k, k).kernel_layout(32), 32)[0, :3].double().unbind(1)
    want = k.double().view(3, 32, 16).mean(1)
    assert (high + low - want).abs().max() < 2**-20
    assert (high - want).abs().max() > 2**-16


@pytest.mark.parametrize("documents", [None, [0, 10, 10, 75, 90]])
def test_lists_hold_every_pick_once_in_order(documents, monkeypatch):
    """Each list is the rows that picked its block, ascending, the block's own rows first; slots is the inverse map.
    Chunks of 96 picks are ranked in several tiles, and placed by three programs each."""
    monkeypatch.setattr(triton_lists, "PLACE_TILE", 32)
    q, k, _ = tensors(90, (4, 2), 16)
    layout = documents_of(q, k, bounds(documents)).kernel_layout(8)
    selection = select_blocks(q, k, layout, 8, 3)
    lists = build_lists(selection, layout, 2)
    for kv_head in range(2):
        for block in range(layout.num_blocks):
            start, end = lists.list_start[kv_head, block : block + 2].tolist()
            want = [
                t * 4 + h
                for t in range(90)
                for h in (2 * kv_head, 2 * kv_head + 1)
                if block in selection[t, h].tolist()
            ]
            assert lists.rows[kv_head, start:end].tolist() == want
            own = 2 * int(layout.length_M[block])
            first = int(layout.start_M[block])
            assert [r // 4 for r in want[:own]] == [first + i // 2 for i in range(own)]
            for i, row in enumerate(want):
                pick = selection[row // 4, row % 4].tolist().index(block)
                assert lists.slots[row // 4, row % 4, pick] == start + i
    assert torch.equal(lists.slots < 0, selection < 0)


def test_items_cover_the_lists():
    """The items of a list tile it without gap or overlap, and the bounds that size the launches hold."""
    q, k, _ = tensors(90, (4, 2), 16)
    layout = documents_of(q, k).kernel_layout(8)
    lists = build_lists(select_blocks(q, k, layout, 8, 3), layout, 2)
    items = build_items(lists, 16)
    lengths = lists.list_start.diff(dim=1)
    counts = (lengths + 15) // 16
    assert torch.equal(items.item_start.diff(dim=1), counts)
    assert torch.equal(items.split_start.diff(dim=1), torch.where(counts > 1, counts, 0))
    assert (counts > 1).any() and (counts == 1).any()
    for kv_head in range(2):
        want = torch.arange(layout.num_blocks).repeat_interleave(counts[kv_head].long())
        assert items.item_block[kv_head, : len(want)].tolist() == want.tolist()
    assert items.item_start[:, -1].max() <= items.max_items and items.split_start[:, -1].max() <= items.max_splits


def test_layout_of_a_pack():
    """Blocks are cut from each document's start; empty documents have none; unused slots have length 0."""
    layout = Documents.from_lengths([10, 0, 3, 16]).kernel_layout(8)
    assert layout.num_blocks == 29 // 8 + 4
    assert layout.start_M.tolist()[:5] == [0, 8, 10, 13, 21] and layout.length_M.tolist() == [8, 2, 3, 8, 8, 0, 0]
    assert layout.own_block_T.tolist() == [0] * 8 + [1] * 2 + [2] * 3 + [3] * 8 + [4] * 8
    assert layout.first_block_T.tolist() == [0] * 10 + [2] * 3 + [3] * 16


def test_recomputation_gives_the_same_bits():
    """Under activation checkpointing the forward runs twice: outputs and gradients must be those of one run."""
    from torch.utils.checkpoint import checkpoint

    q, k, v = tensors(64, (4, 2), 16)
    d_out, d_lse = torch.randn_like(q), torch.randn(4, 64)

    def plain(*x):
        return moba_triton(*x, block_size=16, top_k=2)

    one = gradients(plain, q, k, v, d_out, d_lse)
    two = gradients(lambda *x: checkpoint(plain, *x, use_reentrant=False), q, k, v, d_out, d_lse)
    assert all(torch.equal(a, b) for a, b in zip(one, two))


def test_operators_have_fake_versions():
    """Shapes and dtypes without running: what torch.compile traces around the operators with."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    q, k, v = tensors(50, (4, 2), 16)
    found = Documents.from_lengths([20, 30]).kernel_layout(16)
    layout = (found.start_M, found.length_M, found.skipped_M, found.first_block_T, found.own_block_T)
    real = backend.triton_forward(q, k, v, *layout, 16, 3, 0.25)
    grads = backend.triton_backward(torch.ones_like(q), None, q, k, v, *real, *layout[:3], 16, 0.25)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fq, fk, fv, *fakes = (mode.from_tensor(x) for x in (q, k, v, *layout))
        fake = backend.triton_forward(fq, fk, fv, *fakes, 16, 3, 0.25)
        fake_grads = backend.triton_backward(fq, None, fq, fk, fv, *fake, *fakes[:3], 16, 0.25)
    for a, b in zip((*real, *grads), (*fake, *fake_grads), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype


def test_empty_pack():
    """No tokens at all: empty outputs and gradients, no launch."""
    q, k, v = tensors(0, (4, 2), 16)
    out, _, d_q, d_k, _ = gradients(
        lambda *x: moba_triton(*x, block_size=16, top_k=2, cu_seqlens=bounds([0, 0])), q, k, v, q, torch.zeros(4, 0)
    )
    assert out.shape == d_q.shape == (0, 4, 16) and d_k.shape == (0, 2, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 65}, "top_k=65"),
        ({"softmax_scale": -1.0}, "softmax_scale"),
        ({"dtype": torch.float64}, "float64"),
        ({"head_dim": 12}, "head size 12"),
    ],
)
def test_says_what_it_cannot_do(change, message):
    """Every refusal names the argument and a backend that can."""
    options = {"block_size": 16, "top_k": 2, **change}
    q, k, v = tensors(32, (2, 1), options.pop("head_dim", 16), options.pop("dtype", torch.float32))
    with pytest.raises(BackendUnavailable, match=message) as error:
        moba_attention(q, k, v, backend="triton", **options)
    assert "torch" in str(error.value)


def test_workspace_groups():
    """Groups are as large as the budget allows, of even size, and never empty."""
    assert kv_heads_at_once(8, 100, 10_000) == 8
    assert kv_heads_at_once(8, 100, 350) == 3
    assert kv_heads_at_once(8, 100, 1) == 1
    assert kv_heads_at_once(8, 100, 799) == 4


def test_heads_take_turns_in_short_launches():
    """Turns of as many heads as divide their number, up to 16 query heads; in long launches one head after another."""
    assert item_grid(100, 8, 4, 8) == ((4, 100, 2), 4)
    assert item_grid(100, 12, 1, 8) == ((12, 100, 1), 12)
    assert item_grid(50, 18, 1, 8) == ((9, 50, 2), 9)
    assert item_grid(100, 7, 4, 8) == ((100, 1, 7), 1)
    assert item_grid(100, 2, 32, 8) == ((100, 1, 2), 1)
    assert item_grid(329, 8, 4, 8)[1] == item_grid(659, 8, 4, 4)[1] == 4  # 2,632 programs of 132 at a time
    assert item_grid(330, 8, 4, 8)[1] == item_grid(660, 8, 4, 4)[1] == 1


@pytest.mark.parametrize(("block_size", "workspace"), [(16, 40_000), (36, 15_000)])
def test_turns_of_heads_change_nothing(block_size, workspace, monkeypatch):
    """Short and long blocks, two heads of four at a time: equal bits whether heads take turns or follow each other.
    Catches a program that reads or writes for another head, and items left out."""
    monkeypatch.setattr(backend, "WORKSPACE_BYTES", workspace)
    q, k, v = tensors(50, (4, 4), 16)
    d_out, d_lse = torch.randn_like(q), torch.randn(4, 50)
    options = {"block_size": block_size, "top_k": 2, "cu_seqlens": bounds([0, 41, 50])}
    found = []
    for short_launch in (0, triton_lists.SHORT_LAUNCH):
        monkeypatch.setattr(triton_lists, "SHORT_LAUNCH", short_launch)
        found.append(gradients(lambda *x: moba_triton(*x, **options), q, k, v, d_out, d_lse))
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("gate", ["local", "random", "oracle"])
def test_another_gate_s_blocks_are_attended_to(gate):
    """Catches kernels that route by their own gate where another was asked for, or that count its blocks from the
    pack's start; forward and backward, against the backend for any device, which selects by the same gate."""
    inputs = [x.requires_grad_() for x in tensors(90, (4, 2), 16)]
    weight = torch.linspace(-1, 1, 90 * 4 * 16).view(90, 4, 16)
    options = {"cu_seqlens": bounds([0, 40, 40, 45, 90]), "block_size": 8, "top_k": 3}

    def results(backend, gate):
        out = moba_attention(*inputs, **options, gate=gate, backend=backend)
        assert isinstance(out, torch.Tensor)
        return [out, *torch.autograd.grad((out * weight).sum(), inputs)]

    found = results("triton", gate)
    for ours, theirs in zip(found, results("torch", gate)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (found[0] - results("triton", "mean")[0]).abs().max() > 0.1
