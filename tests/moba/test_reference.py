"""The definition against what can be said without it: examples by hand, and the cases where MoBA is something known."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from packs import Pack, bounds, drops_and_keeps, packs, plain_full_attention

from moba.reference import reference_attention, reference_selection


def column(values):
    """One head of size 1: [T, 1, 1], float64."""
    return torch.tensor(values, dtype=torch.float64)[:, None, None]


def test_selection_by_hand():
    """Catches a wrong rule: own block missing, an incomplete or future block competing, ties to the later block."""
    k = column([1, 1, 5, 5, 1, 1, 9, 9, 0])  # means of blocks of 2: 1, 5, 1, 9, and a tail
    q = column([1] * 8 + [-1])
    selection = reference_selection(q, k, block_size=2, top_k=3)[0].tolist()
    assert selection == [
        [-1, -1, 0],
        [-1, -1, 0],
        [-1, 0, 1],
        [-1, 0, 1],
        [0, 1, 2],
        [0, 1, 2],
        [0, 1, 3],  # blocks 0 and 2 score the same: the earlier
        [0, 1, 3],
        [0, 2, 4],  # a negative query prefers the smallest means
    ]


def test_selection_of_later_queries_by_hand():
    """Catches a last complete block that later queries of the same document cannot reach, and a tail that they can."""
    k = column([1, 1, 7, 7, 3])
    assert reference_selection(
        column([1]), k, block_size=2, top_k=2, cu_seqlens=bounds([1]), cu_seqlens_k=bounds([5])
    ).tolist() == [[[1, 2]]]


def test_attention_by_hand():
    """Catches a wrong scale, mask or log-sum-exp: one query, three of five keys, written out."""
    k, v = column([2, 0, 1, 1, 3]), column([1, 2, 3, 4, 5])
    q = column([0, 0, 0, 0, 1])
    out, lse = reference_attention(q, k, v, block_size=2, top_k=2, softmax_scale=0.5, return_lse=True)
    weights = {0: math.exp(1), 1: math.exp(0), 4: math.exp(1.5)}  # block 0 (mean 1) ties with block 1 and is earlier
    total = sum(weights.values())
    assert out[4].item() == pytest.approx((weights[0] * 1 + weights[1] * 2 + weights[4] * 5) / total)
    assert lse[0, 4].item() == pytest.approx(math.log(total))


@settings(deadline=None, max_examples=15)
@given(packs(top_k=1))
def test_top_k_1_is_block_local(pack):
    """Catches k = 1 falling back to full attention: blocks as documents of their own must give the same."""
    pack = replace(pack, extra=None)
    q, k, v = pack.tensors()
    blocks = [min(pack.block_size, n - i) for n in pack.lengths for i in range(0, n, pack.block_size)]
    torch.testing.assert_close(reference_attention(q, k, v, **pack.options), plain_full_attention(q, k, v, blocks))


@settings(deadline=None, max_examples=15)
@given(packs())
def test_all_blocks_is_full_attention(pack):
    """Catches a block or document that is lost or leaks when everything is selected."""
    lengths_k = [a + b for a, b in zip(pack.lengths, pack.extra or [0] * 4)]
    enough = replace(pack, top_k=-(-max(1, *lengths_k) // pack.block_size))
    q, k, v = enough.tensors()
    got = reference_attention(q, k, v, **enough.options)
    torch.testing.assert_close(got, plain_full_attention(q, k, v, pack.lengths, lengths_k))


def test_prefill_in_chunks_is_prefill_at_once():
    """Catches cu_seqlens_k that misplaces queries: its last queries alone must get what they got in it."""
    pack = Pack([37, 22], block_size=4, top_k=3, heads=(4, 2))
    q, k, v = pack.tensors()
    whole = reference_attention(q, k, v, **pack.options)
    last = torch.cat([torch.arange(37 - 9, 37), torch.arange(37 + 22 - 5, 37 + 22)])
    part = reference_attention(
        q[last], k, v, block_size=4, top_k=3, cu_seqlens=bounds([9, 5]), cu_seqlens_k=bounds([37, 22])
    )
    torch.testing.assert_close(part, whole[last])
    assert all(drops_and_keeps(reference_selection(q, k, **pack.options)))


def test_gradients_by_finite_differences():
    """Catches a gradient through the gate or a mask that breaks autograd; float64."""
    pack = Pack([8, 0, 3], block_size=2, top_k=2, heads=(2, 1), head_dim=2)
    inputs = pack.tensors(requires_grad=True)
    assert all(drops_and_keeps(reference_selection(*inputs[:2], **pack.options)))
    assert torch.autograd.gradcheck(lambda q, k, v: reference_attention(q, k, v, **pack.options), inputs)


def test_half_precision_is_computed_in_float32():
    """Catches means or softmax in bfloat16: the result must be that of float32, rounded once."""
    pack = Pack([40], block_size=4, top_k=3, dtype=torch.bfloat16)
    q, k, v = pack.tensors()
    out, lse = reference_attention(q, k, v, return_lse=True, **pack.options)
    wide_out, wide_lse = reference_attention(q.float(), k.float(), v.float(), return_lse=True, **pack.options)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(out, wide_out.bfloat16())
    assert torch.equal(lse, wide_lse)
