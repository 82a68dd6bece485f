"""The torch backend against the definition, and what it promises: sparse, bounded, repeatable."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packs import LargestTensor, Pack, assert_same, by_bounds, documents_of, drops_and_keeps, packs, with_gradients
from torch.utils.flop_counter import FlopCounterMode

from moba import routing
from moba.backends import torch_blocks
from moba.flops import attended_pairs, attention_flops, causal_pairs
from moba.kinds import Moba
from moba.reference import reference_attention
from moba.routing import route

moba_torch = by_bounds(torch_blocks.moba_torch)

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def reference(q, k, v, **options):
    return reference_attention(q, k, v, return_lse=True, **options)


@settings(deadline=None, max_examples=25)
@given(packs())
def test_random_packs_equal_reference(pack):
    """Catches errors of lists, padding, masks, merging or gradients for any documents, GQA, block size and top_k."""
    tensors = pack.tensors(requires_grad=True)
    assert_same(
        with_gradients(moba_torch, *tensors, **pack.options), with_gradients(reference, *tensors, **pack.options)
    )


@settings(deadline=None, max_examples=25)
@given(packs(), st.sampled_from([1, 40, 600]), st.sampled_from([1, 100, 1000]), st.integers(1, 5))
def test_chunks_and_steps_equal_reference(pack, partial, step, diagonal):
    """Catches rows lost or counted twice where chunks of queries, lists and diagonals are cut."""
    tensors = pack.tensors(requires_grad=True)
    sizes = {"PARTIAL_ELEMENTS": partial, "STEP_ELEMENTS": step, "DIAGONAL_QUERIES": diagonal}
    with mock.patch.multiple(torch_blocks, **sizes):
        got = with_gradients(moba_torch, *tensors, **pack.options)
    assert_same(got, with_gradients(reference, *tensors, **pack.options))


@settings(deadline=None, max_examples=25)
@given(packs(), st.sampled_from([40, 600, 1 << 19]), st.integers(1, 5))
def test_steps_hold_every_pick_once(pack, elements, diagonal):
    """Catches a pick that is lost or doubled, and a block twice in one step: its sums would race on a GPU."""
    q, k, _ = pack.tensors()
    documents = documents_of(q, k, pack.options["cu_seqlens"], pack.options["cu_seqlens_k"])
    layout, selection = documents.layout(pack.block_size), route(q, k, **pack.options)
    slots = []
    with mock.patch.multiple(torch_blocks, STEP_ELEMENTS=elements, DIAGONAL_QUERIES=diagonal):
        for step in torch_blocks._steps(selection, layout, 0, len(q), pack.heads[1]) if len(q) else ():
            assert step.key_Lb[:, 0].unique().numel() == step.key_Lb.shape[0]
            slots += step.slot_Ln[step.slot_Ln < selection.numel()].tolist()
    assert sorted(slots) == (selection.transpose(0, 1) >= 0).flatten().nonzero().flatten().tolist()


@settings(deadline=None, max_examples=15)
@given(packs(quantised=True))
def test_ties_equal_reference(pack):
    """Catches a backend that attends to other blocks than the definition where scores are equal."""
    tensors = pack.tensors(requires_grad=True)
    assert_same(
        with_gradients(moba_torch, *tensors, **pack.options), with_gradients(reference, *tensors, **pack.options)
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
def test_training_precisions(dtype, tolerance):
    """Catches accumulation in half precision, wrong output dtypes, and a pack in which nothing is dropped."""
    pack = Pack([130, 0, 61, 3], block_size=8, top_k=4, heads=(4, 2), head_dim=16, dtype=dtype)
    tensors = pack.tensors(requires_grad=True)
    assert all(drops_and_keeps(route(*tensors[:2], **pack.options)))
    got = with_gradients(moba_torch, *tensors, **pack.options)
    assert [x.dtype for x in got] == [dtype, torch.float32, dtype, dtype, dtype]
    assert_same(got, with_gradients(reference, *tensors, **pack.options), rtol=tolerance, atol=tolerance)


def test_gradients_by_finite_differences():
    """Catches a backward pass that agrees with autograd of the definition by sharing its mistake."""
    pack = Pack([7, 0, 3], block_size=2, top_k=2, heads=(2, 1), head_dim=2)
    inputs = pack.tensors(requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, k, v: moba_torch(q, k, v, **pack.options)[0], inputs)


def test_scale_and_strided_inputs():
    """Catches an ignored softmax_scale, and views (slices of a fused projection) read as if contiguous."""
    pack = Pack([40, 9], block_size=4, top_k=3, heads=(2, 2))
    fused = torch.cat(pack.tensors(), dim=1).requires_grad_()
    strided, copies = fused.split(2, dim=1), [x.clone() for x in fused.split(2, dim=1)]
    got = moba_torch(*strided, softmax_scale=0.7, **pack.options)
    want = reference_attention(*copies, softmax_scale=0.7, return_lse=True, **pack.options)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)
    cotangent = torch.randn_like(want[0]).transpose(0, 1).contiguous().transpose(0, 1)
    grads = [torch.autograd.grad(result[0], fused, cotangent)[0] for result in (got, want)]
    torch.testing.assert_close(*grads)


def test_repeats_bit_for_bit():
    """Catches sums in an order that changes from run to run, which would break exact resuming."""
    pack = Pack([300, 77], block_size=16, top_k=3, heads=(4, 2), dtype=torch.float32)
    runs = [with_gradients(moba_torch, *pack.tensors(requires_grad=True), **pack.options) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


def test_autocast_does_not_reach_inside():
    """Catches products in bfloat16 under autocast, when the inputs are float32."""
    pack = Pack([100], block_size=8, top_k=3, dtype=torch.float32)
    tensors = pack.tensors(requires_grad=True)
    expected = with_gradients(moba_torch, *tensors, **pack.options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = with_gradients(moba_torch, *tensors, **pack.options)
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


@pytest.mark.parametrize("heads", [(2, 2), (4, 1)])
def test_computes_little_more_than_what_is_attended(heads):
    """Catches a dense computation behind a mask: counts the FLOPs of all matrix products, forward and backward."""
    length, spec = 4096, Moba(block_size=64, top_k=3)
    pack = Pack([length], block_size=64, top_k=3, heads=heads, head_dim=16, dtype=torch.float32)
    tensors = pack.tensors(requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        with_gradients(moba_torch, *tensors, **pack.options)
    gate = 2 * length * (length // 64) * heads[0] * 16
    # The backward pass computes the scores anew: 7 products where the convention counts 6.
    attended = attention_flops(attended_pairs(spec, [length]), heads[0], 16) * 7 / 6
    dense = attention_flops(causal_pairs([length]), heads[0], 16)
    assert attended < counter.get_total_flops() < 2 * (attended + gate) < 0.35 * dense


def test_workspace_is_bounded():
    """Catches a tensor that grows with T * k * B, or with T * T: none may be larger than the inputs."""
    pack = Pack([2048], block_size=32, top_k=4, heads=(2, 1), dtype=torch.float32)
    tensors = pack.tensors(requires_grad=True)
    sizes = {"PARTIAL_ELEMENTS": 1 << 14, "STEP_ELEMENTS": 1 << 14}
    routing_size = mock.patch.object(routing, "SCORE_ELEMENTS", 1 << 14)
    with mock.patch.multiple(torch_blocks, **sizes), routing_size, LargestTensor() as largest:
        with_gradients(moba_torch, *tensors, **pack.options)
    assert largest.numel <= tensors[0].numel()


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_cuda(dtype):
    """Catches devices mixed up, and atomics that make gradients differ from run to run."""
    pack = Pack([300, 0, 77], block_size=16, top_k=3, heads=(4, 2), head_dim=32, dtype=dtype)
    tensors = [x.detach().cuda().requires_grad_() for x in pack.tensors()]
    options = {**pack.options, "cu_seqlens": pack.options["cu_seqlens"].cuda()}
    runs = [with_gradients(moba_torch, *tensors, **options) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))
    want = with_gradients(reference, *pack.tensors(requires_grad=True), **pack.options)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    assert_same([x.cpu() for x in runs[0]], want, rtol=tolerance, atol=tolerance)
