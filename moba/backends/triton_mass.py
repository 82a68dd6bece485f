"""How much of full attention each block holds, in Triton: log-sum-exps of queries' products with the keys of each block
that they see, without ever holding the products.

A program takes a tile of queries of one head through a stretch of blocks, from their documents' first to their own.
Products of half-precision inputs are exact and summed in float32; those of float32 inputs are float32, no TF32.
"""

# Triton's stubs know neither launch options, nor that constants become tl.constexpr, nor what its functions return.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moba.backends.refusals import TRITON_HEAD_DIM
from moba.backends.triton_attention import device_of
from moba.backends.triton_forward import LOG2_E
from moba.backends.triton_lists import load_rows
from moba.backends.triton_tiles import padded

STRETCH = 2048
"""Keys, or one block, of a program: short enough that a few queries of a long document fill a GPU."""


def takes(q: torch.Tensor) -> bool:
    """Whether the kernel computes with such queries."""
    return q.dtype in (torch.float16, torch.bfloat16, torch.float32) and q.shape[-1] <= TRITON_HEAD_DIM


@torch.compiler.disable()  # it is launched as it is: there is nothing to fuse it with
def block_log_mass(
    q_CHD: torch.Tensor,
    k: torch.Tensor,
    start_M: torch.Tensor,
    first_C: torch.Tensor,
    own_C: torch.Tensor,
    last_key_C: torch.Tensor,
    blocks: slice,
    block_size: int,
    softmax_scale: float,
) -> torch.Tensor:
    """float32 [H, C, m]: log-sum-exp of the scaled products of queries with the keys up to `last_key_C` of each of the
    `blocks` of a pack, -inf for those before block `first_C` or after block `own_C`. `start_M` is the first key of each
    block; all these count through the pack of keys k [S, G, D]."""
    num_queries, num_heads, head_dim = q_CHD.shape
    num_keys, num_kv_heads, width = k.shape[0], k.shape[1], blocks.stop - blocks.start
    out_HCm = torch.full((num_heads, num_queries, width), float("-inf"), dtype=torch.float32, device=q_CHD.device)
    is_half = q_CHD.dtype != torch.float32
    rows, keys = (64, 64) if is_half else (32, 32)
    lanes = triton.next_power_of_2(block_size)  # of a block, if it is shorter than a tile
    stretch = max(1, STRETCH // max(lanes, keys)) * max(1, keys // lanes)
    grid = (triton.cdiv(num_queries, rows), num_heads, triton.cdiv(width, stretch))
    if out_HCm.numel():
        with device_of(q_CHD):
            block_mass_kernel[grid](
                q_CHD.contiguous(), k.contiguous(), start_M, first_C, own_C, last_key_C, out_HCm, num_queries, num_keys,
                blocks.start, blocks.stop, stretch, block_size, softmax_scale * LOG2_E,
                NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, BLOCK_D=padded(head_dim),
                ROWS=rows, KEYS=keys, LANES=min(lanes, keys), num_warps=4, num_stages=2,
            )  # fmt: skip
    return out_HCm


@triton.jit(do_not_specialize=["num_queries", "num_keys", "low", "high", "stretch", "block_size"])
def block_mass_kernel(
    q, k, block_start, first_block, own_block, last_key, out, num_queries, num_keys, low, high, stretch, block_size,
    scale,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One program: ROWS queries of one head and `stretch` blocks. A tile of KEYS keys holds KEYS // LANES blocks, or a
    part of one. `scale` makes exponents of 2."""
    # Late queries see most blocks: start with them, so that short programs fill the end of the launch.
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    inside = row < num_queries
    first = tl.load(first_block + row, mask=inside, other=2147483647).to(tl.int32)
    own = tl.load(own_block + row, mask=inside, other=-1).to(tl.int32)
    last = tl.load(last_key + row, mask=inside, other=-1).to(tl.int32)
    begin = low + tl.program_id(2) * stretch
    end = tl.minimum(tl.minimum(begin + stretch, high), tl.max(own) + 1)
    begin = tl.maximum(begin, tl.min(first))

    query = load_rows(q + head * HEAD_DIM, row, inside, NUM_HEADS * HEAD_DIM, HEAD_DIM, BLOCK_D)
    k += (head // (NUM_HEADS // NUM_KV_HEADS)) * HEAD_DIM
    out += (head.to(tl.int64) * num_queries + row) * (high - low) - low
    BLOCKS: tl.constexpr = KEYS // LANES
    lane, column = tl.arange(0, KEYS), tl.arange(0, BLOCKS)
    for tile_begin in range(begin, end, BLOCKS):
        top = tl.zeros([ROWS, BLOCKS], dtype=tl.float32) - float("inf")
        total = tl.zeros([ROWS, BLOCKS], dtype=tl.float32)
        block = tile_begin + lane // LANES
        start = tl.load(block_start + block, mask=block < end, other=num_keys).to(tl.int32)
        for piece_begin in range(0, block_size, LANES):
            place = piece_begin + lane % LANES
            key = start + place
            in_block = (place < block_size) & (key < num_keys)
            tile = load_rows(k, key, in_block, NUM_KV_HEADS * HEAD_DIM, HEAD_DIM, BLOCK_D)
            score = tl.dot(query, tl.trans(tile), input_precision="ieee") * scale
            is_seen = in_block[None, :] & (key[None, :] <= last[:, None]) & (block[None, :] >= first[:, None])
            score = tl.reshape(tl.where(is_seen, score, -float("inf")), [ROWS, BLOCKS, LANES])
            new_top = tl.maximum(top, tl.max(score, axis=2))
            from_top = tl.where(new_top == -float("inf"), 0.0, new_top)
            weight = tl.exp2(score - from_top[:, :, None])
            total = total * tl.exp2(top - from_top) + tl.sum(weight, axis=2)
            top = new_top
        block = tile_begin + column
        log_mass = (top + tl.log2(total)) * 0.6931471805599453
        tl.store(out[:, None] + block[None, :], log_mass, mask=inside[:, None] & (block < end)[None, :])
