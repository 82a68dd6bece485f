"""`route` against the definition, and what must hold of it alone: ties, chunks, repetition, no look into the future."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packs import LargestTensor, Pack, bounds, documents_of, drops_and_keeps, packs

from moba import routing
from moba.reference import reference_selection
from moba.routing import full_precision, layout_means, route

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@settings(deadline=None, max_examples=25)
@given(packs())
def test_equals_reference(pack):
    """Catches any error of documents, tails, groups or more keys than queries; float64, no ties."""
    q, k, _ = pack.tensors()
    torch.testing.assert_close(route(q, k, **pack.options), reference_selection(q, k, **pack.options), rtol=0, atol=0)


@settings(deadline=None, max_examples=25)
@given(packs(quantised=True), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_equals_reference_with_ties(pack, dtype):
    """Catches another order among equal scores: small integers make most scores equal and all arithmetic exact."""
    q, k, _ = (x.to(dtype) for x in pack.tensors())
    torch.testing.assert_close(route(q, k, **pack.options), reference_selection(q, k, **pack.options), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_reference_in_training_precision(dtype):
    """Catches means or scores in less than float32; and that these tests drop and keep blocks at all."""
    pack = Pack([150, 0, 83, 5], block_size=8, top_k=4, heads=(4, 2), dtype=dtype)
    q, k, _ = pack.tensors()
    selection = route(q, k, **pack.options)
    assert all(drops_and_keeps(selection))
    assert torch.equal(selection, reference_selection(q, k, **pack.options))


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 16),
    st.integers(2, 5),
    st.integers(1, 40),
    st.sampled_from([4, 31, 64]),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_equal_blocks_go_to_the_earliest(block_size, top_k, num_blocks, head_dim, dtype):
    """Catches score kernels that round equal columns differently, as at a tile's edge: all blocks hold equal keys."""
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(block_size, 2, head_dim, generator=generator, dtype=dtype).repeat(num_blocks, 1, 1)
    q = torch.randn(k.shape[0], 4, head_dim, generator=generator, dtype=dtype)
    own = torch.arange(k.shape[0]) // block_size
    history = torch.arange(top_k - 1) - (top_k - 1 - own[:, None]).clamp(min=0)
    expected = torch.cat([history.clamp(min=-1), own[:, None]], dim=1).to(torch.int32)
    assert torch.equal(route(q, k, block_size=block_size, top_k=top_k), expected.expand(4, -1, -1))


def test_zeros_of_either_sign_are_equal():
    """Catches a maximum that puts 0.0 before -0.0, and zero keys that do not go to the earliest block."""
    scores = torch.tensor([[-0.0, 0.0, -0.0, 0.0], [float("-inf"), -0.0, 0.0, -1.0]])
    assert routing._best_columns(scores, 3).tolist() == [[0, 1, 2], [1, 2, 3]]
    q, k = torch.randn(20, 2, 4), torch.zeros(20, 1, 4)
    assert route(q, k, block_size=2, top_k=3)[:, -1].tolist() == [[0, 1, 9]] * 2
    assert route(0 * q, torch.randn(20, 1, 4), block_size=2, top_k=3)[:, -1].tolist() == [[0, 1, 9]] * 2


@settings(deadline=None, max_examples=25)
@given(packs(dtype=torch.float32), st.integers(1, 50), st.integers(1, 2000), st.integers(1, 500))
def test_chunk_sizes_and_repetition_do_not_matter(pack, queries, scores, means):
    """Catches a chunk boundary that shifts blocks, and routing that is not the same when recomputed."""
    q, k, _ = pack.tensors()
    expected = route(q, k, **pack.options)
    assert torch.equal(route(q.clone(), k.clone(), **pack.options), expected)
    with mock.patch.multiple(routing, CHUNK_QUERIES=queries, SCORE_ELEMENTS=scores, MEAN_ELEMENTS=means):
        assert torch.equal(route(q, k, **pack.options), expected)


def test_scores_of_a_long_pack_never_exist_at_once():
    """Catches a step that holds [H, T, blocks]: the largest tensor that any operator makes stays near the inputs."""
    q, k = torch.randn(1024, 2, 8), torch.randn(1024, 1, 8)
    with mock.patch.multiple(routing, SCORE_ELEMENTS=1 << 14), LargestTensor() as largest:
        route(q, k, block_size=4, top_k=3)
    assert largest.numel < 2 * 1024 * 256 / 8


@settings(deadline=None, max_examples=20)
@given(packs(), st.data())
def test_the_future_does_not_matter(pack, data):
    """Catches a mean that holds keys after the query: changing all later keys leaves its choice alone."""
    q, k, _ = pack.tensors()
    length = data.draw(st.sampled_from([n for n in pack.lengths if n] or [0]))
    if length == 0:
        return
    document, position = pack.lengths.index(length), data.draw(st.integers(0, length - 1))
    before = sum((pack.extra or [0] * 4)[: document + 1])
    query = sum(pack.lengths[:document]) + position
    changed = k.clone()
    changed[before + query + 1 :] = -7 * changed[before + query + 1 :] + 1
    after = route(q, changed, **pack.options)
    assert torch.equal(after[:, : query + 1], route(q, k, **pack.options)[:, : query + 1])


def test_documents_do_not_see_each_other():
    """Catches routing across documents: reordering the documents of a pack reorders the selection and nothing else."""
    lengths, order = [30, 0, 17, 44], [3, 0, 2, 1]
    q, k, _ = Pack(lengths, block_size=4, top_k=3, heads=(4, 2)).tensors()
    parts = [torch.arange(start, stop) for start, stop in zip(bounds(lengths), bounds(lengths)[1:])]
    index = torch.cat([parts[i] for i in order])
    selection = route(q, k, block_size=4, top_k=3, cu_seqlens=bounds(lengths))
    moved = route(q[index], k[index], block_size=4, top_k=3, cu_seqlens=bounds([lengths[i] for i in order]))
    assert all(drops_and_keeps(selection))
    assert torch.equal(moved, selection[:, index])


def test_heads_of_a_group_route_on_their_own():
    """Catches one selection for all heads that share keys."""
    q, k, _ = Pack([64], block_size=4, top_k=2, heads=(4, 1)).tensors()
    selection = route(q, k, block_size=4, top_k=2)
    assert not torch.equal(selection[0], selection[1])


def test_non_finite_scores_stay_causal():
    """Catches an index out of range, or a future block, when keys have overflowed."""
    q, k, _ = Pack([60, 30], block_size=4, top_k=3, dtype=torch.float32).tensors()
    k[5], k[30], k[70] = float("inf"), float("nan"), float("-inf")
    selection = route(q, k, block_size=4, top_k=3, cu_seqlens=bounds([60, 30]))
    own = torch.cat([torch.arange(60), torch.arange(30)])[None] // 4
    assert torch.equal(selection[..., -1], own.expand(2, -1).int())
    assert ((selection[..., :-1] >= -1) & (selection[..., :-1] < own[..., None])).all()


def test_autocast_leaves_the_gate_in_float32():
    """Catches scores in bfloat16 under autocast, which would choose other blocks."""
    q, k, _ = Pack([256], block_size=4, top_k=4, heads=(4, 2), dtype=torch.float32).tensors()
    expected = route(q, k, block_size=4, top_k=4)
    assert not torch.equal(route(q.bfloat16(), k.bfloat16(), block_size=4, top_k=4), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(route(q, k, block_size=4, top_k=4), expected)


@settings(deadline=None, max_examples=20)
@given(packs())
def test_block_means_and_layout(pack):
    """Catches blocks that start elsewhere than at their document's start, and slots that are not enough."""
    _, k, _ = pack.tensors()
    cu_seqlens_k = pack.options["cu_seqlens_k"] if pack.extra is not None else pack.options["cu_seqlens"]
    size, ends = pack.block_size, cu_seqlens_k.tolist()
    blocks = [
        (n, i, min(i + size, ends[n + 1])) for n in range(len(ends) - 1) for i in range(ends[n], ends[n + 1], size)
    ]
    q = k.new_empty(sum(pack.lengths), 1, 1)
    layout = documents_of(q, k, pack.options["cu_seqlens"], cu_seqlens_k).layout(size)
    assert layout.num_blocks == len(k) // size + len(ends) - 1
    got = list(zip(layout.document_M.tolist(), layout.start_M.tolist(), layout.end_M.tolist()))
    unused = (len(ends) - 1, len(k), len(k))
    assert got == blocks + [unused] * (layout.num_blocks - len(blocks))
    means = layout_means(k, layout)
    for mean, (_, start, stop) in zip(means, blocks):
        torch.testing.assert_close(mean, k[start:stop].mean(0))
    assert not means[len(blocks) :].any()


def test_bad_arguments_are_named():
    """Catches a public function that fails inside torch instead of saying what is wrong."""
    q, k = torch.randn(8, 4, 4), torch.randn(8, 3, 4)
    with pytest.raises(ValueError, match="4 heads and k has 3"):
        route(q, k, block_size=2, top_k=2)
    with pytest.raises(ValueError, match="top_k=0"):
        route(q, q, block_size=2, top_k=0)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("one_document", [True, False])
def test_cuda_equals_cpu_without_waiting(one_document):
    """Catches a host synchronisation, and another order of ties on the GPU (small integers: exact arithmetic)."""
    q, k, _ = Pack([700, 0, 301], block_size=16, top_k=4, heads=(4, 2), quantised=True, dtype=torch.bfloat16).tensors()
    options = {"block_size": 16, "top_k": 4, "cu_seqlens": None if one_document else bounds([700, 0, 301])}
    expected = route(q, k, **options)
    q, k = q.cuda(), k.cuda()
    on_device = {**options, "cu_seqlens": None if one_document else options["cu_seqlens"].cuda()}
    route(q, k, **on_device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        selection = route(q, k, **on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(selection.cpu(), expected)


@pytest.mark.gpu
@needs_cuda
def test_full_precision_switches_tf32_off_and_back():
    """Catches TF32 scores when the user has switched TF32 on, and a switch that is not restored."""
    x = torch.randn(256, 256, device="cuda")
    exact = x.double() @ x.double()
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        coarse = (x @ x - exact).abs().max()
        with full_precision(x.device):
            fine = (x @ x - exact).abs().max()
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert fine * 20 < coarse
