"""MoBA of one new token per sequence over cached keys and values, in Triton: score, select, attend in splits, merge.

Each query head picks its own blocks by the cached means, as in training (moba/routing.py), and only those are read. A
program takes a piece of one selected block, so that even a batch of one keeps the whole GPU busy; the pieces' partial
results are merged in a fixed order, and nothing is added by atomics: the same inputs give the same bits. Programs of
heads that share keys lie side by side and mostly pick the same blocks, so that the second reads them from the cache.

Four launches whatever the length and the batch, and no waiting for the device, so a step can be captured in a CUDA
graph: lengths are values on the device.

Shapes: N sequences, H query heads, G key/value heads, D head size, B block size, K = top_k.
"""

# Triton's stubs know neither launch options, nor that constants become tl.constexpr, nor what its functions return.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba.backends.triton_attention import device_of
from moba.backends.triton_routing import keep_best
from moba.backends.triton_tiles import padded
from moba.documents import Documents
from moba.routing import layout_means

PIECE_KEYS = 128
"""Keys of one program, at most."""
TILE_KEYS = 32
MEANS_TILE = 32
"""Means of one program of the scores."""
SELECT_TILE = 256
"""Scores that the one warp of a selection looks at together."""


def moba_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    means: Tensor,
    key_start_N: Tensor,
    length_N: Tensor,
    mean_start_N: Tensor,
    *,
    max_length: int,
    block_size: int,
    top_k: int,
    first_blocks: int = 0,
    softmax_scale: float | None = None,
    selection: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(attention [N, H, D] of the newest token of each sequence, log-sum-exp float32 [H, N], selection int32 [H, N, K]
    as of `moba.route`).

    q is [N, H, D]; k and v are [S, G, D], copied unless their strides agree and the last is 1. Sequence n has the
    length_N[n] rows from key_start_N[n] on, its new token's last. means, float32 [M, G, D], has its block i in row
    mean_start_N[n] + i; those of the blocks before the new token's are read. Integers are int64 on the device, and
    `max_length` on the host bounds the lengths. A sequence of length 0 gives zeros, -inf and -1. No gradient. Rows
    outside the selected blocks are never read. `selection`: to be used instead of routing.
    """
    num_sequences, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    if k.stride() != v.stride() or k.stride(2) != 1:
        k, v = k.contiguous(), v.contiguous()
    assert means.is_contiguous() and means.dtype == torch.float32, (means.stride(), means.dtype)
    q = q.contiguous()
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    piece_keys = min(PIECE_KEYS, max(16, triton.next_power_of_2(block_size)))
    num_pieces = triton.cdiv(block_size, piece_keys)
    partial = torch.empty(num_sequences, num_heads, top_k * num_pieces, head_dim, dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(partial.shape[:3], dtype=torch.float32, device=q.device)
    out, lse = torch.empty_like(q), torch.empty(num_heads, num_sequences, dtype=torch.float32, device=q.device)
    sizes = {"NUM_HEADS": num_heads, "HEAD_DIM": head_dim, "BLOCK_D": padded(head_dim), "TOP_K": top_k}
    groups = {"NUM_KV_HEADS": num_kv_heads, "BLOCK_SIZE": block_size}
    if selection is None:
        selection = torch.empty(num_heads, num_sequences, top_k, dtype=torch.int32, device=q.device)
        max_blocks = max(1, (max_length - 1) // block_size)
        scores = torch.empty(num_sequences, num_heads, max_blocks, dtype=torch.float32, device=q.device)
        if top_k > 1:
            decode_scores_kernel[(num_heads, triton.cdiv(max_blocks, MEANS_TILE), num_sequences)](
                q, means, length_N, mean_start_N, scores, max_blocks,
                NUM_HEADS=num_heads, HEAD_DIM=head_dim, BLOCK_D=padded(head_dim), **groups, BLOCKS=MEANS_TILE,
                FIRST_BLOCKS=first_blocks, num_warps=4,
            )  # fmt: skip
        decode_select_kernel[(num_heads, num_sequences)](
            scores, length_N, selection, max_blocks, NUM_HEADS=num_heads, TOP_K=top_k, BLOCK_SIZE=block_size,
            BEST_SLOTS=max(2, triton.next_power_of_2(top_k - 1)), BLOCKS=SELECT_TILE, num_warps=1,
        )  # fmt: skip
    selection = selection.contiguous()
    decode_attend_kernel[(num_heads, top_k * num_pieces, num_sequences)](
        q, k, v, key_start_N, length_N, selection, partial, partial_lse, k.stride(0), k.stride(1),
        scale * 1.4426950408889634,
        **sizes, **groups, PIECES=num_pieces, PIECE=piece_keys, KEYS=min(TILE_KEYS, piece_keys), num_warps=4,
    )  # fmt: skip
    decode_merge_kernel[(num_heads, num_sequences)](
        partial, partial_lse, out, lse,
        NUM_HEADS=num_heads, HEAD_DIM=head_dim, BLOCK_D=padded(head_dim), PARTS=top_k * num_pieces,
        PARTS_PADDED=triton.next_power_of_2(top_k * num_pieces), num_warps=4,
    )  # fmt: skip
    return out, lse, selection


def moba_of_last_tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    *,
    block_size: int,
    top_k: int,
    first_blocks: int = 0,
    softmax_scale: float | None = None,
    selection: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out [N, H, D], log-sum-exp float32 [H, N]) of the last token of each document, from keys [S, G, D] alone: the
    means are made anew, so that all keys are read, but only the values of selected blocks."""
    layout = documents.layout(block_size)
    assert documents.cu_seqlens_k is not None and documents.lengths_k is not None, documents
    bounds_N = documents.cu_seqlens_k.long()
    with device_of(q):
        out, lse, _ = moba_decode(
            q, k, v, layout_means(k, layout), bounds_N[:-1],
            bounds_N.diff(), layout.first_block_N[:-1], max_length=documents.longest_k, block_size=block_size,
            top_k=top_k, first_blocks=first_blocks, softmax_scale=softmax_scale, selection=selection,
        )  # fmt: skip
    return out, lse


@triton.jit(do_not_specialize=["max_blocks"])
def decode_scores_kernel(
    q, means, lengths, mean_starts, scores, max_blocks,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCKS: tl.constexpr, FIRST_BLOCKS: tl.constexpr,
):  # fmt: skip
    """One program: the scores of one head's query with BLOCKS means in float32; infinite for the first blocks."""
    head, sequence = tl.program_id(0), tl.program_id(2)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    own = (tl.load(lengths + sequence).to(tl.int32) - 1) // BLOCK_SIZE
    if tl.program_id(1) * BLOCKS < own:
        row = (sequence * NUM_HEADS + head).to(tl.int64)
        dim = tl.arange(0, BLOCK_D)
        query = tl.load(q + row * HEAD_DIM + dim, mask=dim < HEAD_DIM, other=0.0).to(tl.float32)
        means += (tl.load(mean_starts + sequence) * NUM_KV_HEADS + head // (NUM_HEADS // NUM_KV_HEADS)) * HEAD_DIM
        address = block[:, None].to(tl.int64) * (NUM_KV_HEADS * HEAD_DIM) + dim[None, :]
        mean = tl.load(means + address, mask=(block < own)[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
        score = tl.where(block < FIRST_BLOCKS, float("inf"), tl.sum(mean * query[None, :], axis=1))
        tl.store(scores + row * max_blocks + block, score, mask=block < own)


@triton.jit(do_not_specialize=["max_blocks"])
def decode_select_kernel(
    scores, lengths, selection, max_blocks,
    NUM_HEADS: tl.constexpr, TOP_K: tl.constexpr, BLOCK_SIZE: tl.constexpr, BEST_SLOTS: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """One program: the blocks of one head of one sequence, the history ascending behind -1s, the own one last."""
    head, sequence = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + sequence).to(tl.int32)
    own = tl.where(length > 0, (length - 1) // BLOCK_SIZE, -1)
    picks = selection + (head * tl.num_programs(1) + sequence).to(tl.int64) * TOP_K
    tl.store(picks + TOP_K - 1, own)
    if TOP_K > 1:
        scores += (sequence * NUM_HEADS + head).to(tl.int64) * max_blocks
        slot = tl.arange(0, BEST_SLOTS)
        infinity = float("inf")
        # As in select_kernel: slots beyond TOP_K - 1 are never the worst, empty ones have numbers above all blocks.
        best = tl.zeros([1, BEST_SLOTS], dtype=tl.float32) + tl.where(slot < TOP_K - 1, -infinity, infinity)[None, :]
        best_block = tl.zeros([1, BEST_SLOTS], dtype=tl.int32) + (slot + (1 << 30))[None, :]
        worst = tl.zeros([1], dtype=tl.float32) - infinity
        for first in range(0, own, BLOCKS):
            block = first + tl.arange(0, BLOCKS)
            score = tl.load(scores + block, mask=block < own, other=-infinity)
            best, best_block, worst = keep_best(score[None, :], block, best, best_block, worst)
        # Slots in order: empty ones first, then the blocks ascending, then those that are not in use.
        kept = tl.sum(tl.where(best > -infinity, best_block, slot[None, :] - BEST_SLOTS), axis=0)
        rank = tl.sum((kept[None, :] < kept[:, None]).to(tl.int32), axis=1)
        tl.store(picks + rank, tl.maximum(kept, -1), mask=rank < TOP_K - 1)


@triton.jit
def decode_attend_kernel(
    q, k, v, key_starts, lengths, selection, partial, partial_lse, token_stride, head_stride, scale_log2,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TOP_K: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, PIECES: tl.constexpr, PIECE: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """One program: one head's query over one piece of one block that it selected; its softmax, normalised, and the
    log2 of its sum."""
    head, part, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    block = tl.load(selection + (head * tl.num_programs(2) + sequence).to(tl.int64) * TOP_K + part // PIECES)
    length = tl.load(lengths + sequence).to(tl.int32)
    begin = block * BLOCK_SIZE + part % PIECES * PIECE
    end = tl.minimum(tl.minimum(begin + PIECE, (block + 1) * BLOCK_SIZE), length)
    end = tl.where(block < 0, begin, end)

    row = (sequence * NUM_HEADS + head).to(tl.int64)
    dim = tl.arange(0, BLOCK_D)
    query = tl.load(q + row * HEAD_DIM + dim, mask=dim < HEAD_DIM, other=0.0).to(tl.float32) * scale_log2
    kv_head = (head // (NUM_HEADS // NUM_KV_HEADS)).to(tl.int64)
    base = tl.load(key_starts + sequence) * token_stride + kv_head * head_stride
    top = float("-inf")
    total = 0.0
    out = tl.zeros([BLOCK_D], dtype=tl.float32)
    for first in range(begin, end, KEYS):
        key = first + tl.arange(0, KEYS)
        address = base + key[:, None].to(tl.int64) * token_stride + dim[None, :]
        inside = (key < end)[:, None] & (dim < HEAD_DIM)[None, :]
        key_tile = tl.load(k + address, mask=inside, other=0.0).to(tl.float32)
        value_tile = tl.load(v + address, mask=inside, other=0.0).to(tl.float32)
        score = tl.where(key < end, tl.sum(key_tile * query[None, :], axis=1), float("-inf"))
        new_top = tl.maximum(top, tl.max(score, axis=0))
        weight = tl.exp2(score - new_top)
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(weight, axis=0)
        out = out * decay + tl.sum(value_tile * weight[:, None], axis=0)
        top = new_top
    place = row * (TOP_K * PIECES) + part
    is_empty = begin >= end
    tl.store(partial + place * HEAD_DIM + dim, out / tl.where(is_empty, 1.0, total), mask=dim < HEAD_DIM)
    tl.store(partial_lse + place, tl.where(is_empty, float("-inf"), top + tl.log2(tl.where(is_empty, 1.0, total))))


@triton.jit
def decode_merge_kernel(
    partial, partial_lse, out, lse,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
    PARTS_PADDED: tl.constexpr,
):  # fmt: skip
    """One program: the output of one head of one sequence from its parts, in their order."""
    head, sequence = tl.program_id(0), tl.program_id(1)
    row = (sequence * NUM_HEADS + head).to(tl.int64)
    part = tl.arange(0, PARTS_PADDED)
    parts_lse = tl.load(partial_lse + row * PARTS + part, mask=part < PARTS, other=float("-inf"))
    top = tl.max(parts_lse, axis=0)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(parts_lse - top), axis=0)
    dim = tl.arange(0, BLOCK_D)
    result = tl.zeros([BLOCK_D], dtype=tl.float32)
    for i in range(PARTS):
        weight = tl.exp2(tl.load(partial_lse + row * PARTS + i) - top)
        result += weight * tl.load(partial + (row * PARTS + i) * HEAD_DIM + dim, mask=dim < HEAD_DIM, other=0.0)
    result = result / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * HEAD_DIM + dim, result.to(out.dtype.element_ty), mask=dim < HEAD_DIM)
    row_lse = (top + tl.log2(total)) * 0.6931471805599453
    tl.store(lse + head.to(tl.int64) * tl.num_programs(1) + sequence, row_lse)
