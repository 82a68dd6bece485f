"""How many (query, key) pairs an attention pattern computes, and the FLOPs of that: closed forms in integers.

The counts are exact, not estimates: whatever the gate selects, a query has as many history blocks as there are, up to
top_k - 1, and each of them is complete. Only which blocks they are depends on the data.
"""

from __future__ import annotations

from collections.abc import Sequence

from moba.spec import AttentionSpec


def attended_pairs(spec: AttentionSpec, lengths: Sequence[int]) -> int:
    """Number of (query, key) pairs that one head computes over documents of these lengths (tokens).

    A query at position p of its document sees min(p // B, top_k - 1) blocks of B keys, and the p % B + 1 keys of its
    own block up to itself. With a sliding window it sees min(p + 1, window) keys.
    """
    if spec.kind == "full":
        return causal_pairs(lengths)
    if spec.kind == "sliding":
        return sum(_sliding_pairs(length, spec.window) for length in lengths)
    return sum(_moba_pairs(length, spec.block_size, spec.top_k) for length in lengths)


def causal_pairs(lengths: Sequence[int]) -> int:
    """Number of (query, key) pairs of full causal attention, per head, over documents of these lengths (tokens)."""
    return sum(length * (length + 1) // 2 for length in lengths)


def attention_flops(pairs: int, num_heads: int, head_dim: int, backward: bool = True) -> int:
    """FLOPs of attention over `pairs` pairs a head, in all heads.

    Convention: 2 FLOPs a multiply-add and two products (QK^T and PV) make 4 * pairs * num_heads * head_dim for the
    forward pass; the backward pass counts twice that (its four products; recomputed scores do not count). Softmax,
    routing and merging are left out.
    """
    return 4 * pairs * num_heads * head_dim * (3 if backward else 1)


def _moba_pairs(length: int, block_size: int, top_k: int) -> int:
    num_complete, tail = divmod(length, block_size)
    own = num_complete * causal_pairs([block_size]) + causal_pairs([tail])
    # Queries of block i see min(i, top_k - 1) earlier blocks: a triangle while history is short, then a band.
    growing = min(num_complete, top_k)
    history_blocks = growing * (growing - 1) // 2 + (num_complete - growing) * (top_k - 1)
    history = history_blocks * block_size**2 + tail * min(num_complete, top_k - 1) * block_size
    return own + history


def _sliding_pairs(length: int, window: int) -> int:
    growing = min(length, window)
    return causal_pairs([growing]) + (length - growing) * window
