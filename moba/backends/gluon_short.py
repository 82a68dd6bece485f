"""The backward of short blocks in Gluon, for Hopper: `backward_short_kernel` of triton_backward.py for blocks of 65 to
128 keys, with a producer and two consumers (gluon_parts.py says how they work together).

A program takes one work item. As for dK and dV of long blocks, each consumer keeps 64 keys, their values and gradients,
and streams all rows of the item. The partial dQ of a tile of rows is a sum over the keys of both: each writes its dS^T
to shared memory and makes half of the columns. It does so one tile late: while the tensor cores make scores of a tile
for one consumer, the other may still work on the tile before, and neither waits for the other's dS in step.

dS^T has two places, with barriers as those of the rows: `d_full` has the arrivals of both who write their halves,
`d_empty` of both who have read them. The slots of a tile lie side by side, so a partial dQ leaves by TMA from shared
memory; slots past the end of an item belong to others, so tiles that it does not fill are stored with a mask. Where TMA
has nothing to store it is given a row past the end of all, which it drops: a branch would cost registers.
"""

# Gluon's stubs know neither that constants become gl.constexpr, nor what its functions return.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from moba.backends.gluon_backward import SCORE, key_outputs, kv_producer, row_stretches, store_keys, tile_slot
from moba.backends.gluon_parts import (
    LEFT,
    PRODUCT,
    TILE,
    D,
    clear_past_end,
    descriptor,
    head_program,
    last_visible_key,
    load_item,
    make_barriers,
    thread_barrier,
    tile_layout,
)
from moba.backends.triton_lists import ITEM_INTEGERS, Items, Lists

ROW_STAGES = gl.constexpr(3)
"""Places for tiles of rows."""
CONSUMER_REGISTERS = gl.constexpr(240)
PRODUCER_REGISTERS = gl.constexpr(24)


def backward_short(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, d_out: torch.Tensor, slot_stats: torch.Tensor,
    lists: Lists, items: Items, partial: torch.Tensor, d_k: torch.Tensor, d_v: torch.Tensor, splits: torch.Tensor,
    first_kv_head: int, grid: tuple[int, int, int], heads_together: int, block_size: int,
    scale: float, scale_log2: float,
) -> None:  # fmt: skip
    """Fills the partial dQ [heads, region, D] of the grid's key/value heads, and their dK and dV, or parts of these in
    `splits` where lists are cut. slot_stats: (log2-sum-exp, delta) of each slot's row, in 8 bytes."""
    gluon_short_backward_kernel[grid](
        q, descriptor(k, 64), descriptor(v, 64), d_out, slot_stats.view(torch.float32), lists.rows, lists.list_start,
        items.item_start, items.split_start, items.item_block, lists.start_M, lists.length_M, lists.skipped_M,
        _partial_descriptor(partial), partial, d_k, d_v, splits, first_kv_head, lists.num_blocks, items.max_items,
        items.item_rows, items.max_splits, lists.region, block_size, partial.shape[0] * lists.region, heads_together,
        scale, scale_log2, NUM_KV_HEADS=k.shape[1], GROUP=q.shape[1] // k.shape[1], num_warps=4,
    )  # fmt: skip


def _partial_descriptor(partial: torch.Tensor) -> TensorDescriptor:
    """By which TMA stores half of the columns of 64 slots."""
    rows = partial.view(-1, partial.shape[2])
    return TensorDescriptor.from_tensor(rows, [64, 64], tile_layout(64, 64, partial.dtype))


@gluon.jit(do_not_specialize=ITEM_INTEGERS)
def gluon_short_backward_kernel(
    q, k, v, d_out, slot_stats, rows, list_start, item_start, split_start, item_block,
    block_start, block_length, block_skipped, partial_tiles, partial, d_k, d_v, splits,
    first_kv_head, num_blocks, max_items, item_rows, max_splits, region, block_size, past_end, heads_together,
    scale, scale_log2, NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """One program: one work item against its block, up to 64 keys for each consumer."""
    item, local_head = head_program(heads_together)
    kv_head = first_kv_head + local_head
    block, list_begin, begin, end = load_item(
        item, kv_head, item_start, item_block, list_start, block_skipped, num_blocks, max_items, item_rows, GROUP
    )
    start, length = gl.load(block_start + block), gl.load(block_length + block)
    # Partitions cannot stand in a branch: a program without work has no tiles and no keys to store.
    length = gl.where(begin < end, length, 0)
    # A weight of keys past the block's end may be infinite, and dQ sums over keys: there all rows need the mask.
    own_end = gl.where(length < 2 * TILE, end, list_begin + length * GROUP)
    stretches = row_stretches(begin, own_end, end)

    dtype: gl.constexpr = q.dtype.element_ty
    row_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, D], dtype)
    score_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, TILE], dtype)
    keys = gl.allocate_shared_memory(dtype, [2, TILE, D], k.layout)
    values = gl.allocate_shared_memory(dtype, [2, TILE, D], v.layout)
    queries = gl.allocate_shared_memory(dtype, [ROW_STAGES, TILE, D], row_layout)
    d_outs = gl.allocate_shared_memory(dtype, [ROW_STAGES, TILE, D], row_layout)
    stats = gl.allocate_shared_memory(gl.float32, [2 * ROW_STAGES, TILE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    d_scores = gl.allocate_shared_memory(dtype, [4, TILE, TILE], score_layout)  # place 2 * (t % 2) + consumer
    d_queries = gl.allocate_shared_memory(dtype, [2, TILE, TILE], partial_tiles.layout)
    # Of the keys and values, which come once: full. Of the places for rows: full, empty. Of those for dS: full, empty.
    kv_full, full, empty = make_barriers(1, 1), make_barriers(ROW_STAGES, 1), make_barriers(ROW_STAGES, 2)
    barriers = (kv_full, full, empty, make_barriers(2, 2), make_barriers(2, 2))
    fence_async_shared()
    thread_barrier()
    outputs = key_outputs(
        d_k, d_v, splits, item_start, split_start, item, kv_head, local_head, block, start,
        num_blocks, max_splits, block_size, NUM_KV_HEADS,
    )  # fmt: skip
    query_output = (partial_tiles, partial, local_head * region, past_end)
    shared = (keys, values, queries, d_outs, stats)
    exchange = (d_scores, d_queries)
    block_args = (length, list_begin, block_size, scale, scale_log2)
    inputs = (q, d_out, k, v, slot_stats + local_head.to(gl.int64) * region * 2, rows + kv_head.to(gl.int64) * region)
    item_args = (block_args, stretches, shared, exchange, barriers)
    gl.warp_specialize(
        [
            (_consumer, (0, outputs, query_output, item_args, NUM_KV_HEADS, GROUP)),
            (_consumer, (1, outputs, query_output, item_args, NUM_KV_HEADS, GROUP)),
            (kv_producer, (inputs, start, kv_head * D, stretches, shared, (kv_full, full, empty), ROW_STAGES)),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


@gluon.jit
def _consumer(which: gl.constexpr, outputs, query_output, item_args, NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr):
    """dK and dV of TILE keys, and half of the columns of the partial dQ, from all rows of the item."""
    block_args, stretches, shared, exchange, barriers = item_args
    length, _list_begin, block_size, scale, _scale_log2 = block_args
    keys, values = shared[0], shared[1]
    whole, tiles = stretches[4], stretches[5]
    mbarrier.wait(barriers[0].index(0), 0)
    if (length < 2 * TILE) & (tiles > 0):
        clear_past_end(keys.index(0), 0, length)
        clear_past_end(keys.index(1), TILE, length)
        clear_past_end(values.index(which), which * TILE, length)
    d_key = gl.zeros([TILE, D], gl.float32, PRODUCT)
    d_value = gl.zeros([TILE, D], gl.float32, PRODUCT)
    for t in range(0, whole):
        d_key, d_value = _step(which, d_key, d_value, t, query_output, item_args, GROUP, False)
    for t in range(whole, tiles):
        d_key, d_value = _step(which, d_key, d_value, t, query_output, item_args, GROUP, True)
    mbarrier.wait(barriers[3].index((tiles + 1) % 2), ((tiles + 1) // 2 + 1) & 1)
    d_query = warpgroup_mma_wait(0, deps=(_query_half(which, tiles + 1, keys, exchange),))
    _store_query(which, d_query, tile_slot(tiles - 1, stretches), tiles > 0, query_output, stretches, exchange, True)
    store_keys(outputs, d_key, d_value, which * TILE, length, block_size, scale, NUM_KV_HEADS)
    tma.store_wait(0)


@gluon.jit
def _step(which: gl.constexpr, d_key, d_value, t, query_output, item_args, GROUP: gl.constexpr, MASKED: gl.constexpr):
    """dK (without the softmax scale) and dV after one more tile of rows; the partial dQ of the tile before goes out.

    Scores are kept transposed as for long blocks. dO V^T begins with -delta, which then takes no registers of its own.
    In the first step there is no tile before: the wait passes at once, and what is computed is not stored.
    """
    block_args, stretches, shared, exchange, barriers = item_args
    keys, values, queries, d_outs, stats = shared
    d_scores = exchange[0]
    _kv_full, full, empty, d_full, d_empty = barriers
    length, list_begin, _block_size, _scale, scale_log2 = block_args
    stage, place = t % ROW_STAGES, t % 2
    # Zero, but unknown before the loop: else the descriptors of all operands are made there, and take registers.
    hidden = t >> 30
    zero = gl.zeros([TILE, TILE], gl.float32, SCORE)
    mbarrier.wait(full.index(stage), (t // ROW_STAGES) & 1)
    query, d_out = queries.index(stage), d_outs.index(stage)
    score = warpgroup_mma(keys.index(which + hidden), query.permute((1, 0)), zero, use_acc=False, is_async=True)
    minus_delta = zero - stats.index(stage * 2 + 1).load(gl.SliceLayout(0, SCORE))[None, :]
    d_weight = warpgroup_mma(values.index(which + hidden), d_out.permute((1, 0)), minus_delta, is_async=True)
    log_sum = stats.index(stage * 2).load(gl.SliceLayout(0, SCORE))
    score = warpgroup_mma_wait(1, deps=(score,))
    weight = gl.exp2(score * scale_log2 - log_sum[None, :])
    if MASKED:
        slot = tile_slot(t, stretches) + gl.arange(0, TILE, gl.SliceLayout(0, SCORE))
        key = which * TILE + gl.arange(0, TILE, gl.SliceLayout(1, SCORE))
        # Slots past the end repeat the last row, which must not count twice.
        last_key = gl.where(slot < stretches[3], last_visible_key(slot, list_begin, length, GROUP), -1)
        weight = gl.where(key[:, None] <= last_key[None, :], weight, 0.0)
    half_weight = gl.convert_layout(weight.to(queries.dtype), LEFT)
    d_value = warpgroup_mma(half_weight, d_out, d_value, is_async=True)
    d_weight = warpgroup_mma_wait(1, deps=(d_weight,))
    d_score = (weight * d_weight).to(queries.dtype)
    mbarrier.wait(d_empty.index(place), ((t // 2) & 1) ^ 1)
    d_scores.index(place * 2 + which).store(d_score)
    fence_async_shared()
    thread_barrier()
    mbarrier.arrive(d_full.index(place), count=1)
    left = gl.convert_layout(d_score, LEFT)
    d_key = warpgroup_mma(left, query, d_key, is_async=True)
    mbarrier.wait(d_full.index(place ^ 1), ((t + 1) // 2 + 1) & 1)
    d_query = _query_half(which, t + 1, keys, exchange)
    d_value, half_weight, d_key, left = warpgroup_mma_wait(2, deps=(d_value, half_weight, d_key, left))
    thread_barrier()
    mbarrier.arrive(empty.index(stage), count=1)
    d_query = warpgroup_mma_wait(0, deps=(d_query,))
    slot_before = tile_slot(t - 1, stretches) if MASKED else stretches[1] + (t - 1) * TILE
    _store_query(which, d_query, slot_before, t > 0, query_output, stretches, exchange, MASKED)
    mbarrier.arrive(d_empty.index(place ^ 1), count=1, pred=t > 0)
    return d_key, d_value


@gluon.jit
def _query_half(which: gl.constexpr, t, keys, exchange):
    """Begins half of the columns of the partial dQ [TILE rows, TILE] from the dS^T that tiles of t's parity have: two
    products, one after the other."""
    first = t % 2 * 2
    hidden = t >> 30  # as in `_step`
    zero = gl.zeros([TILE, TILE], gl.float32, SCORE)
    d_query = warpgroup_mma(
        exchange[0].index(first).permute((1, 0)), keys.index(hidden).slice(which * TILE, TILE, dim=1), zero,
        use_acc=False, is_async=True,
    )  # fmt: skip
    return warpgroup_mma(
        exchange[0].index(first + 1).permute((1, 0)), keys.index(1 + hidden).slice(which * TILE, TILE, dim=1), d_query,
        is_async=True,
    )  # fmt: skip


@gluon.jit
def _store_query(
    which: gl.constexpr, d_query, first_slot, exists, query_output, stretches, exchange, TAIL: gl.constexpr
):
    """Writes half of the columns of a partial dQ to the slots of its tile that lie before the item's end. Without TAIL
    the tile is known to be whole."""
    partial_tiles, partial, first_row, past_end = query_output
    tile = exchange[1].index(which)
    half = d_query.to(tile.dtype)
    tma.store_wait(0)  # of the store before, which reads the same place
    thread_barrier()
    tile.store(half)
    fence_async_shared()
    thread_barrier()
    end = stretches[3]
    whole = exists & (first_slot + TILE <= end) if TAIL else exists
    row = gl.where(whole, first_row + first_slot, past_end)
    tma.async_copy_shared_to_global(partial_tiles, [row, which * TILE], tile)
    if TAIL:
        slot = first_slot + gl.arange(0, TILE, gl.SliceLayout(1, SCORE))
        dim = which * TILE + gl.arange(0, TILE, gl.SliceLayout(0, SCORE))
        mask = exists & (first_slot + TILE > end) & (slot < end)
        gl.store(partial + ((first_row + slot).to(gl.int64)[:, None] * D + dim[None, :]), half, mask=mask[:, None])
