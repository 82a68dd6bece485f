"""Pair counts against counting the ones of real masks."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moba.flops import attended_pairs, attention_flops, causal_pairs
from moba.kinds import Full, Moba, Sliding
from moba.reference import _mask, reference_selection

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=4)


@settings(deadline=None, max_examples=30)
@given(LENGTHS, st.integers(1, 12), st.integers(1, 5), st.integers(0, 99))
def test_pairs_are_those_of_the_masks(lengths, block_size, top_k, seed):
    """Catches a miscount of partial own blocks, of queries with little history, or of tails."""
    counted = 0
    for length in lengths:
        x = torch.randn(length, 1, 4, generator=torch.Generator().manual_seed(seed))
        selection = reference_selection(x, x, block_size=block_size, top_k=top_k)
        counted += int(_mask(selection[0], length, block_size).sum())
    assert attended_pairs(Moba(block_size, top_k), lengths) == counted


@settings(deadline=None, max_examples=30)
@given(LENGTHS, st.integers(1, 12))
def test_full_is_the_limit(lengths, block_size):
    """Catches a dense count that sparse attention could exceed or not reach."""
    dense = sum(sum(range(1, length + 1)) for length in lengths)
    assert causal_pairs(lengths) == attended_pairs(Full(), lengths) == dense
    enough = Moba(block_size, -(-max(1, *lengths, 1) // block_size))
    assert attended_pairs(enough, lengths) == dense
    assert attended_pairs(Moba(block_size, 1), lengths) == attended_pairs(
        Full(), [min(block_size, n - i) for n in lengths for i in range(0, n, block_size)]
    )


@settings(deadline=None, max_examples=30)
@given(LENGTHS, st.integers(1, 45))
def test_sliding_pairs_are_counted(lengths, window):
    """Catches a miscount of the queries at the start, whose window is not full yet, or of the own token."""
    counted = sum(min(p + 1, window) for length in lengths for p in range(length))
    assert attended_pairs(Sliding(window=window), lengths) == counted


def test_paper_figures():
    """Catches counts off by a factor at real sizes: 32K with 2048 x 3 computes about a third of the causal pairs."""
    share = attended_pairs(Moba(2048, 3), [32768]) / causal_pairs([32768])
    blocks = 32768 // 2048
    by_blocks = (blocks * 0.5 + (0 + 1 + 2 * (blocks - 2))) / (blocks**2 / 2)
    assert abs(share - by_blocks) < 1e-3


def test_flops_convention():
    """Catches a changed convention: 4 pairs H D forward, three times that with the backward pass."""
    assert attention_flops(10, 4, 8, backward=False) == 1280
    assert attention_flops(10, 4, 8) == 3840
