"""Routing in Triton: block means, gate scores and the running choice of the best blocks, without ever holding T x M
scores.

Scores are <q, mean of keys>, unscaled, to float32 precision. Tensor cores take half-precision inputs, and a mean
rounded to one half-precision number moves thousands of choices; so the mean (summed in float32) is split in two terms,
high + low, and the two products are accumulated in float32. That leaves a relative error of 2^-17 per element of a
bfloat16 mean (2^-22 for float16).
"""

# Triton's stubs know neither launch options, nor that constants become tl.constexpr, nor what its functions return.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moba.backends.triton_lists import Layout, gather_rows, load_rows
from moba.backends.triton_tiles import cdiv, padded, tile_for


def block_means(k: torch.Tensor, layout: Layout, block_size: int) -> torch.Tensor:
    """Mean key of every block as high and low, [H_kv, M, 2, D] in k's dtype with mean = high + low; float32 keys have
    low = 0."""
    num_kv_heads, head_dim = k.shape[1:]
    means = torch.empty(num_kv_heads, layout.num_blocks, 2, head_dim, dtype=k.dtype, device=k.device)
    rows = min(64, max(16, triton.next_power_of_2(block_size)))
    means_kernel[(layout.num_blocks, num_kv_heads)](
        k, layout.start_M, layout.length_M, means, layout.num_blocks,
        NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, BLOCK_D=padded(head_dim), ROWS=rows,
    )  # fmt: skip
    return means


def select_blocks(
    q: torch.Tensor, k: torch.Tensor, layout: Layout, block_size: int, top_k: int, first_blocks: int = 0
) -> torch.Tensor:
    """The blocks each query attends to, int32 [T, H, K]: numbered through the pack, -1 for none, history unordered,
    own block last.

    The rules are those of `moba.reference_selection`; of equal scores the earlier block wins. The same inputs give the
    same bits.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    if top_k == 1:
        return layout.own_block_T[:, None, None].expand(num_tokens, num_heads, 1).contiguous()
    means = block_means(k, layout, block_size)
    selection = torch.empty(num_tokens, num_heads, top_k, dtype=torch.int32, device=q.device)
    best_slots = max(2, triton.next_power_of_2(top_k - 1))
    tile = tile_for("select", head_dim, best_slots, q.dtype)
    select_kernel[(cdiv(num_tokens, tile.rows), num_heads)](
        q, means, layout.first_block_T, layout.own_block_T, selection, num_tokens, layout.num_blocks,
        NUM_HEADS=num_heads, GROUP=num_heads // num_kv_heads, TOP_K=top_k, BEST_SLOTS=best_slots,
        HEAD_DIM=head_dim, BLOCK_D=padded(head_dim), ROWS=tile.rows, BLOCKS=tile.keys, SPLIT=q.dtype != torch.float32,
        FIRST_BLOCKS=first_blocks,
        num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
    )  # fmt: skip
    return selection


@triton.jit(do_not_specialize=["num_blocks"])
def means_kernel(
    k, block_start, block_length, means, num_blocks,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: the mean of one block of one key/value head, summed in float32."""
    block, kv_head = tl.program_id(0), tl.program_id(1)
    start, length = tl.load(block_start + block), tl.load(block_length + block)
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    for first in range(0, length, ROWS):
        key = first + tl.arange(0, ROWS)
        tile = load_rows(k + kv_head * HEAD_DIM, start + key, key < length, NUM_KV_HEADS * HEAD_DIM, HEAD_DIM, BLOCK_D)
        total += tl.sum(tile.to(tl.float32), axis=0)
    mean = total / tl.maximum(length, 1).to(tl.float32)
    mean_high = mean.to(means.dtype.element_ty)
    mean_low = (mean - mean_high.to(tl.float32)).to(means.dtype.element_ty)
    dim = tl.arange(0, BLOCK_D)
    high = means + (kv_head * num_blocks + block).to(tl.int64) * 2 * HEAD_DIM + dim
    tl.store(high, mean_high, mask=dim < HEAD_DIM)
    tl.store(high + HEAD_DIM, mean_low, mask=dim < HEAD_DIM)


@triton.jit(do_not_specialize=["num_tokens", "num_blocks"])
def select_kernel(
    q, means, first_block, own_block, selection, num_tokens, num_blocks,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, TOP_K: tl.constexpr, BEST_SLOTS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, SPLIT: tl.constexpr,
    FIRST_BLOCKS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS queries of one head stream all their history blocks and keep the TOP_K - 1 best.

    Each row holds its best blocks so far, unordered, and the worst value among them as a threshold. A tile of scores
    is searched once, then as long as some row still has a score above its threshold: some seven times in the first
    tiles, about three times later on. The FIRST_BLOCKS first blocks of a document have infinite scores: they stay.
    """
    # Late queries have the longest histories: start with them, so that the short ones fill the end of the launch.
    token = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    inside = token < num_tokens
    query = load_rows(q + head * HEAD_DIM, token, inside, NUM_HEADS * HEAD_DIM, HEAD_DIM, BLOCK_D)
    first = tl.load(first_block + token, mask=inside, other=2147483647)
    own = tl.load(own_block + token, mask=inside, other=0)

    slot = tl.arange(0, BEST_SLOTS)
    # Slots beyond TOP_K - 1 are never the worst. Empty slots have numbers above all blocks, so they are given up first.
    infinity = float("inf")
    best = tl.zeros([ROWS, BEST_SLOTS], dtype=tl.float32) + tl.where(slot < TOP_K - 1, -infinity, infinity)[None, :]
    best_block = tl.zeros([ROWS, BEST_SLOTS], dtype=tl.int32) + (slot + (1 << 30))[None, :]
    worst = tl.zeros([ROWS], dtype=tl.float32) - infinity

    # Tiles before full_end are history of all rows, so they need no mask.
    scan_begin, scan_end = tl.min(first), tl.max(own)
    shortest = tl.min(tl.where(inside, own, 2147483647))
    one_document = tl.max(tl.where(inside, first, 0)) == scan_begin
    full_end = scan_begin + tl.where(one_document, (shortest - scan_begin) // BLOCKS * BLOCKS, 0)
    mean = means + ((head // GROUP).to(tl.int64) * num_blocks + scan_begin) * 2 * HEAD_DIM
    column = tl.arange(0, BLOCKS)
    for tile_begin in range(scan_begin, full_end, BLOCKS):
        block = tile_begin + column
        score = _gate_scores(query, mean, column, HEAD_DIM, BLOCK_D, SPLIT)
        if FIRST_BLOCKS:
            score = tl.where(block[None, :] - first[:, None] < FIRST_BLOCKS, infinity, score)
        best, best_block, worst = keep_best(score, block, best, best_block, worst)
        mean += BLOCKS * 2 * HEAD_DIM
    for tile_begin in range(full_end, scan_end, BLOCKS):
        block = tile_begin + column
        # Past the last block of all there is nothing to read: its mean stands in, and the mask drops its scores.
        score = _gate_scores(query, mean, tl.minimum(column, num_blocks - 1 - tile_begin), HEAD_DIM, BLOCK_D, SPLIT)
        if FIRST_BLOCKS:
            score = tl.where(block[None, :] - first[:, None] < FIRST_BLOCKS, infinity, score)
        is_history = (block[None, :] >= first[:, None]) & (block[None, :] < own[:, None])
        score = tl.where(is_history, score, -infinity)
        best, best_block, worst = keep_best(score, block, best, best_block, worst)
        mean += BLOCKS * 2 * HEAD_DIM

    picks = (token * NUM_HEADS + head).to(tl.int64) * TOP_K
    best_block = tl.where(best > -infinity, best_block, -1)
    tl.store(selection + picks[:, None] + slot[None, :], best_block, mask=inside[:, None] & (slot < TOP_K - 1)[None, :])
    tl.store(selection + picks + TOP_K - 1, own, mask=inside)


@triton.jit
def _gate_scores(query, mean, row, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr):
    """float32 [ROWS, BLOCKS]: <q, high + low> of the blocks `row` from `mean` on. High and low lie side by side, so
    that one address serves both."""
    score = tl.dot(query, tl.trans(gather_rows(mean, 2 * row, HEAD_DIM, BLOCK_D)))
    if SPLIT:
        score = tl.dot(query, tl.trans(gather_rows(mean + HEAD_DIM, 2 * row, HEAD_DIM, BLOCK_D)), score)
    return score


@triton.jit
def keep_best(score, block, best, best_block, worst):
    """(best, best_block, worst) after the blocks of one tile of scores. The first round comes without a check: nearly
    every tile has a better score for some row."""
    top = tl.max(score, axis=1)
    score, top, best, best_block, worst = _take_top(score, top, block, best, best_block, worst)
    while tl.max((top > worst).to(tl.int32), axis=0) > 0:
        score, top, best, best_block, worst = _take_top(score, top, block, best, best_block, worst)
    return best, best_block, worst


@triton.jit
def _take_top(score, top, block, best, best_block, worst):
    """One round: in rows whose top score is above their worst kept one, the earliest block of those that have it
    replaces that one, of equals the latest."""
    top_block = tl.min(tl.where(score == top[:, None], block[None, :], 2147483647), axis=1)
    given_up = tl.max(tl.where(best == worst[:, None], best_block, -1), axis=1)
    replaced = (best_block == given_up[:, None]) & (top > worst)[:, None]
    best = tl.where(replaced, top[:, None], best)
    best_block = tl.where(replaced, top_block[:, None], best_block)
    score = tl.where(block[None, :] == top_block[:, None], -float("inf"), score)
    worst = tl.min(best, axis=1)  # before the next top: the other way round a round takes a quarter more instructions
    top = tl.max(score, axis=1)
    return score, top, best, best_block, worst
