"""Key-major lists for the Triton kernels: for every (key/value head, block), the query rows that selected it.

The attention kernels work block by block: they keep the keys and values of a block on chip and stream the queries that
picked it. This module turns the query-major selection into those lists by a counting sort, and cuts the lists into
work items. Everything is sized from shapes alone, so the host never waits for the device, and the order is fixed, so
that sums over a list repeat bit by bit.

Terms, used in all triton_*.py files:
- A *row* is one query of one head: row = token * H + head, the row of q seen as [T * H, D].
- The heads of a group share one key/value head, so they share its lists: a list holds the rows of all G = H / H_kv of
  them. K and V are then read once for the group, and their gradients need no sum over heads afterwards.
- A list is in order of row. The rows of the block itself (its `length` tokens times G heads) therefore come first, and
  only they need a causal mask; later rows are *history* picks, which see the whole block. Where queries are only the
  last tokens of their document's keys, the first `skipped` tokens of a block have none: kernels then count the places
  of a list from where it would begin with them (`list_begin` of `load_item`).
- A *slot* is a place in the lists of a key/value head: block b owns the slots [list_start[b], list_start[b + 1]).
  Partial results are written to slots, which makes the writes contiguous; `slots` is the inverse map by which a row
  finds its K partial results.
- A *work item* is a stretch of at most `item_rows` slots of one list: what one program takes.
"""

# Triton's stubs know neither launch options, nor that constants become tl.constexpr, nor what its functions return.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from moba.backends.triton_tiles import MULTIPROCESSORS, cdiv
from moba.documents import Documents

RANK_TILE = 32
PLACE_TILE = 1024
MAX_RANK_PROGRAMS = 16 * MULTIPROCESSORS  # chunks of all key/value heads: they run at once
MAX_COUNTERS = 1 << 23  # their counters, one a block: 32 MB, which stay in the L2 cache
SHORT_LAUNCH = 20  # times that programs fill the card; a longer launch evens itself out
HEADS_TOGETHER = 16  # query heads whose work items take turns in a short launch
ITEM_INTEGERS = (
    *("first_kv_head", "num_blocks", "max_items", "item_rows", "max_splits", "region", "block_size", "key_tiles"),
    *("past_end", "heads_together"),
)
"""Arguments of the kernels that make dK and dV of work items, for whose values nothing is compiled."""


@dataclass(frozen=True)
class Layout:
    """Where the blocks of a pack lie, on the device. Blocks are numbered through the pack; M = S // B + N bounds their
    number, with S keys. Documents makes it once per pack and block size."""

    num_blocks: int
    start_M: torch.Tensor
    """int32 [M]: first key of the block."""
    length_M: torch.Tensor
    """int32 [M]: keys of the block, at most B; 0 in unused slots at the end."""
    skipped_M: torch.Tensor
    """int32 [M]: keys of the block before the first that is a query too; its length if none is."""
    first_block_T: torch.Tensor
    """int32 [T]: first block of the query's document."""
    own_block_T: torch.Tensor
    """int32 [T]: block that holds the query."""


@dataclass(frozen=True)
class Lists:
    """The rows that selected each block. `region` = T * G * K slots per key/value head, not all of them used."""

    region: int
    num_blocks: int
    rows: torch.Tensor
    """int32 [H_kv, region]: row held by each slot, list after list."""
    slots: torch.Tensor
    """int32 [T, H, K]: slot of each selection within its key/value head's region; -1 where nothing was selected."""
    list_start: torch.Tensor
    """int32 [H_kv, M + 1]: first slot of each list."""
    start_M: torch.Tensor
    """As in Layout: with these three the lists are all that attention needs to know of the pack."""
    length_M: torch.Tensor
    skipped_M: torch.Tensor


@dataclass(frozen=True)
class Items:
    """Work items: lists cut into stretches of at most `item_rows` slots."""

    item_rows: int
    max_items: int
    """Bound on the items of a key/value head, known from shapes."""
    max_splits: int
    """Bound on the items of a key/value head whose list has more than one."""
    item_start: torch.Tensor
    """int32 [H_kv, M + 1]: items before each list; the last entry counts them all."""
    split_start: torch.Tensor
    """int32 [H_kv, M + 1]: the same, counting only items of lists that have more than one."""
    item_block: torch.Tensor
    """int32 [H_kv, max_items]: block of each item."""


def build_layout(documents: Documents, block_size: int) -> Layout:
    """The block layout of a pack whose queries are the last of their document's keys. Two small launches."""
    bounds_N, keys_N, device = documents.cu_seqlens, documents.key_bounds, documents.device
    num_tokens, num_documents = documents.num_queries, documents.number
    num_blocks = documents.num_keys // block_size + num_documents
    first_block_N = torch.empty_like(keys_N)
    scan_documents_kernel[(1,)](keys_N, first_block_N, num_documents, block_size, TILE=1024)

    def empty(n):
        return torch.empty(n, dtype=torch.int32, device=device)

    blocks = [empty(num_blocks) for _ in range(3)]
    layout = Layout(num_blocks, *blocks, empty(num_tokens), empty(num_tokens))
    tile = 256
    layout_kernel[(cdiv(max(num_tokens, num_blocks), tile),)](
        bounds_N, keys_N, first_block_N, *blocks, layout.first_block_T, layout.own_block_T,
        num_documents, num_tokens, num_blocks, block_size, num_documents.bit_length(), TILE=tile,
    )  # fmt: skip
    return layout


def build_lists(selection: torch.Tensor, layout: Layout, num_kv_heads: int) -> Lists:
    """The lists of a selection int32 [T, H, K] of block numbers, -1 where there is none, the own block last.

    A counting sort over chunks of tokens: rank each pick among its chunk's picks of the same block, which counts them
    too; a prefix sum over (block, chunk) gives every chunk a place in every list; then all picks are filed, each at its
    rank from there. One program owns a chunk's counts, so nothing races.
    """
    num_tokens, num_heads, top_k = selection.shape
    num_blocks = layout.num_blocks
    group, device = num_heads // num_kv_heads, selection.device
    region = num_tokens * group * top_k
    max_chunks = max(8, min(MAX_RANK_PROGRAMS, MAX_COUNTERS // num_blocks) // num_kv_heads)
    chunk_tokens = max(16, cdiv(num_tokens, max_chunks))
    num_chunks = cdiv(num_tokens, chunk_tokens)

    counts = torch.zeros(num_kv_heads, num_chunks, num_blocks, dtype=torch.int32, device=device)
    shape = (num_tokens, num_blocks, num_chunks, chunk_tokens)
    constants = {"NUM_HEADS": num_heads, "GROUP": group, "TOP_K": top_k}
    slots = torch.empty_like(selection)
    rank_kernel[num_chunks, num_kv_heads](selection, counts, slots, *shape, **constants, TILE=RANK_TILE, num_warps=1)
    # By block, then chunk; and through all key/value heads, since a long scan is faster than a few rows of scans; only
    # differences within a head are used, so that int32 may wrap around.
    ends = counts.transpose(1, 2).reshape(-1).cumsum(0, dtype=torch.int32)
    list_start = torch.empty(num_kv_heads, num_blocks + 1, dtype=torch.int32, device=device)
    tile = 1024
    cursors_kernel[(cdiv(num_blocks * num_chunks, tile), num_kv_heads)](
        counts, ends, list_start, num_blocks, num_chunks, TILE=tile
    )
    rows = torch.empty(num_kv_heads, region, dtype=torch.int32, device=device)
    tiles = cdiv(chunk_tokens * group * top_k, PLACE_TILE)
    place_kernel[num_chunks * tiles, num_kv_heads](
        selection, counts, rows, slots, region, *shape, tiles, **constants, TILE=PLACE_TILE
    )
    return Lists(region, num_blocks, rows, slots, list_start, layout.start_M, layout.length_M, layout.skipped_M)


def build_items(lists: Lists, item_rows: int) -> Items:
    """The lists cut into work items of at most `item_rows` slots."""
    num_kv_heads, num_blocks = lists.list_start.shape[0], lists.num_blocks
    max_items = lists.region // item_rows + num_blocks
    max_splits = min(max_items, 2 * lists.region // item_rows)  # ceil(x) < 2x for the x > 1 of a list in several items
    item_start, split_start = torch.empty_like(lists.list_start), torch.empty_like(lists.list_start)
    item_block = torch.empty(num_kv_heads, max_items, dtype=torch.int32, device=item_start.device)
    items_kernel[(num_kv_heads,)](
        lists.list_start, item_start, split_start, item_block, num_blocks, max_items, item_rows, TILE=1024
    )
    return Items(item_rows, max_items, max_splits, item_start, split_start, item_block)


def item_grid(programs: int, num_kv_heads: int, group: int, warps: int) -> tuple[tuple[int, int, int], int]:
    """The grid of a launch with so many programs for each of some key/value heads, of `group` query heads each; and how
    many heads' programs take turns on it, as `head_program` reads it.

    The first blocks of a document have the longest lists. With one head after another the last head's longest items
    start when the other heads' are done, and a short launch then waits for them; so there the items of several heads
    take turns. A long launch keeps to one head, since then more of the rows that it gathers are in the L2 cache.
    """
    loads = programs * num_kv_heads * warps / (8 * MULTIPROCESSORS)  # eight warps take a multiprocessor's registers
    most = HEADS_TOGETHER // group if loads < SHORT_LAUNCH else 1
    together = max(n for n in range(1, max(1, most) + 1) if num_kv_heads % n == 0)
    # Programs that do not take turns come first, since only the first side of a grid may exceed 65,535.
    first, second = (programs, 1) if together == 1 else (together, programs)
    return (first, second, num_kv_heads // together), together


@triton.jit(do_not_specialize=["num_documents", "block_size"])
def scan_documents_kernel(bounds, first_block, num_documents, block_size, TILE: tl.constexpr):
    """first_block[d] = number of blocks of the documents before d, for d up to and including their number."""
    zero = tl.program_id(0) * 0
    tl.store(first_block, zero)
    blocks_before = zero
    for start in range(0, num_documents, TILE):
        document = start + tl.arange(0, TILE)
        inside = document < num_documents
        begin = tl.load(bounds + document, mask=inside, other=0)
        end = tl.load(bounds + document + 1, mask=inside, other=0)
        blocks = (end - begin + block_size - 1) // block_size
        tl.store(first_block + document + 1, blocks_before + tl.cumsum(blocks), mask=inside)
        blocks_before += tl.sum(blocks)


@triton.jit(do_not_specialize=["num_documents", "num_tokens", "num_blocks", "block_size", "search_steps"])
def layout_kernel(
    bounds, key_bounds, first_block, start, length, skipped, first_block_of_token, own_block_of_token,
    num_documents, num_tokens, num_blocks, block_size, search_steps, TILE: tl.constexpr,
):  # fmt: skip
    """Fills the tensors of a Layout: entry i of the blocks and entry i of the tokens."""
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)

    is_token = i < num_tokens
    document = _find_document(bounds, i, num_documents, search_steps)
    first = tl.load(first_block + document)
    position = i - tl.load(bounds + document + 1) + _num_keys(key_bounds, document)
    tl.store(first_block_of_token + i, first, mask=is_token)
    tl.store(own_block_of_token + i, first + position // block_size, mask=is_token)

    is_block = i < num_blocks
    used = i < tl.load(first_block + num_documents)
    document = _find_document(first_block, i, num_documents, search_steps)
    begin = tl.load(key_bounds + document) + (i - tl.load(first_block + document)) * block_size
    end = tl.minimum(begin + block_size, tl.load(key_bounds + document + 1))
    num_queries = tl.load(bounds + document + 1) - tl.load(bounds + document)
    first_query = tl.load(key_bounds + document + 1) - num_queries
    first_query = tl.minimum(tl.maximum(first_query, begin), end)
    tl.store(start + i, tl.where(used, begin, 0), mask=is_block)
    tl.store(length + i, tl.where(used, end - begin, 0), mask=is_block)
    tl.store(skipped + i, tl.where(used, first_query - begin, 0), mask=is_block)


@triton.jit
def _num_keys(key_bounds, document):
    return tl.load(key_bounds + document + 1) - tl.load(key_bounds + document)


@triton.jit
def _find_document(bounds, value, num_documents, search_steps):
    """Document d with bounds[d] <= value < bounds[d + 1]; the last one for values past the end. Skips empty
    documents."""
    low = tl.zeros_like(value)
    high = tl.zeros_like(value) + num_documents
    for _ in range(search_steps):
        middle = tl.minimum((low + high) // 2, num_documents - 1)
        right = (tl.load(bounds + middle + 1) <= value) & (low < high)
        low = tl.where(right, middle + 1, low)
        high = tl.where(right, high, tl.minimum(middle, high))
    return tl.minimum(low, num_documents - 1)


@triton.jit
def _picks(
    selection, start, end, kv_head, first_token,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, TOP_K: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """TILE picks of a chunk, counted by (token, head of the group, k): their address in the selection, row and
    block."""
    pick = start + tl.arange(0, TILE)
    token = first_token + pick // (GROUP * TOP_K)
    row = token * NUM_HEADS + kv_head * GROUP + (pick // TOP_K) % GROUP
    address = row.to(tl.int64) * TOP_K + pick % TOP_K
    block = tl.load(selection + address, mask=pick < end, other=-1)
    return address, row, block, pick < end


@triton.jit(do_not_specialize=["num_tokens", "num_blocks", "num_chunks", "chunk_tokens"])
def rank_kernel(
    selection, counts, ranks, num_tokens, num_blocks, num_chunks, chunk_tokens,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, TOP_K: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Ranks the picks of one chunk, in order: how many earlier ones are of the same block. Leaves their number in
    counts[kv_head, chunk, block]."""
    chunk, kv_head = tl.program_id(0), tl.program_id(1)
    first_token = chunk * chunk_tokens
    num_picks = tl.minimum(chunk_tokens, num_tokens - first_token) * GROUP * TOP_K
    counts += (kv_head.to(tl.int64) * num_chunks + chunk) * num_blocks
    lane = tl.arange(0, TILE)
    earlier = lane[:, None] < lane[None, :]
    address, _, block, _ = _picks(selection, 0, num_picks, kv_head, first_token, NUM_HEADS, GROUP, TOP_K, TILE)
    for start in range(0, num_picks, TILE):
        # The next picks are on their way while these are counted: a program is a chain of waits for memory.
        next_address, _, next_block, _ = _picks(
            selection, start + TILE, num_picks, kv_head, first_token, NUM_HEADS, GROUP, TOP_K, TILE
        )
        picked = block >= 0
        count = tl.load(counts + block, mask=picked, other=0)
        # In one sum: how many picks of this tile are of the same block (low half), and how many of those come earlier.
        # Over the first axis, of which a thread holds all: the sum needs no other thread.
        same = block[:, None] == block[None, :]
        packed = tl.sum(tl.where(same, tl.where(earlier, 65537, 1), 0), axis=0)
        rank = count + (packed >> 16)
        tl.store(ranks + address, rank, mask=picked)
        is_last = (packed >> 16) == (packed & 65535) - 1
        tl.debug_barrier()  # all have read the counts before the last of each block moves its own ...
        tl.store(counts + block, rank + 1, mask=picked & is_last)
        tl.debug_barrier()  # ... and it has moved before the next tile reads it
        address, block = next_address, next_block


@triton.jit(do_not_specialize=["num_blocks", "num_chunks"])
def cursors_kernel(counts, ends, list_start, num_blocks, num_chunks, TILE: tl.constexpr):
    """Turns counts into cursors, each chunk's first slot in each list, in place; and writes where the lists start."""
    kv_head = tl.program_id(1)
    counters = num_blocks * num_chunks
    before = kv_head.to(tl.int64) * counters
    base = tl.load(ends + before - 1, mask=kv_head > 0, other=0)
    counter = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = counter < counters
    chunk, block = counter // num_blocks, counter % num_blocks
    end = tl.load(ends + before + block * num_chunks + chunk, mask=inside, other=0) - base
    begin = end - tl.load(counts + before + counter, mask=inside, other=0)
    tl.store(counts + before + counter, begin, mask=inside)
    starts = list_start + kv_head * (num_blocks + 1) + block
    tl.store(starts, begin, mask=inside & (chunk == 0))
    tl.store(starts + 1, end, mask=inside & (chunk == num_chunks - 1) & (block == num_blocks - 1))


@triton.jit(do_not_specialize=["region", "num_tokens", "num_blocks", "num_chunks", "chunk_tokens", "tiles"])
def place_kernel(
    selection, cursors, rows, slots, region, num_tokens, num_blocks, num_chunks, chunk_tokens, tiles,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, TOP_K: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Files one of the `tiles` tiles of a chunk's picks into the lists and turns their ranks into slots, in place.
    Programs start in order of tokens, so that those of one time write to neighbouring slots of every list, and the L2
    cache can gather whole sectors."""
    chunk, tile, kv_head = tl.program_id(0) // tiles, tl.program_id(0) % tiles, tl.program_id(1)
    first_token = chunk * chunk_tokens
    num_picks = tl.minimum(chunk_tokens, num_tokens - first_token) * GROUP * TOP_K
    address, row, block, in_chunk = _picks(
        selection, tile * TILE, num_picks, kv_head, first_token, NUM_HEADS, GROUP, TOP_K, TILE
    )
    picked = block >= 0
    cursors += (kv_head.to(tl.int64) * num_chunks + chunk) * num_blocks
    slot = tl.load(cursors + block, mask=picked, other=0) + tl.load(slots + address, mask=picked, other=0)
    tl.store(rows + kv_head.to(tl.int64) * region + slot, row, mask=picked)
    tl.store(slots + address, tl.where(picked, slot, -1), mask=in_chunk)


@triton.jit(do_not_specialize=["num_blocks", "max_items", "item_rows"])
def items_kernel(list_start, item_start, split_start, item_block, num_blocks, max_items, item_rows, TILE: tl.constexpr):
    """Prefix sums over the lists of one key/value head of their number of items, and of that number where it exceeds
    one; and the block of each item."""
    kv_head = tl.program_id(0)
    first = kv_head * (num_blocks + 1)
    item_block += kv_head.to(tl.int64) * max_items
    zero = kv_head * 0
    tl.store(item_start + first, zero)
    tl.store(split_start + first, zero)
    items_before, splits_before = zero, zero
    for start in range(0, num_blocks, TILE):
        block = start + tl.arange(0, TILE)
        inside = block < num_blocks
        begin = tl.load(list_start + first + block, mask=inside, other=0)
        end = tl.load(list_start + first + block + 1, mask=inside, other=0)
        items = (end - begin + item_rows - 1) // item_rows
        splits = tl.where(items > 1, items, 0)
        items_end = items_before + tl.cumsum(items)
        tl.store(item_start + first + block + 1, items_end, mask=inside)
        tl.store(split_start + first + block + 1, splits_before + tl.cumsum(splits), mask=inside)
        for i in range(0, tl.max(items)):
            tl.store(item_block + items_end - items + i, block, mask=i < items)
        items_before += tl.sum(items)
        splits_before += tl.sum(splits)


@triton.jit
def head_program(heads_together):
    """(this program counted within its key/value head, that head counted from the launch's first): see `item_grid`."""
    turn = tl.where(heads_together > 1, tl.program_id(0), 0)
    return tl.program_id(0) - turn + tl.program_id(1), tl.program_id(2) * heads_together + turn


@triton.jit
def load_item(
    item, kv_head, item_start, item_block, list_start, block_skipped, num_blocks, max_items, item_rows,
    GROUP: tl.constexpr,
):  # fmt: skip
    """(block, where its list would begin with rows of all its tokens, the item's first slot, one past its last); an
    empty stretch if there is no such item."""
    lists = kv_head * (num_blocks + 1)
    exists = item < tl.load(item_start + lists + num_blocks)
    block = tl.load(item_block + kv_head.to(tl.int64) * max_items + item, mask=exists, other=0)
    list_begin = tl.load(list_start + lists + block)
    list_end = tl.load(list_start + lists + block + 1)
    begin = list_begin + (item - tl.load(item_start + lists + block)) * item_rows
    end = tl.minimum(begin + item_rows, list_end)
    return block, list_begin - tl.load(block_skipped + block) * GROUP, begin, tl.where(exists, end, begin)


@triton.jit
def split_tiles(begin, end, own_end, ROWS: tl.constexpr):
    """Ends of a work item's two stretches of whole tiles: those with own rows, which need the causal mask, and those of
    history rows, which need no mask at all. What is left is shorter than a tile."""
    masked_end = tl.minimum(end, begin + tl.cdiv(tl.maximum(own_end - begin, 0), ROWS) * ROWS)
    return masked_end, masked_end + (end - masked_end) // ROWS * ROWS


@triton.jit
def last_visible_key(slot, list_begin, length, GROUP: tl.constexpr):
    """Last key of its block that the row in a slot sees: its own position for the block's own rows, which lead the list
    GROUP to a token; the whole block for history rows."""
    return tl.minimum((slot - list_begin) // GROUP, length - 1)


@triton.jit
def load_rows(base, index, mask, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[N, BLOCK_D]: rows `index` of a matrix with row stride `stride`, zeros where `mask` is false and in padded
    dimensions."""
    dim = tl.arange(0, BLOCK_D)
    address = index.to(tl.int64)[:, None] * stride + dim[None, :]
    if HEAD_DIM == BLOCK_D:
        return tl.load(base + address, mask=mask[:, None], other=0.0)
    return tl.load(base + address, mask=mask[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def gather_rows(base, row, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[N, BLOCK_D]: rows of a contiguous matrix, all of them valid: places past a list's end hold row 0."""
    dim = tl.arange(0, BLOCK_D)
    address = row.to(tl.int64)[:, None] * HEAD_DIM + dim[None, :]
    if HEAD_DIM == BLOCK_D:
        return tl.load(base + address)
    return tl.load(base + address, mask=(dim < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def store_rows(base, index, value, mask, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Writes value [N, BLOCK_D] to rows `index` where `mask`, in the dtype of `base`."""
    dim = tl.arange(0, BLOCK_D)
    address = index.to(tl.int64)[:, None] * stride + dim[None, :]
    value = value.to(base.dtype.element_ty)
    tl.store(base + address, value, mask=mask[:, None] & (dim < HEAD_DIM)[None, :])


@triton.jit
def store_slots(
    base, first, end, value, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TAIL: tl.constexpr
):
    """Writes value [ROWS, BLOCK_D] to the slots from `first` on; with TAIL, which costs more, only to those before
    `end`. Slots count from `base` and stay within a work item, so that int32 holds their addresses."""
    place, dim = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    address = base + first * HEAD_DIM + place[:, None] * HEAD_DIM + dim[None, :]
    value = value.to(base.dtype.element_ty)
    if TAIL:
        tl.store(address, value, mask=(first + place < end)[:, None] & (dim < HEAD_DIM)[None, :])
    elif HEAD_DIM == BLOCK_D:
        tl.store(address, value)
    else:
        tl.store(address, value, mask=(dim < HEAD_DIM)[None, :])
