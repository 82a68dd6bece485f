"""How many (query, key) pairs an attention pattern computes, and the FLOPs of that: closed forms in integers.

The counts are exact, not estimates: whatever the gate selects, a query has as many history blocks as there are, up to
top_k - 1, and each of them is complete. Only which blocks they are depends on the data. Each kind counts its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from moba.kinds import AttentionSpec
from moba.kinds.base import causal_pairs as _causal_pairs


def attended_pairs(spec: AttentionSpec, lengths: Sequence[int]) -> int:
    """Returns the number of (query, key) pairs that one head computes over documents of these lengths (tokens)."""
    return sum(spec.attended_pairs(length) for length in lengths)


def causal_pairs(lengths: Sequence[int]) -> int:
    """Returns the number of (query, key) pairs of full causal attention, per head, over documents of these lengths."""
    return sum(_causal_pairs(length) for length in lengths)


def attention_flops(pairs: int, num_heads: int, head_dim: int, backward: bool = True) -> int:
    """Returns the FLOPs of attention over `pairs` pairs per head, summed over all heads.

    Convention: 2 FLOPs per multiply-add and two products (QK^T and PV) give 4 * pairs * num_heads * head_dim for the
    forward pass; the backward pass counts twice that (four products; recomputed scores are not counted). Softmax,
    routing and merging are not counted.
    """
    return 4 * pairs * num_heads * head_dim * (3 if backward else 1)
