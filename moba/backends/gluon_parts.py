"""What the Gluon kernels of gluon_forward.py, gluon_backward.py and gluon_short.py share: tiles, layouts, loads, items.

They are kernels for Hopper at head size 128, in Gluon, Triton's language in which a program says which warps do what.
Terms are those of triton_lists.py. A program has three groups of four warps, its *partitions*:

- The *producer* fetches. Keys and values of a block are contiguous and come as tiles by TMA (the tensor memory
  accelerator; one thread asks for a whole tile), the rows of q and dO that a list names by cp.async, one by one.
- Two *consumers* compute, each on its own TILE rows (TILE keys for dK and dV), from the same tiles in shared memory.
  The two do not wait for each other, so one's softmax runs while the tensor cores work for the other.

A place in shared memory is handed over by two barriers. `full`: the producer's (and TMA's) word to the consumers that
the data are there. `empty`: the word of both consumers (two arrivals) that they have read them and the producer may
overwrite them. The i-th use of a place completes the i-th phase of its barriers; a wait names a phase by its parity,
so the consumers' wait for use i is for parity i % 2 of `full`, the producer's for parity (i % 2) ^ 1 of `empty`, which
the first use passes at once. What threads wrote to shared memory is seen by tensor cores after `fence_async_shared` by
each writer and a barrier among them.

Tiles that end past their block hold keys and values of the next document, or zeros past the end of all. Weights there
are zero, but zero times the NaN or infinity of another document would be NaN: where a product sums over keys,
`clear_past_end` makes such rows zeros first.
"""

# Gluon's stubs know neither that constants become gl.constexpr, nor what its functions return.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

from functools import cache

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from moba.backends import triton_lists

HEAD_DIM = 128
D = gl.constexpr(HEAD_DIM)
TILE = gl.constexpr(64)
"""Rows (for dK and dV: keys) of a consumer: what one tensor core instruction of four warps takes."""
KEYS = gl.constexpr(128)
"""Keys of a tile in the forward and for dQ."""
STAGES = gl.constexpr(2)
"""Places for tiles of keys, and of values."""
TILE_BYTES = gl.constexpr(64 * 128 * 2)

PRODUCT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
"""Of a product [TILE, 128] of one consumer in registers."""
LEFT = gl.constexpr(gl.DotOperandLayout(0, PRODUCT.value, 2))
"""Of the left operand of a product, in registers."""
COPY = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))
"""For [rows, D] from or to memory: a row is 16 threads of 16 bytes."""
FLAT = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
CLEARED = gl.constexpr(32)  # rows that clear_past_end takes at once: registers are scarce where it runs

thread_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier  # renamed in Triton 3.7
load_item = gluon.jit(triton_lists.load_item.fn)
last_visible_key = gluon.jit(triton_lists.last_visible_key.fn)
head_program = gluon.jit(triton_lists.head_program.fn)


def descriptor(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """Of keys or values [S, H_kv, D], by which TMA loads tiles of `rows` rows of one head."""
    return TensorDescriptor.from_tensor(x.view(x.shape[0], -1), [rows, HEAD_DIM], tile_layout(rows, HEAD_DIM, x.dtype))


@cache
def tile_layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """In shared memory, as TMA and tensor cores take it. Kept, since Gluon takes 100 us to make one."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16 if dtype == torch.bfloat16 else gl.float16)


def num_programs(num_items: int, device: torch.device) -> int:
    """Of a launch whose programs walk through the work items: one for each multiprocessor."""
    return min(num_items, torch.cuda.get_device_properties(device).multi_processor_count)


@gluon.jit
def make_barriers(NUMBER: gl.constexpr, ARRIVALS: gl.constexpr):
    """Barriers whose phases take ARRIVALS arrivals each, for so many places in shared memory."""
    barriers = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUMBER):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def work_item(index, walk, GROUP: gl.constexpr):
    """What the index-th work item of a launch is: its key/value head, that head counted from the launch's first, its
    block's first key and number of keys, and, as of `load_item`, where its list begins, its first slot, one past its
    last."""
    (
        list_start, item_start, item_block, block_start, block_length, block_skipped,
        first_kv_head, num_blocks, max_items, item_rows,
    ) = walk  # fmt: skip
    local_head = index // max_items
    kv_head = first_kv_head + local_head
    block, list_begin, begin, end = load_item(
        index - local_head * max_items, kv_head, item_start, item_block, list_start, block_skipped, num_blocks,
        max_items, item_rows, GROUP,
    )  # fmt: skip
    start, length = gl.load(block_start + block), gl.load(block_length + block)
    return kv_head, local_head, start, length, list_begin, begin, end


@gluon.jit
def key_tiles(end, list_begin, length, GROUP: gl.constexpr):
    """Tiles of keys that the rows of an item see, which is what its last row sees."""
    return (last_visible_key(end - 1, list_begin, length, GROUP) + KEYS) // KEYS


@gluon.jit
def consumer_rows(which, begin, end, list_begin, length, GROUP: gl.constexpr):
    """Of a consumer's TILE rows of an item: the tiles of keys that the item's rows see, those of them that each of the
    consumer's rows sees whole, its first slot, its slots, and the last key that each of its rows sees."""
    tiles = key_tiles(end, list_begin, length, GROUP)
    first_slot = begin + which * TILE
    # What the first row sees whole all others do.
    full_tiles = gl.minimum((last_visible_key(first_slot, list_begin, length, GROUP) + 1) // KEYS, tiles)
    slot = first_slot + gl.arange(0, TILE, gl.SliceLayout(1, PRODUCT))
    last_key = gl.where(slot < end, last_visible_key(slot, list_begin, length, GROUP), 0)
    return tiles, full_tiles, first_slot, slot, last_key


@gluon.jit
def load_row_numbers(rows, first_slot, end, LAYOUT: gl.constexpr):
    """Rows of TILE slots. Slots past the end give the last row: what is computed for them is not stored."""
    return gl.load(rows + gl.minimum(first_slot + gl.arange(0, TILE, LAYOUT), end - 1))


@gluon.jit
def gather_rows(tile, base, row):
    """Begins to copy rows [TILE, D] of a contiguous matrix to shared memory."""
    dim = gl.arange(0, D, gl.SliceLayout(0, COPY))
    async_copy.async_copy_global_to_shared(tile, base + (row.to(gl.int64)[:, None] * D + dim[None, :]))


@gluon.jit
def gather_stats(log_sum, delta, stats, index):
    """Begins to copy the pairs (log2-sum-exp, delta) of TILE rows to two places in shared memory."""
    address = stats + index.to(gl.int64) * 2
    async_copy.async_copy_global_to_shared(log_sum, address)
    async_copy.async_copy_global_to_shared(delta, address + 1)


@gluon.jit
def clear_past_end(tile, first_key, length):
    """Makes zeros of the rows of a tile of keys or values that lie past the end of its block.

    Each consumer does it for itself, before its product. The other may be reading or writing the same tile: all write
    the same bits, zeros past the end and elsewhere what is there already, so it does not matter who comes first.
    """
    for part in gl.static_range(tile.shape[0] // CLEARED):
        if first_key + (part + 1) * CLEARED > length:
            rows = tile.slice(part * CLEARED, CLEARED)
            key = first_key + part * CLEARED + gl.arange(0, CLEARED, gl.SliceLayout(1, COPY))
            rows.store(gl.where((key < length)[:, None], rows.load(COPY), 0.0).to(tile.dtype))
    fence_async_shared()
    thread_barrier()


@gluon.jit
def store_slots(partial, value, tile, empty, first_slot, end):
    """Writes value [TILE, D] of a consumer to the slots before `end`, in whole rows, by way of `tile`, its queries in
    shared memory, which it then hands back."""
    tile.store(value.to(tile.dtype))
    thread_barrier()
    value = tile.load(COPY)
    thread_barrier()
    mbarrier.arrive(empty, count=1)
    slot = first_slot + gl.arange(0, TILE, gl.SliceLayout(1, COPY))
    dim = gl.arange(0, D, gl.SliceLayout(0, COPY))
    gl.store(partial + (slot.to(gl.int64)[:, None] * D + dim[None, :]), value, mask=(slot < end)[:, None])
