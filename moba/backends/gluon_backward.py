"""The backward of long blocks in Gluon, for Hopper: `backward_kv_kernel` and `backward_q_kernel` of triton_backward.py
with a producer and two consumers (gluon_parts.py says how they work together).

dQ: programs are persistent, as in the forward. dK and dV: a program takes one work item and 128 keys, 64 for each
consumer, so that a row of q and dO is fetched once for twice the keys.
"""

# Gluon's stubs know neither that constants become gl.constexpr, nor what its functions return.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from moba.backends.gluon_parts import (
    COPY,
    FLAT,
    KEYS,
    LEFT,
    PRODUCT,
    STAGES,
    TILE,
    TILE_BYTES,
    D,
    clear_past_end,
    consumer_rows,
    descriptor,
    gather_rows,
    gather_stats,
    head_program,
    key_tiles,
    last_visible_key,
    load_item,
    load_row_numbers,
    make_barriers,
    num_programs,
    store_slots,
    thread_barrier,
    work_item,
)
from moba.backends.triton_lists import ITEM_INTEGERS, Items, Lists, item_grid
from moba.backends.triton_tiles import Tile

KV_TILE = Tile(rows=64, keys=128, warps=8, stages=4)
"""Of a program for dK and dV. It has a multiprocessor to itself, as eight warps with all registers would."""
ROW_STAGES = gl.constexpr(KV_TILE.stages)  # places for tiles of rows
SCORE = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
"""Of a product [TILE keys, TILE rows] of one consumer in registers."""
CONSUMER_REGISTERS = gl.constexpr(232)
PRODUCER_REGISTERS = gl.constexpr(40)


# ---------------------------------------------------------------- dQ


def backward_q(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, d_out: torch.Tensor, row_stats: torch.Tensor,
    lists: Lists, items: Items, partial: torch.Tensor, first_kv_head: int, num_kv_heads: int, scale_log2: float,
) -> None:  # fmt: skip
    """Fills the partial dQ [heads, region, D] of so many key/value heads, from items of GLUON_ITEM_ROWS rows.
    row_stats: (log2-sum-exp, delta) of each row, in 8 bytes."""
    num_items = items.max_items * num_kv_heads
    gluon_q_kernel[(num_programs(num_items, q.device),)](
        q, descriptor(k, 128), descriptor(v, 128), d_out, row_stats.view(torch.float32), lists.rows, lists.list_start,
        items.item_start, items.item_block, lists.start_M, lists.length_M, lists.skipped_M, partial, first_kv_head,
        lists.num_blocks, items.max_items, items.item_rows, lists.region, num_items, scale_log2,
        GROUP=q.shape[1] // k.shape[1], num_warps=4,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["first_kv_head", "num_blocks", "max_items", "item_rows", "region", "num_items"])
def gluon_q_kernel(
    q, k, v, d_out, row_stats, rows, list_start, item_start, item_block, block_start, block_length, block_skipped,
    partial, first_kv_head, num_blocks, max_items, item_rows, region, num_items, scale_log2,
    GROUP: gl.constexpr,
):  # fmt: skip
    """One program: the partial dQ of 2 * TILE rows of one list, from all keys of its block; then the next item's."""
    dtype: gl.constexpr = q.dtype.element_ty
    query_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, D], dtype)
    queries = gl.allocate_shared_memory(dtype, [2, TILE, D], query_layout)
    d_outs = gl.allocate_shared_memory(dtype, [2, TILE, D], query_layout)
    stats = gl.allocate_shared_memory(gl.float32, [4, TILE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    keys = gl.allocate_shared_memory(dtype, [STAGES, KEYS, D], k.layout)
    values = gl.allocate_shared_memory(dtype, [STAGES, KEYS, D], v.layout)
    # Of the places for pairs of key and value tiles, and of the one for an item's rows: full, empty.
    barriers = make_barriers(STAGES, 1), make_barriers(STAGES, 2), make_barriers(1, 1), make_barriers(1, 2)
    fence_async_shared()
    thread_barrier()
    walk = (
        list_start, item_start, item_block, block_start, block_length, block_skipped,
        first_kv_head, num_blocks, max_items, item_rows,
    )  # fmt: skip
    shared = (queries, d_outs, stats, keys, values)
    inputs = (q, k, v, d_out, row_stats, rows)
    gl.warp_specialize(
        [
            (_q_consumer, (0, partial, walk, region, num_items, scale_log2, shared, barriers, GROUP)),
            (_q_consumer, (1, partial, walk, region, num_items, scale_log2, shared, barriers, GROUP)),
            (_q_producer, (inputs, walk, region, num_items, shared, barriers, GROUP)),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


@gluon.jit
def _q_producer(inputs, walk, region, num_items, shared, barriers, GROUP: gl.constexpr):
    """Hands over each item's rows of q, dO and statistics, and its keys and values tile by tile."""
    q, k, v, d_out, row_stats, rows = inputs
    queries, d_outs, stats, keys, values = shared
    full, empty, rows_full, rows_empty = barriers
    tile_index = 0  # counts key tiles through all items
    item_index = 0
    for index in range(gl.program_id(0), num_items, gl.num_programs(0)):
        kv_head, _local_head, start, length, list_begin, begin, end = work_item(index, walk, GROUP)
        if begin < end:
            head_rows = rows + kv_head.to(gl.int64) * region
            mbarrier.wait(rows_empty.index(0), (item_index & 1) ^ 1)
            for i in gl.static_range(2):
                row = load_row_numbers(head_rows, begin + i * TILE, end, gl.SliceLayout(1, COPY))
                gather_rows(queries.index(i), q, row)
                gather_rows(d_outs.index(i), d_out, row)
                row = load_row_numbers(head_rows, begin + i * TILE, end, FLAT)
                gather_stats(stats.index(2 * i), stats.index(2 * i + 1), row_stats, row)
            async_copy.commit_group()
            for j in range(key_tiles(end, list_begin, length, GROUP)):
                stage = tile_index % STAGES
                place = [start + j * KEYS, kv_head * D]
                mbarrier.wait(empty.index(stage), ((tile_index // STAGES) & 1) ^ 1)
                mbarrier.expect(full.index(stage), 4 * TILE_BYTES)
                tma.async_copy_global_to_shared(k, place, full.index(stage), keys.index(stage))
                tma.async_copy_global_to_shared(v, place, full.index(stage), values.index(stage))
                if j == 0:
                    # The rows' copies have run while this waited for the place of the keys.
                    async_copy.wait_group(0)
                    fence_async_shared()
                    thread_barrier()
                    mbarrier.arrive(rows_full.index(0), count=1)
                tile_index += 1
            item_index += 1


@gluon.jit
def _q_consumer(which, partial, walk, region, num_items, scale_log2, shared, barriers, GROUP: gl.constexpr):
    """The partial dQ of TILE rows of each item, those of the first or second consumer."""
    queries, d_outs, stats, keys, values = shared
    _full, _empty, rows_full, rows_empty = barriers
    query, d_out = queries.index(which), d_outs.index(which)
    tile_index = 0
    item_index = 0
    for index in range(gl.program_id(0), num_items, gl.num_programs(0)):
        _kv_head, local_head, _start, length, list_begin, begin, end = work_item(index, walk, GROUP)
        if begin < end:
            tiles, full_tiles, first_slot, _slot, last_key = consumer_rows(which, begin, end, list_begin, length, GROUP)
            mbarrier.wait(rows_full.index(0), item_index & 1)
            log_sum = stats.index(2 * which).load(gl.SliceLayout(1, PRODUCT))
            delta = stats.index(2 * which + 1).load(gl.SliceLayout(1, PRODUCT))
            d_query = gl.zeros([TILE, D], gl.float32, PRODUCT)
            for j in range(0, full_tiles):
                d_query = _q_step(
                    query, d_out, keys, values, barriers, tile_index, j, d_query, log_sum, delta, last_key, length,
                    scale_log2, False,
                )  # fmt: skip
                tile_index += 1
            for j in range(full_tiles, tiles):
                d_query = _q_step(
                    query, d_out, keys, values, barriers, tile_index, j, d_query, log_sum, delta, last_key, length,
                    scale_log2, True,
                )  # fmt: skip
                tile_index += 1
            base = local_head.to(gl.int64) * region * D
            store_slots(partial + base, d_query, query, rows_empty.index(0), first_slot, end)
            item_index += 1


@gluon.jit
def _q_step(
    query, d_out, keys, values, barriers, tile_index, j, d_query, log_sum, delta, last_key, length, scale_log2,
    MASKED: gl.constexpr,
):  # fmt: skip
    """dQ (without the softmax scale) after key tile j.

    dS = P * (dP - delta) is what gets the mask: dP is of the next document's values past the block's end.
    """
    full, empty, _rows_full, _rows_empty = barriers
    stage = tile_index % STAGES
    zero = gl.zeros([TILE, KEYS], gl.float32, PRODUCT)
    mbarrier.wait(full.index(stage), (tile_index // STAGES) & 1)
    if MASKED and (j + 1) * KEYS > length:
        clear_past_end(keys.index(stage), j * KEYS, length)
    score = warpgroup_mma(query, keys.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    d_weight = warpgroup_mma(d_out, values.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    score = warpgroup_mma_wait(1, deps=(score,))
    weight = gl.exp2(score * scale_log2 - log_sum[:, None])
    d_weight = warpgroup_mma_wait(0, deps=(d_weight,))
    d_score = weight * (d_weight - delta[:, None])
    if MASKED:
        key = j * KEYS + gl.arange(0, KEYS, gl.SliceLayout(0, PRODUCT))
        d_score = gl.where(key[None, :] <= last_key[:, None], d_score, 0.0)
    d_score = gl.convert_layout(d_score.to(keys.dtype), LEFT)
    d_query = warpgroup_mma(d_score, keys.index(stage), d_query, is_async=True)
    d_query, d_score = warpgroup_mma_wait(0, deps=(d_query, d_score))
    thread_barrier()
    mbarrier.arrive(empty.index(stage), count=1)
    return d_query


# ---------------------------------------------------------------- dK, dV


def backward_kv(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, d_out: torch.Tensor, slot_stats: torch.Tensor,
    lists: Lists, items: Items, d_k: torch.Tensor, d_v: torch.Tensor, splits: torch.Tensor,
    first_kv_head: int, num_kv_heads: int, block_size: int, scale: float, scale_log2: float,
) -> None:  # fmt: skip
    """Fills dK and dV of so many key/value heads, or their parts in `splits` where lists are cut, as
    `backward_kv_kernel` does. slot_stats: (log2-sum-exp, delta) of each slot's row, in 8 bytes."""
    group = q.shape[1] // k.shape[1]
    key_tiles = -(-block_size // KV_TILE.keys)
    grid, heads_together = item_grid(items.max_items * key_tiles, num_kv_heads, group, KV_TILE.warps)
    gluon_kv_kernel[grid](
        q, descriptor(k, 64), descriptor(v, 64), d_out, slot_stats.view(torch.float32), lists.rows, lists.list_start,
        items.item_start, items.split_start, items.item_block, lists.start_M, lists.length_M, lists.skipped_M,
        d_k, d_v, splits, first_kv_head, lists.num_blocks, items.max_items, items.item_rows, items.max_splits,
        lists.region, block_size, key_tiles, heads_together, scale, scale_log2,
        NUM_KV_HEADS=k.shape[1], GROUP=group, num_warps=4,
    )  # fmt: skip


@gluon.jit(do_not_specialize=ITEM_INTEGERS)
def gluon_kv_kernel(
    q, k, v, d_out, slot_stats, rows, list_start, item_start, split_start, item_block,
    block_start, block_length, block_skipped, d_k, d_v, splits,
    first_kv_head, num_blocks, max_items, item_rows, max_splits, region, block_size, key_tiles, heads_together,
    scale, scale_log2, NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """One program: one work item against 128 keys of its block, 64 for each consumer."""
    program, local_head = head_program(heads_together)
    item = program // key_tiles
    first_key = program % key_tiles * (2 * TILE)
    kv_head = first_kv_head + local_head
    block, list_begin, begin, end = load_item(
        item, kv_head, item_start, item_block, list_start, block_skipped, num_blocks, max_items, item_rows, GROUP
    )
    start, length = gl.load(block_start + block), gl.load(block_length + block)
    # Partitions cannot stand in a branch: a program without work has no tiles and no keys to store.
    exists = (begin < end) & (first_key < length)
    length = gl.where(exists, length, 0)
    # Own rows before the keys do not see them; own rows within them need the causal mask.
    begin = gl.minimum(gl.maximum(begin, list_begin + first_key * GROUP), end)
    own_end = list_begin + gl.minimum(first_key + 2 * TILE, length) * GROUP
    stretches = row_stretches(begin, own_end, gl.where(exists, end, begin))

    dtype: gl.constexpr = q.dtype.element_ty
    row_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, D], dtype)
    keys = gl.allocate_shared_memory(dtype, [2, TILE, D], k.layout)
    values = gl.allocate_shared_memory(dtype, [2, TILE, D], v.layout)
    queries = gl.allocate_shared_memory(dtype, [ROW_STAGES, TILE, D], row_layout)
    d_outs = gl.allocate_shared_memory(dtype, [ROW_STAGES, TILE, D], row_layout)
    stats = gl.allocate_shared_memory(gl.float32, [2 * ROW_STAGES, TILE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    # Of the keys and values, which come once: full. Of the places for rows: full, empty.
    barriers = make_barriers(1, 1), make_barriers(ROW_STAGES, 1), make_barriers(ROW_STAGES, 2)
    fence_async_shared()
    thread_barrier()
    outputs = key_outputs(
        d_k, d_v, splits, item_start, split_start, item, kv_head, local_head, block, start,
        num_blocks, max_splits, block_size, NUM_KV_HEADS,
    )  # fmt: skip
    shared = (keys, values, queries, d_outs, stats)
    block_args = (first_key, length, list_begin, block_size, scale, scale_log2)
    inputs = (q, d_out, k, v, slot_stats + local_head.to(gl.int64) * region * 2, rows + kv_head.to(gl.int64) * region)
    gl.warp_specialize(
        [
            (_kv_consumer, (0, outputs, block_args, stretches, shared, barriers, NUM_KV_HEADS, GROUP)),
            (_kv_consumer, (1, outputs, block_args, stretches, shared, barriers, NUM_KV_HEADS, GROUP)),
            (kv_producer, (inputs, start + first_key, kv_head * D, stretches, shared, barriers, ROW_STAGES)),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


@gluon.jit
def key_outputs(
    d_k, d_v, splits, item_start, split_start, item, kv_head, local_head, block, start,
    num_blocks, max_splits, block_size, NUM_KV_HEADS: gl.constexpr,
):  # fmt: skip
    """Where an item's dK and dV go: to the gradients of the block's keys if its list is whole, else to its part of
    `splits`."""
    entry = kv_head * (num_blocks + 1) + block
    first_split = gl.load(split_start + entry)
    is_whole = gl.load(split_start + entry + 1) == first_split
    split = first_split + item - gl.load(item_start + entry)
    splits += (local_head.to(gl.int64) * max_splits + split) * 2 * block_size * D
    first_row = start.to(gl.int64) * (NUM_KV_HEADS * D) + kv_head * D
    return d_k + first_row, d_v + first_row, splits, is_whole


@gluon.jit
def row_stretches(begin, own_end, end):
    """The rows of an item, from slot `begin` to `end`, in tiles of which those before `own_end` need a mask: begin, end
    of the tiles with such rows, end of the whole tiles that follow, end, number of whole tiles, of all tiles."""
    masked_end = gl.minimum(end, begin + (gl.maximum(own_end - begin, 0) + TILE - 1) // TILE * TILE)
    whole = (end - masked_end) // TILE
    full_end = masked_end + whole * TILE
    tiles = whole + (masked_end - begin + end - full_end + TILE - 1) // TILE
    return begin, masked_end, full_end, end, whole, tiles


@gluon.jit
def tile_slot(t, stretches):
    """First slot of the t-th tile of rows: whole tiles without a mask, then those with one, then the rest that fills no
    tile."""
    begin, masked_end, full_end, _end, whole, _tiles = stretches
    slot = begin + (t - whole) * TILE
    other = gl.where(slot < masked_end, slot, slot - masked_end + full_end)
    return gl.where(t < whole, masked_end + t * TILE, other)


@gluon.jit
def kv_producer(inputs, first_key, column, stretches, shared, barriers, NUM_STAGES: gl.constexpr):
    """Hands over the keys and values, then q, dO and statistics of the item's rows tile by tile, in so many places; a
    tile's copies run while those of the next begin."""
    q, d_out, k, v, slot_stats, rows = inputs
    keys, values, queries, d_outs, stats = shared
    kv_full, full, empty = barriers
    end, tiles = stretches[3], stretches[5]
    mbarrier.expect(kv_full.index(0), 4 * TILE_BYTES)
    for i in gl.static_range(2):
        place = [first_key + i * TILE, column]
        tma.async_copy_global_to_shared(k, place, kv_full.index(0), keys.index(i))
        tma.async_copy_global_to_shared(v, place, kv_full.index(0), values.index(i))
    for t in range(tiles):
        stage = t % NUM_STAGES
        first_slot = tile_slot(t, stretches)
        row = load_row_numbers(rows, first_slot, end, gl.SliceLayout(1, COPY))
        mbarrier.wait(empty.index(stage), ((t // NUM_STAGES) & 1) ^ 1)
        gather_rows(queries.index(stage), q, row)
        gather_rows(d_outs.index(stage), d_out, row)
        slot = gl.minimum(first_slot + gl.arange(0, TILE, FLAT), end - 1)
        gather_stats(stats.index(stage * 2), stats.index(stage * 2 + 1), slot_stats, slot)
        async_copy.commit_group()
        async_copy.wait_group(1)
        fence_async_shared()
        thread_barrier()
        mbarrier.arrive(full.index((t + NUM_STAGES - 1) % NUM_STAGES), count=1, pred=t > 0)
    async_copy.wait_group(0)
    fence_async_shared()
    thread_barrier()
    mbarrier.arrive(full.index((tiles + NUM_STAGES - 1) % NUM_STAGES), count=1, pred=tiles > 0)


@gluon.jit
def _kv_consumer(
    which, outputs, block_args, stretches, shared, barriers, NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr
):
    """dK and dV of TILE keys, those of the first or second consumer, from all rows of the item."""
    first_key, length, _list_begin, block_size, scale, _scale_log2 = block_args
    keys, values = shared[0], shared[1]
    kv_full = barriers[0]
    whole, tiles = stretches[4], stretches[5]
    first_key = first_key + which * TILE
    d_key = gl.zeros([TILE, D], gl.float32, PRODUCT)
    d_value = gl.zeros([TILE, D], gl.float32, PRODUCT)
    mbarrier.wait(kv_full.index(0), 0)
    for t in range(0, whole):
        own = which + (t >> 30)  # which, but unknown before the loop: else descriptors of operands take registers
        d_key, d_value = _kv_step(
            keys.index(own), values.index(own), d_key, d_value, first_key, block_args, t, stretches, shared,
            barriers, GROUP, False,
        )  # fmt: skip
    for t in range(whole, tiles):
        own = which + (t >> 30)  # which, but unknown before the loop: else descriptors of operands take registers
        d_key, d_value = _kv_step(
            keys.index(own), values.index(own), d_key, d_value, first_key, block_args, t, stretches, shared,
            barriers, GROUP, True,
        )  # fmt: skip
    store_keys(outputs, d_key, d_value, first_key, length, block_size, scale, NUM_KV_HEADS)


@gluon.jit
def _kv_step(
    key_tile, value_tile, d_key, d_value, first_key, block_args, t, stretches, shared, barriers, GROUP: gl.constexpr,
    MASKED: gl.constexpr,
):  # fmt: skip
    """dK (without the softmax scale) and dV after one more tile of rows.

    Scores are kept transposed, keys by rows: so P^T and dS^T are left operands, which the tensor cores take from
    registers. Keys past the block's end, of the next document, have results of their own, which are not stored.
    """
    queries, d_outs, stats = shared[2], shared[3], shared[4]
    full, empty = barriers[1], barriers[2]
    length, list_begin, scale_log2 = block_args[1], block_args[2], block_args[5]
    stage = t % ROW_STAGES
    zero = gl.zeros([TILE, TILE], gl.float32, SCORE)
    mbarrier.wait(full.index(stage), (t // ROW_STAGES) & 1)
    score = warpgroup_mma(key_tile, queries.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    d_weight = warpgroup_mma(value_tile, d_outs.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    log_sum = stats.index(stage * 2).load(gl.SliceLayout(0, SCORE))
    score = warpgroup_mma_wait(1, deps=(score,))
    weight = gl.exp2(score * scale_log2 - log_sum[None, :])
    if MASKED:
        end = stretches[3]
        slot = tile_slot(t, stretches) + gl.arange(0, TILE, gl.SliceLayout(0, SCORE))
        key = first_key + gl.arange(0, TILE, gl.SliceLayout(1, SCORE))
        # Slots past the end repeat the last row, which must not count twice.
        last_key = gl.where(slot < end, last_visible_key(slot, list_begin, length, GROUP), -1)
        weight = gl.where(key[:, None] <= last_key[None, :], weight, 0.0)
    half_weight = gl.convert_layout(weight.to(queries.dtype), LEFT)
    d_value = warpgroup_mma(half_weight, d_outs.index(stage), d_value, is_async=True)
    delta = stats.index(stage * 2 + 1).load(gl.SliceLayout(0, SCORE))
    d_weight = warpgroup_mma_wait(1, deps=(d_weight,))
    d_score = gl.convert_layout((weight * (d_weight - delta[None, :])).to(queries.dtype), LEFT)
    d_key = warpgroup_mma(d_score, queries.index(stage), d_key, is_async=True)
    d_value, half_weight, d_key, d_score = warpgroup_mma_wait(0, deps=(d_value, half_weight, d_key, d_score))
    thread_barrier()
    mbarrier.arrive(empty.index(stage), count=1)
    return d_key, d_value


@gluon.jit
def store_keys(outputs, d_key, d_value, first_key, length, block_size, scale, NUM_KV_HEADS: gl.constexpr):
    """Writes dK and dV of TILE keys."""
    d_k, d_v, splits, is_whole = outputs
    key = first_key + gl.arange(0, TILE, gl.SliceLayout(1, PRODUCT))
    if is_whole:
        _store(d_k, key, d_key * scale, key < length, NUM_KV_HEADS * D)
        _store(d_v, key, d_value, key < length, NUM_KV_HEADS * D)
    else:
        _store(splits, key, d_key, key < length, D)
        _store(splits, block_size + key, d_value, key < length, D)


@gluon.jit
def _store(base, key, value, mask, stride):
    dim = gl.arange(0, D, gl.SliceLayout(0, PRODUCT))
    address = base + (key.to(gl.int64)[:, None] * stride + dim[None, :])
    gl.store(address, value.to(base.dtype.element_ty), mask=mask[:, None])
