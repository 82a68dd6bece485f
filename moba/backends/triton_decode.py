"""MoBA of one new token per sequence over cached keys and values, in Triton: score, select, attend in splits, merge.

Each query head picks its own blocks by the cached means, as in training (moba/routing.py), and only those are read. A
program takes a piece of one selected block, so that even a batch of one keeps the whole GPU busy, and computes it for
all heads of the group that selected it: keys that heads share are read once. The pieces' partial results are merged in
a fixed order, and nothing is added by atomics: the same inputs give the same bits.

Three launches whatever the length and the batch, and no waiting for the device, so a step can be captured in a CUDA
graph: lengths are values on the device. For a batch of one they take as long as the work itself. So on Hopper and newer
the second and the third begin while the one before still runs (programmatic dependent launch): they read what it does
not write, wait for its end, and go on.

Shapes: N sequences, H query heads, G key/value heads, D head size, B block size, K = top_k.
"""

# Triton's stubs know neither launch options, nor that constants become tl.constexpr, nor what its functions return.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba.backends.triton_attention import INTERPRETED, device_of
from moba.backends.triton_forward import LOG2_E
from moba.backends.triton_tiles import padded
from moba.documents import Documents
from moba.routing import layout_means

PIECE_KEYS = 128
"""Keys of one program, at most."""
TILE_KEYS = 64
WARPS, STAGES = 4, 2
SCORES_TILE, SCORES_NUMBERS, SCORES_WARPS = 256, 1 << 15, 8
"""Scores that a program looks at together, and numbers of their means, at most."""
LOWEST, HIGHEST = tl.constexpr(-(1 << 63)), tl.constexpr((1 << 63) - 1)
MERGED_PARTS = 32
"""Partial results that a program merges together."""


def moba_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    means: Tensor,
    key_start_N: Tensor,
    length_N: Tensor,
    mean_start_N: Tensor,
    *,
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
    mean_start_N[n] + i; those of the blocks before the new token's are read. Integers are int64 on the
    device. A sequence of length 0 gives zeros, -inf and -1. No gradient. Rows outside the selected blocks are never
    read. `selection`: to be used instead of routing.
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
    overlaps = overlapping(q.device)
    after = {"launch_pdl": True} if overlaps else {}
    after_selection = after if selection is None else {}
    if selection is None:
        selection = torch.empty(num_heads, num_sequences, top_k, dtype=torch.int32, device=q.device)
        decode_select_kernel[(num_heads, num_sequences)](
            q, means, length_N, mean_start_N, selection, **sizes, **groups, FIRST_BLOCKS=first_blocks,
            BEST_SLOTS=max(2, triton.next_power_of_2(top_k - 1)),
            BLOCKS=min(SCORES_TILE, SCORES_NUMBERS // padded(head_dim)), CHUNKS=max(1, padded(head_dim) // 32),
            OVERLAPS=overlaps, num_warps=SCORES_WARPS,
        )  # fmt: skip
    selection = selection.contiguous()
    decode_attend_kernel[(num_heads, top_k * num_pieces, num_sequences)](
        q, k, v, key_start_N, length_N, selection, partial, partial_lse, k.stride(0), k.stride(1),
        scale * LOG2_E,
        **sizes, **groups, GROUP=max(16, triton.next_power_of_2(num_heads // num_kv_heads)),
        SLOTS=triton.next_power_of_2(top_k), PIECES=num_pieces, PIECE=piece_keys, KEYS=min(TILE_KEYS, piece_keys),
        OVERLAPS=overlaps, num_warps=WARPS, num_stages=STAGES, **after_selection,
    )  # fmt: skip
    parts = top_k * num_pieces
    decode_merge_kernel[(num_heads, num_sequences)](
        partial, partial_lse, out, lse,
        NUM_HEADS=num_heads, HEAD_DIM=head_dim, BLOCK_D=padded(head_dim), PARTS=parts,
        ALL_PARTS=triton.next_power_of_2(parts), TOGETHER=min(MERGED_PARTS, triton.next_power_of_2(parts)),
        OVERLAPS=overlaps, num_warps=4, **after,
    )  # fmt: skip
    return out, lse, selection


def overlapping(device: torch.device) -> bool:
    """Whether a kernel there may begin before the one that it depends on has ended."""
    if device.type != "cuda" or torch.version.hip is not None or INTERPRETED:
        return False
    # torch.compile does not know the launch option.
    return torch.cuda.get_device_capability(device) >= (9, 0) and not torch.compiler.is_compiling()


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
            bounds_N.diff(), layout.first_block_N[:-1], block_size=block_size, top_k=top_k,
            first_blocks=first_blocks, softmax_scale=softmax_scale, selection=selection,
        )  # fmt: skip
    return out, lse


@triton.jit
def decode_select_kernel(
    q, means, lengths, mean_starts, selection,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TOP_K: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, FIRST_BLOCKS: tl.constexpr, BEST_SLOTS: tl.constexpr,
    BLOCKS: tl.constexpr, CHUNKS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """One program: the blocks of one head of one sequence, the history ascending behind -1s, the own one last.

    Scores are float32, infinite for the first blocks. A score and its block are one int64 that sorts by score, then
    earlier blocks first, so that the best of a tile is found by one reduction.
    """
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
    head, sequence = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + sequence).to(tl.int32)
    mean_start = tl.load(mean_starts + sequence)
    own = tl.where(length > 0, (length - 1) // BLOCK_SIZE, -1)
    picks = selection + (head * tl.num_programs(1) + sequence).to(tl.int64) * TOP_K
    tl.store(picks + TOP_K - 1, own)
    if TOP_K > 1:
        query = q + (sequence * NUM_HEADS + head).to(tl.int64) * HEAD_DIM
        means += (mean_start * NUM_KV_HEADS + head // (NUM_HEADS // NUM_KV_HEADS)) * HEAD_DIM
        slot = tl.arange(0, BEST_SLOTS)
        # Empty slots are below all scores, each at a value of its own; those beyond TOP_K - 1 are never the worst.
        best = tl.where(slot < TOP_K - 1, LOWEST + 1 + slot.to(tl.int64), HIGHEST)
        dim = tl.arange(0, CHUNKS)[:, None] * (BLOCK_D // CHUNKS) + tl.arange(0, BLOCK_D // CHUNKS)[None, :]
        for first in range(0, own, BLOCKS):
            block = first + tl.arange(0, BLOCKS)
            row = tl.arange(0, CHUNKS * BLOCKS)
            row_dim = (row // BLOCKS * (BLOCK_D // CHUNKS))[:, None] + tl.arange(0, BLOCK_D // CHUNKS)[None, :]
            row_block = (first + row % BLOCKS)[:, None]
            address = row_block.to(tl.int64) * (NUM_KV_HEADS * HEAD_DIM) + row_dim
            mean = tl.load(means + address, mask=(row_block < own) & (row_dim < HEAD_DIM), other=0.0)
            mean = tl.reshape(mean, [CHUNKS, BLOCKS, BLOCK_D // CHUNKS])
            # What the products need is loaded behind a barrier: else the compiler has some means multiplied before the
            # next are loaded, and waits each time.
            tl.debug_barrier()
            part = tl.load(query + dim, mask=dim < HEAD_DIM, other=0.0).to(tl.float32)
            products = tl.sum(mean * part[:, None, :], axis=0)
            score = tl.where(block < FIRST_BLOCKS, float("inf"), tl.sum(products, axis=1))
            bits = score.to(tl.int32, bitcast=True)
            ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
            ranked = tl.where(block < own, (ordered << 32) + (0x7FFFFFFF - block), LOWEST)
            top = tl.max(ranked, axis=0)
            worst = tl.min(best, axis=0)
            while top > worst:
                best = tl.where(best == worst, top, best)
                ranked = tl.where(ranked == top, LOWEST, ranked)
                top = tl.max(ranked, axis=0)
                worst = tl.min(best, axis=0)
        # Slots in order: empty ones first, then the blocks ascending, then those that are not in use.
        kept = tl.where(best > LOWEST + BEST_SLOTS, 0x7FFFFFFF - (best & 0xFFFFFFFF), slot - BEST_SLOTS)
        kept = tl.where(slot < TOP_K - 1, kept, 0x7FFFFFFF).to(tl.int32)
        rank = tl.sum(((kept[None, :] < kept[:, None]) & (slot < TOP_K - 1)[None, :]).to(tl.int32), axis=1)
        tl.store(picks + rank, tl.maximum(kept, -1), mask=slot < TOP_K - 1)


@triton.jit
def decode_attend_kernel(
    q, k, v, key_starts, lengths, selection, partial, partial_lse, token_stride, head_stride, scale_log2,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TOP_K: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, SLOTS: tl.constexpr,
    PIECES: tl.constexpr, PIECE: tl.constexpr, KEYS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """One program: one piece of one block that a head selected, for all heads of its group that selected it; per head
    its softmax, normalised, and the log2 of its sum. The first of those heads has the program that does it."""
    head, part, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads_of_group = NUM_HEADS // NUM_KV_HEADS
    kv_head = head // heads_of_group
    member, slot = tl.arange(0, GROUP), tl.arange(0, SLOTS)
    query_head = kv_head * heads_of_group + member
    row = (sequence * NUM_HEADS + query_head).to(tl.int64)
    dim = tl.arange(0, BLOCK_D)
    is_dim = dim < HEAD_DIM
    of_group = (member < heads_of_group)[:, None]
    query = tl.load(q + row[:, None] * HEAD_DIM + dim[None, :], mask=of_group & is_dim[None, :], other=0.0)
    length = tl.load(lengths + sequence).to(tl.int32)
    base = tl.load(key_starts + sequence) * token_stride + kv_head.to(tl.int64) * head_stride
    if OVERLAPS:  # all above was there before the selection kernel began
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    picks = selection + (query_head * tl.num_programs(2) + sequence).to(tl.int64)[:, None] * TOP_K + slot[None, :]
    picked = tl.load(picks, mask=of_group & (slot < TOP_K)[None, :], other=-1)
    block = tl.load(selection + (head * tl.num_programs(2) + sequence).to(tl.int64) * TOP_K + part // PIECES)
    member_slot = tl.max(tl.where((picked == block) & (block >= 0), slot[None, :], -1), axis=1)
    takes_part = member_slot >= 0
    if block < 0:
        nothing = (sequence * NUM_HEADS + head).to(tl.int64) * (TOP_K * PIECES) + part
        tl.store(partial_lse + nothing, float("-inf"))
    elif tl.min(tl.where(takes_part, query_head, NUM_HEADS), axis=0) == head:
        begin = block * BLOCK_SIZE + part % PIECES * PIECE
        end = tl.minimum(tl.minimum(begin + PIECE, (block + 1) * BLOCK_SIZE), length)
        top = tl.full([GROUP], float("-inf"), dtype=tl.float32)
        total = tl.zeros([GROUP], dtype=tl.float32)
        out = tl.zeros([GROUP, BLOCK_D], dtype=tl.float32)
        for first in range(begin, end, KEYS):
            key = first + tl.arange(0, KEYS)
            address = base + key[:, None].to(tl.int64) * token_stride + dim[None, :]
            inside = (key < end)[:, None] & is_dim[None, :]
            key_tile = tl.load(k + address, mask=inside, other=0.0)
            value_tile = tl.load(v + address, mask=inside, other=0.0)
            score = tl.dot(query, tl.trans(key_tile), input_precision="ieee") * scale_log2
            score = tl.where((key < end)[None, :], score, float("-inf"))
            new_top = tl.maximum(top, tl.max(score, axis=1))
            weight = tl.exp2(score - new_top[:, None])
            decay = tl.exp2(top - new_top)
            total = total * decay + tl.sum(weight, axis=1)
            out = out * decay[:, None]
            out += tl.dot(weight.to(value_tile.dtype), value_tile, input_precision="ieee")
            top = new_top
        is_empty = begin >= end
        place = row * (TOP_K * PIECES) + member_slot * PIECES + part % PIECES
        total = tl.where(is_empty, 1.0, total)
        into = partial + place[:, None] * HEAD_DIM + dim[None, :]
        tl.store(into, out / total[:, None], mask=takes_part[:, None] & is_dim[None, :])
        tl.store(partial_lse + place, tl.where(is_empty, float("-inf"), top + tl.log2(total)), mask=takes_part)


@triton.jit
def decode_merge_kernel(
    partial, partial_lse, out, lse,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
    ALL_PARTS: tl.constexpr, TOGETHER: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """One program: the output of one head of one sequence from its parts, in a fixed order. An empty part was not
    written: what lies there is read, so as not to wait for the weights, and dropped."""
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
    head, sequence = tl.program_id(0), tl.program_id(1)
    row = (sequence * NUM_HEADS + head).to(tl.int64)
    part, dim = tl.arange(0, ALL_PARTS), tl.arange(0, BLOCK_D)
    result = tl.zeros([BLOCK_D], dtype=tl.float32)
    for first in tl.static_range(0, ALL_PARTS, TOGETHER):
        several = first + tl.arange(0, TOGETHER)
        address = (row * PARTS + several)[:, None] * HEAD_DIM + dim[None, :]
        tile = tl.load(partial + address, mask=(several < PARTS)[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
        tl.debug_barrier()  # as in the selection kernel
        if first == 0:
            parts_lse = tl.load(partial_lse + row * PARTS + part, mask=part < PARTS, other=float("-inf"))
            top = tl.max(parts_lse, axis=0)
            top = tl.where(top == float("-inf"), 0.0, top)
            total = tl.sum(tl.exp2(parts_lse - top), axis=0)
        weight = tl.exp2(tl.load(partial_lse + row * PARTS + several, mask=several < PARTS, other=float("-inf")) - top)
        result += tl.sum(tl.where((weight > 0.0)[:, None], tile * weight[:, None], 0.0), axis=0)
    result = result / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * HEAD_DIM + dim, result.to(out.dtype.element_ty), mask=dim < HEAD_DIM)
    row_lse = (top + tl.log2(total)) * 0.6931471805599453
    tl.store(lse + head.to(tl.int64) * tl.num_programs(1) + sequence, row_lse)
