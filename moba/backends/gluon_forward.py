"""The forward of long blocks in Gluon, for Hopper: `forward_long_kernel` of triton_forward.py with a producer and two
consumers (gluon_parts.py says how they work together).

Programs are persistent: each walks through work items, and its producer fetches the first tiles of the next item while
the consumers finish the last. Within an item a consumer starts the scores of a key tile before the product of the
previous tile's weights and values, as FlashAttention 3 does: so the tensor cores have work during its softmax.
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
    key_tiles,
    load_row_numbers,
    make_barriers,
    num_programs,
    store_slots,
    thread_barrier,
    work_item,
)
from moba.backends.triton_lists import Items, Lists

BUFFERS = gl.constexpr(2)  # places for an item's queries
CONSUMER_REGISTERS = gl.constexpr(216)
PRODUCER_REGISTERS = gl.constexpr(72)


def forward_long(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lists: Lists, items: Items,
    partial: torch.Tensor, partial_lse: torch.Tensor, first_kv_head: int, num_kv_heads: int, scale_log2: float,
) -> None:  # fmt: skip
    """Fills the partial results [heads, region, D] and [heads, region] of so many key/value heads; the items are of
    GLUON_ITEM_ROWS rows."""
    num_items = items.max_items * num_kv_heads
    gluon_forward_kernel[(num_programs(num_items, q.device),)](
        q, descriptor(k, 128), descriptor(v, 128), lists.rows, lists.list_start, items.item_start, items.item_block,
        lists.start_M, lists.length_M, lists.skipped_M, partial, partial_lse, first_kv_head, lists.num_blocks,
        items.max_items, items.item_rows, lists.region, num_items, scale_log2,
        GROUP=q.shape[1] // k.shape[1], num_warps=4,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["first_kv_head", "num_blocks", "max_items", "item_rows", "region", "num_items"])
def gluon_forward_kernel(
    q, k, v, rows, list_start, item_start, item_block, block_start, block_length, block_skipped,
    partial, partial_lse, first_kv_head, num_blocks, max_items, item_rows, region, num_items, scale_log2,
    GROUP: gl.constexpr,
):  # fmt: skip
    """One program: 2 * TILE rows of one list against all keys of its block, then the next such item."""
    dtype: gl.constexpr = q.dtype.element_ty
    query_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, D], dtype)
    queries = gl.allocate_shared_memory(dtype, [2 * BUFFERS, TILE, D], query_layout)
    keys = gl.allocate_shared_memory(dtype, [STAGES, KEYS, D], k.layout)
    values = gl.allocate_shared_memory(dtype, [STAGES, KEYS, D], v.layout)
    # Of the places for keys, values and queries: full, empty.
    barriers = (
        make_barriers(STAGES, 1), make_barriers(STAGES, 2),
        make_barriers(STAGES, 1), make_barriers(STAGES, 2),
        make_barriers(BUFFERS, 1), make_barriers(BUFFERS, 2),
    )  # fmt: skip
    fence_async_shared()
    thread_barrier()
    walk = (
        list_start, item_start, item_block, block_start, block_length, block_skipped,
        first_kv_head, num_blocks, max_items, item_rows,
    )  # fmt: skip
    shared = (queries, keys, values)
    outputs = (partial, partial_lse)
    gl.warp_specialize(
        [
            (_consumer, (0, outputs, walk, region, num_items, scale_log2, shared, barriers, GROUP)),
            (_consumer, (1, outputs, walk, region, num_items, scale_log2, shared, barriers, GROUP)),
            (_producer, (q, k, v, rows, walk, region, num_items, shared, barriers, GROUP)),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


@gluon.jit
def _producer(q, k, v, rows, walk, region, num_items, shared, barriers, GROUP: gl.constexpr):
    """Hands over the queries of each item, and its keys and values tile by tile."""
    queries, keys, values = shared
    key_full, key_empty, value_full, value_empty, query_full, query_empty = barriers
    tile_index = 0  # counts key tiles through all items
    item_index = 0
    for index in range(gl.program_id(0), num_items, gl.num_programs(0)):
        kv_head, _local_head, start, length, list_begin, begin, end = work_item(index, walk, GROUP)
        if begin < end:
            buffer = item_index % BUFFERS
            mbarrier.wait(query_empty.index(buffer), ((item_index // BUFFERS) & 1) ^ 1)
            for i in gl.static_range(2):
                row = load_row_numbers(
                    rows + kv_head.to(gl.int64) * region, begin + i * TILE, end, gl.SliceLayout(1, COPY)
                )
                gather_rows(queries.index(buffer * 2 + i), q, row)
            async_copy.commit_group()
            for j in range(key_tiles(end, list_begin, length, GROUP)):
                stage = tile_index % STAGES
                parity = ((tile_index // STAGES) & 1) ^ 1
                place = [start + j * KEYS, kv_head * D]
                mbarrier.wait(key_empty.index(stage), parity)
                mbarrier.expect(key_full.index(stage), 2 * TILE_BYTES)
                tma.async_copy_global_to_shared(k, place, key_full.index(stage), keys.index(stage))
                if j == 0:
                    # The queries' copies have run while this waited for the place of the keys.
                    async_copy.wait_group(0)
                    fence_async_shared()
                    thread_barrier()
                    mbarrier.arrive(query_full.index(buffer), count=1)
                mbarrier.wait(value_empty.index(stage), parity)
                mbarrier.expect(value_full.index(stage), 2 * TILE_BYTES)
                tma.async_copy_global_to_shared(v, place, value_full.index(stage), values.index(stage))
                tile_index += 1
            item_index += 1


@gluon.jit
def _consumer(
    which, outputs, walk, region, num_items, scale_log2, shared, barriers, GROUP: gl.constexpr
):  # fmt: skip
    """Partial results of TILE rows of each item, those of the first or second consumer."""
    queries, keys, values = shared
    key_full, key_empty, value_full, value_empty, query_full, query_empty = barriers
    partial, partial_lse = outputs
    tile_index = 0
    item_index = 0
    for index in range(gl.program_id(0), num_items, gl.num_programs(0)):
        _kv_head, local_head, _start, length, list_begin, begin, end = work_item(index, walk, GROUP)
        if begin < end:
            tiles, full_tiles, first_slot, slot, last_key = consumer_rows(which, begin, end, list_begin, length, GROUP)
            buffer = item_index % BUFFERS
            query = queries.index(buffer * 2 + which)

            top = gl.full([TILE], float("-inf"), gl.float32, gl.SliceLayout(1, PRODUCT))
            total = gl.zeros([TILE], gl.float32, gl.SliceLayout(1, PRODUCT))
            out = gl.zeros([TILE, D], gl.float32, PRODUCT)
            mbarrier.wait(query_full.index(buffer), (item_index // BUFFERS) & 1)
            stage = tile_index % STAGES
            mbarrier.wait(key_full.index(stage), (tile_index // STAGES) & 1)
            score = _scores(query, keys.index(stage))
            score = warpgroup_mma_wait(0, deps=(score,))
            thread_barrier()
            mbarrier.arrive(key_empty.index(stage), count=1)
            # There is no product to wait for, so the mask costs nothing here, needed or not.
            weight, top, total, _decay = _softmax(score, top, total, 0, last_key, scale_log2, True)
            weight = gl.convert_layout(weight.to(values.dtype), LEFT)
            tile_index += 1
            for j in range(1, full_tiles):
                weight, top, total, out = _step(
                    query, keys, values, barriers, tile_index, j, weight, top, total, out, last_key, scale_log2, False
                )
                tile_index += 1
            for j in range(gl.maximum(full_tiles, 1), tiles):
                weight, top, total, out = _step(
                    query, keys, values, barriers, tile_index, j, weight, top, total, out, last_key, scale_log2, True
                )
                tile_index += 1
            stage = (tile_index - 1) % STAGES
            mbarrier.wait(value_full.index(stage), ((tile_index - 1) // STAGES) & 1)
            if tiles * KEYS > length:
                clear_past_end(values.index(stage), (tiles - 1) * KEYS, length)
            out = warpgroup_mma(weight, values.index(stage), out, is_async=True)
            out, weight = warpgroup_mma_wait(0, deps=(out, weight))
            thread_barrier()
            mbarrier.arrive(value_empty.index(stage), count=1)

            out = out * (1.0 / total)[:, None]
            base = local_head.to(gl.int64) * region
            gl.store(partial_lse + base + slot, top + gl.log2(total), mask=slot < end)
            store_slots(partial + base * D, out, query, query_empty.index(buffer), first_slot, end)
            item_index += 1


@gluon.jit
def _scores(query, key_tile):
    """Begins the product of queries and keys, [TILE, KEYS]."""
    zero = gl.zeros([TILE, KEYS], gl.float32, PRODUCT)
    return warpgroup_mma(query, key_tile.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _step(
    query, keys, values, barriers, tile_index, j, weight, top, total, out, last_key, scale_log2, MASKED: gl.constexpr
):  # fmt: skip
    """(weights, running maximum, sum, output) after the scores of key tile j and the values of the tile before."""
    key_full, key_empty, value_full, value_empty, _query_full, _query_empty = barriers
    stage = tile_index % STAGES
    before = (tile_index - 1) % STAGES
    mbarrier.wait(key_full.index(stage), (tile_index // STAGES) & 1)
    score = _scores(query, keys.index(stage))
    mbarrier.wait(value_full.index(before), ((tile_index - 1) // STAGES) & 1)
    out = warpgroup_mma(weight, values.index(before), out, is_async=True)
    score = warpgroup_mma_wait(1, deps=(score,))
    thread_barrier()
    mbarrier.arrive(key_empty.index(stage), count=1)
    new_weight, top, total, decay = _softmax(score, top, total, j * KEYS, last_key, scale_log2, MASKED)
    out, weight = warpgroup_mma_wait(0, deps=(out, weight))
    thread_barrier()
    mbarrier.arrive(value_empty.index(before), count=1)
    return gl.convert_layout(new_weight.to(values.dtype), LEFT), top, total, out * decay[:, None]


@gluon.jit
def _softmax(score, top, total, first_key, last_key, scale_log2, MASKED: gl.constexpr):
    """(weights, running maximum, running sum, factor by which earlier sums shrink)"""
    if MASKED:
        key = first_key + gl.arange(0, KEYS, gl.SliceLayout(0, PRODUCT))
        score = gl.where(key[None, :] <= last_key[:, None], score, float("-inf"))
    new_top = gl.maximum(top, gl.max(score, axis=1) * scale_log2)
    weight = gl.exp2(score * scale_log2 - new_top[:, None])
    decay = gl.exp2(top - new_top)
    return weight, new_top, total * decay + gl.sum(weight, axis=1), decay
