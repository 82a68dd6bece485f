"""Attention backward in Triton: gradients of q, k and v from the saved selection and log-sum-exp, without atomics.

With P = exp(S - lse), delta = rowsum(dO * O) and dS = P * (dO V^T - delta): dV = P^T dO, dK = dS^T Q, dQ = dS K. dK
and dV are sums over the list of a block, which a program accumulates on chip; dQ is a sum over the K blocks of a row,
so each (row, block) writes a partial dQ to its slot and a merge kernel adds them up.

*Short* blocks: one kernel makes all three (five matrix products). *Long* blocks: one program cannot hold a block, and
a partial dQ per key tile would cost far more memory traffic than arithmetic; so `backward_kv_kernel` makes dK and dV
(four products) and `backward_q_kernel` walks the lists a second time for dQ (three products, two of them repeated).
Where gluon_choice.py says so, the kernels of gluon_short.py and gluon_backward.py do the same.

Lists longer than a work item are cut; their items write float32 partial dK and dV, which `reduce_kv_kernel` adds in a
fixed order.
"""

# Triton's stubs know neither launch options, nor that constants become tl.constexpr, nor what its functions return.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moba.backends.gluon_choice import GLUON_ITEM_ROWS, gluon_kernels
from moba.backends.triton_forward import LOG2_E, key_range, kv_heads_at_once, load_keys, rows_of_group
from moba.backends.triton_lists import (
    ITEM_INTEGERS,
    Items,
    Lists,
    build_items,
    gather_rows,
    head_program,
    item_grid,
    last_visible_key,
    load_item,
    load_rows,
    split_tiles,
    store_rows,
    store_slots,
)
from moba.backends.triton_tiles import MULTIPROCESSORS, Tile, cdiv, is_short, padded, tile_for


def attention_backward(
    d_out: torch.Tensor, d_lse: torch.Tensor | None,
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    lists: Lists, block_size: int, softmax_scale: float, workspace_bytes: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """dQ [T, H, D], dK and dV [S, H_kv, D] in the inputs' dtype. `lse` is [H, T], natural log; d_lse its gradient or
    None."""
    num_tokens, num_heads, head_dim = q.shape
    shape = {"NUM_HEADS": num_heads, "NUM_KV_HEADS": k.shape[1], "HEAD_DIM": head_dim, "BLOCK_D": padded(head_dim)}
    row_stats = torch.empty(num_tokens * num_heads, 2, dtype=torch.float32, device=q.device)
    prepare_rows = 32
    prepare_kernel[(cdiv(num_tokens * num_heads, prepare_rows),)](
        out, d_out, lse, lse if d_lse is None else d_lse, row_stats, num_tokens,
        NUM_HEADS=num_heads, HEAD_DIM=head_dim, BLOCK_D=padded(head_dim), HAS_D_LSE=d_lse is not None,
        ROWS=prepare_rows,
    )  # fmt: skip
    # A block that holds no query may be in nobody's list, and no kernel then writes its gradients.
    of_keys = torch.empty_like if len(k) == len(q) else torch.zeros_like
    gradients = torch.empty_like(q), of_keys(k), of_keys(v)
    run = _backward_short if is_short(block_size, head_dim, q.dtype) else _backward_long
    inputs = (q, k, v, d_out, row_stats.view(torch.int64))
    run(inputs, gradients, lists, block_size, softmax_scale, workspace_bytes, shape)
    return gradients


def _backward_short(inputs, gradients, lists, block_size, softmax_scale, workspace_bytes, shape) -> None:
    """All three gradients in one kernel per group of key/value heads, then the sum over each row's slots."""
    q, k = inputs[:2]
    num_kv_heads, head_dim = k.shape[1:]
    tile = tile_for("backward_short", head_dim, block_size, q.dtype)
    gluon = gluon_kernels("short", block_size, *inputs[:4])
    items = build_items(lists, tile.rows * tile.tiles)
    split_bytes = items.max_splits * 2 * block_size * head_dim * 4
    heads_at_once = kv_heads_at_once(
        num_kv_heads, lists.region * (head_dim * q.element_size() + 8) + split_bytes, workspace_bytes
    )
    slot_stats = torch.empty(heads_at_once, lists.region, dtype=torch.int64, device=q.device)
    partial = torch.empty(heads_at_once, lists.region, head_dim, dtype=q.dtype, device=q.device)
    splits = _split_buffer(items, heads_at_once, block_size, head_dim, q.device)
    for first in range(0, num_kv_heads, heads_at_once):
        count = min(heads_at_once, num_kv_heads - first)
        _fill_slot_stats(slot_stats, inputs[4], lists, first, count)
        grid, heads_together = item_grid(items.max_items, count, q.shape[1] // num_kv_heads, tile.warps)
        if gluon:
            gluon.backward_short(
                *inputs[:4], slot_stats, lists, items, partial, gradients[1], gradients[2], splits, first, grid,
                heads_together, block_size, softmax_scale, softmax_scale * LOG2_E,
            )  # fmt: skip
        else:
            backward_short_kernel[grid](
                *inputs[:4], slot_stats, lists.rows, lists.list_start, items.item_start, items.split_start,
                items.item_block, lists.start_M, lists.length_M, lists.skipped_M, partial, gradients[1], gradients[2],
                splits, first, lists.num_blocks, items.max_items, items.item_rows, items.max_splits, lists.region,
                block_size, heads_together, softmax_scale, softmax_scale * LOG2_E, **shape,
                ROWS=tile.rows, KEYS=tile.keys, EXACT=block_size == tile.keys,
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
        _reduce_kv(gradients, splits, items, lists, first, count, block_size, softmax_scale, shape)
        _merge_q(gradients[0], partial, lists, first, count, softmax_scale, shape)


def _backward_long(inputs, gradients, lists, block_size, softmax_scale, workspace_bytes, shape) -> None:
    """dK and dV by one kernel, dQ by another, each per group of key/value heads."""
    q, k = inputs[:2]
    num_kv_heads, head_dim = k.shape[1:]
    group_rows = lists.region // lists.slots.shape[2]

    gluon = gluon_kernels("backward", block_size, *inputs[:4])
    tile = gluon.KV_TILE if gluon else tile_for("backward_kv", head_dim, block_size, q.dtype)
    items = build_items(lists, _long_item_rows(tile, lists, block_size, num_kv_heads, group_rows))
    split_bytes = items.max_splits * 2 * block_size * head_dim * 4
    heads_at_once = kv_heads_at_once(num_kv_heads, lists.region * 8 + split_bytes, workspace_bytes)
    slot_stats = torch.empty(heads_at_once, lists.region, dtype=torch.int64, device=q.device)
    splits = _split_buffer(items, heads_at_once, block_size, head_dim, q.device)
    key_tiles = cdiv(block_size, tile.keys)
    for first in range(0, num_kv_heads, heads_at_once):
        count = min(heads_at_once, num_kv_heads - first)
        _fill_slot_stats(slot_stats, inputs[4], lists, first, count)
        if gluon:
            gluon.backward_kv(
                *inputs[:4], slot_stats, lists, items, gradients[1], gradients[2], splits, first, count, block_size,
                softmax_scale, softmax_scale * LOG2_E,
            )  # fmt: skip
        else:
            grid, heads_together = item_grid(items.max_items * key_tiles, count, q.shape[1] // num_kv_heads, tile.warps)
            backward_kv_kernel[grid](
                *inputs[:4], slot_stats, lists.rows, lists.list_start, items.item_start, items.split_start,
                items.item_block, lists.start_M, lists.length_M, lists.skipped_M, gradients[1], gradients[2],
                splits, first, lists.num_blocks, items.max_items, items.item_rows, items.max_splits, lists.region,
                block_size, key_tiles, heads_together, softmax_scale, softmax_scale * LOG2_E, **shape,
                ROWS=tile.rows, KEYS=tile.keys, EXACT=block_size % tile.keys == 0,
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
        _reduce_kv(gradients, splits, items, lists, first, count, block_size, softmax_scale, shape)
    del splits, slot_stats

    tile = tile_for("backward_q", head_dim, block_size, q.dtype)
    items = build_items(lists, GLUON_ITEM_ROWS if gluon else tile.rows)
    heads_at_once = kv_heads_at_once(num_kv_heads, lists.region * head_dim * q.element_size(), workspace_bytes)
    partial = torch.empty(heads_at_once, lists.region, head_dim, dtype=q.dtype, device=q.device)
    for first in range(0, num_kv_heads, heads_at_once):
        count = min(heads_at_once, num_kv_heads - first)
        if gluon:
            gluon.backward_q(*inputs, lists, items, partial, first, count, softmax_scale * LOG2_E)
        else:
            backward_q_kernel[(items.max_items, count)](
                *inputs, lists.rows, lists.list_start, items.item_start, items.item_block,
                lists.start_M, lists.length_M, lists.skipped_M, partial, first, lists.num_blocks, items.max_items,
                items.item_rows, lists.region,
                softmax_scale * LOG2_E, **shape, ROWS=tile.rows, KEYS=tile.keys,
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
        _merge_q(gradients[0], partial, lists, first, count, softmax_scale, shape)


def _long_item_rows(tile: Tile, lists: Lists, block_size: int, num_kv_heads: int, group_rows: int) -> int:
    """Rows of a work item of the kernel for dK and dV.

    A program's work is as long as its list, and a block that every query picks has a list of `group_rows`. Lists are
    left whole while such a program would take less than a third of an even share of the launch; else they are cut, to
    pieces of at least 32 rows per key, which keeps the float32 partial sums under a quarter of the memory that the
    partial dQ take.
    """
    top_k = lists.region // group_rows
    even_share = group_rows * top_k * num_kv_heads * cdiv(block_size, tile.keys) / MULTIPROCESSORS
    whole = group_rows if 3 * group_rows < even_share else 32 * block_size
    return cdiv(max(whole, tile.rows * tile.tiles), tile.rows) * tile.rows


def _split_buffer(items: Items, num_heads: int, block_size: int, head_dim: int, device: torch.device) -> torch.Tensor:
    """float32 [heads, items of cut lists, (dK, dV), B, D]."""
    return torch.empty(num_heads, items.max_splits, 2, block_size, head_dim, dtype=torch.float32, device=device)


def _fill_slot_stats(slot_stats, row_stats, lists: Lists, first: int, count: int) -> None:
    tile = 1024
    slot_stats_kernel[(cdiv(lists.region, tile), count)](
        row_stats, lists.rows, lists.list_start, slot_stats, first, lists.num_blocks, lists.region, TILE=tile
    )


def _reduce_kv(gradients, splits, items, lists, first, count, block_size, softmax_scale, shape) -> None:
    if items.max_splits == 0:
        return
    keys = max(16, min(64, triton.next_power_of_2(block_size)))
    reduce_kv_kernel[(lists.num_blocks, cdiv(block_size, keys), count)](
        splits, items.split_start, lists.start_M, lists.length_M, gradients[1], gradients[2],
        first, lists.num_blocks, items.max_splits, block_size, softmax_scale, **shape, KEYS=keys,
    )  # fmt: skip


def _merge_q(d_q, partial, lists, first, count, softmax_scale, shape) -> None:
    rows = 32 if shape["HEAD_DIM"] <= 128 else 16
    heads = count * (shape["NUM_HEADS"] // shape["NUM_KV_HEADS"])
    num_tokens, _, top_k = lists.slots.shape
    merge_q_kernel[(cdiv(num_tokens * heads, rows),)](
        partial,
        lists.slots,
        d_q,
        first,
        heads,
        num_tokens,
        lists.region,
        softmax_scale,
        **shape,
        TOP_K=top_k,
        ROWS=rows,
    )


@triton.jit(do_not_specialize=["num_tokens"])
def prepare_kernel(
    out, d_out, lse, d_lse, row_stats, num_tokens,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_D_LSE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """row_stats [T * H, 2]: the log2-sum-exp, and delta = rowsum(dO * O) less the gradient of the log-sum-exp."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token, head = row // NUM_HEADS, row % NUM_HEADS
    inside = token < num_tokens
    out_tile = load_rows(out, row, inside, HEAD_DIM, HEAD_DIM, BLOCK_D).to(tl.float32)
    d_out_tile = load_rows(d_out, row, inside, HEAD_DIM, HEAD_DIM, BLOCK_D).to(tl.float32)
    delta = tl.sum(out_tile * d_out_tile, axis=1)
    if HAS_D_LSE:
        delta -= tl.load(d_lse + head * num_tokens + token, mask=inside, other=0.0)
    log_sum = tl.load(lse + head * num_tokens + token, mask=inside, other=0.0)
    tl.store(row_stats + 2 * row, log_sum * 1.4426950408889634, mask=inside)
    tl.store(row_stats + 2 * row + 1, delta, mask=inside)


@triton.jit(do_not_specialize=["first_kv_head", "num_blocks", "region"])
def slot_stats_kernel(row_stats, rows, list_start, slot_stats, first_kv_head, num_blocks, region, TILE: tl.constexpr):
    """The statistics of each slot's row, in the order of the slots.

    A kernel that walks a list then reads them without an address per row, which took a third of its instructions.
    """
    kv_head = first_kv_head + tl.program_id(1)
    used = tl.load(list_start + kv_head * (num_blocks + 1) + num_blocks)
    slot = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row = tl.load(rows + kv_head.to(tl.int64) * region + slot, mask=slot < used, other=0)
    stats = tl.load(row_stats + row, mask=slot < used, other=0)
    tl.store(slot_stats + tl.program_id(1).to(tl.int64) * region + slot, stats, mask=slot < used)


@triton.jit
def unpack_stats(stats):
    """(log2-sum-exp, delta) of pairs of float32 that were loaded as int64."""
    log_sum = stats.to(tl.int32).to(tl.float32, bitcast=True)
    return log_sum, (stats >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=ITEM_INTEGERS)
def backward_short_kernel(
    q, k, v, d_out, slot_stats, rows, list_start, item_start, split_start, item_block,
    block_start, block_length, block_skipped, partial, d_k, d_v, splits,
    first_kv_head, num_blocks, max_items, item_rows, max_splits, region, block_size, heads_together, scale, scale_log2,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One program: one work item against a block of one key tile; dK and dV stay on chip, partial dQ go to the
    slots."""
    item, local_head = head_program(heads_together)
    kv_head = first_kv_head + local_head
    block, list_begin, begin, end = load_item(
        item, kv_head, item_start, item_block, list_start, block_skipped, num_blocks, max_items, item_rows,
        NUM_HEADS // NUM_KV_HEADS,
    )  # fmt: skip
    if begin < end:
        start, length = tl.load(block_start + block), tl.load(block_length + block)
        key = tl.arange(0, KEYS)
        stride = NUM_KV_HEADS * HEAD_DIM
        key_tile = load_rows(k + kv_head * HEAD_DIM, start + key, key < length, stride, HEAD_DIM, BLOCK_D)
        value_tile = load_rows(v + kv_head * HEAD_DIM, start + key, key < length, stride, HEAD_DIM, BLOCK_D)
        rows += kv_head.to(tl.int64) * region
        slot_stats += local_head.to(tl.int64) * region
        partial += (local_head.to(tl.int64) * region + begin) * HEAD_DIM

        d_key = tl.zeros([KEYS, BLOCK_D], dtype=tl.float32)
        d_value = tl.zeros([KEYS, BLOCK_D], dtype=tl.float32)
        own_end = list_begin + length * (NUM_HEADS // NUM_KV_HEADS)
        masked_end, full_end = split_tiles(begin, end, own_end, ROWS)
        for first_slot in range(masked_end, full_end, ROWS):
            d_key, d_value, d_score = _backward_kv_tile(
                q, d_out, slot_stats, rows, key_tile, value_tile, d_key, d_value, key, first_slot, list_begin, end,
                length, scale_log2, ROWS, NUM_HEADS // NUM_KV_HEADS, HEAD_DIM, BLOCK_D, not EXACT,
            )  # fmt: skip
            d_query = tl.dot(tl.trans(d_score), key_tile)
            store_slots(partial, first_slot - begin, end - begin, d_query, ROWS, HEAD_DIM, BLOCK_D, False)
        # The tiles with own rows, and the rest that fills no tile.
        for first in range(begin, masked_end + (end - full_end), ROWS):
            first_slot = tl.where(first < masked_end, first, first - masked_end + full_end)
            d_key, d_value, d_score = _backward_kv_tile(
                q, d_out, slot_stats, rows, key_tile, value_tile, d_key, d_value, key, first_slot, list_begin, end,
                length, scale_log2, ROWS, NUM_HEADS // NUM_KV_HEADS, HEAD_DIM, BLOCK_D, True,
            )  # fmt: skip
            d_query = tl.dot(tl.trans(d_score), key_tile)
            store_slots(partial, first_slot - begin, end - begin, d_query, ROWS, HEAD_DIM, BLOCK_D, True)

        _store_kv(
            d_key, d_value, d_k, d_v, splits, item_start, split_start, item, kv_head, local_head,
            block, num_blocks, max_splits, block_size, start, length, key, scale, stride, HEAD_DIM, BLOCK_D,
        )  # fmt: skip


@triton.jit
def _backward_kv_tile(
    q, d_out, slot_stats, rows, key_tile, value_tile, d_key, d_value, key, first_slot, list_begin, end, length,
    scale_log2, ROWS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """dK and dV after one more tile of rows, and the tile's dS^T [KEYS, ROWS] in the input's dtype.

    Scores are kept transposed, keys by rows: so P^T and dS^T are left operands, which the tensor cores take from
    registers.
    """
    place = tl.arange(0, ROWS)
    valid_place = tl.minimum(place, end - 1 - first_slot) if MASKED else place
    row = tl.load(rows + first_slot + valid_place)
    log_sum, delta = unpack_stats(tl.load(slot_stats + first_slot + valid_place))
    query = gather_rows(q, row, HEAD_DIM, BLOCK_D)
    d_out_tile = gather_rows(d_out, row, HEAD_DIM, BLOCK_D)
    # Both products first: the exponentials of the one are computed while the tensor cores work on the other.
    score = tl.dot(key_tile, tl.trans(query))
    d_weight = tl.dot(value_tile, tl.trans(d_out_tile))
    weight = tl.exp2(score * scale_log2 - log_sum[None, :])
    if MASKED:
        last_key = last_visible_key(first_slot + place, list_begin, length, GROUP)
        last_key = tl.where(first_slot + place < end, last_key, -1)  # no influence of what is past the end
        weight = tl.where(key[:, None] <= last_key[None, :], weight, 0.0)
    d_value = tl.dot(weight.to(query.dtype), d_out_tile, d_value)
    d_score = (weight * (d_weight - delta[None, :])).to(query.dtype)
    d_key = tl.dot(d_score, query, d_key)
    return d_key, d_value, d_score


@triton.jit
def _store_kv(
    d_key, d_value, d_k, d_v, splits, item_start, split_start, item, kv_head, local_head, block,
    num_blocks, max_splits, block_size, start, length, key, scale, stride,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of the keys `key` of a block; to the float32 buffer, if its list has more than one item."""
    entry = kv_head * (num_blocks + 1) + block
    first_split = tl.load(split_start + entry)
    if tl.load(split_start + entry + 1) == first_split:
        store_rows(d_k + kv_head * HEAD_DIM, start + key, d_key * scale, key < length, stride, HEAD_DIM, BLOCK_D)
        store_rows(d_v + kv_head * HEAD_DIM, start + key, d_value, key < length, stride, HEAD_DIM, BLOCK_D)
    else:
        split = first_split + item - tl.load(item_start + entry)
        splits += (local_head.to(tl.int64) * max_splits + split) * 2 * block_size * HEAD_DIM
        store_rows(splits, key, d_key, key < length, HEAD_DIM, HEAD_DIM, BLOCK_D)
        store_rows(splits, block_size + key, d_value, key < length, HEAD_DIM, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=ITEM_INTEGERS)
def backward_kv_kernel(
    q, k, v, d_out, slot_stats, rows, list_start, item_start, split_start, item_block,
    block_start, block_length, block_skipped, d_k, d_v, splits,
    first_kv_head, num_blocks, max_items, item_rows, max_splits, region, block_size, key_tiles, heads_together,
    scale, scale_log2,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One program: one work item against one key tile of its (long) block. Key tiles of an item run side by side and
    so share their gathers of q and dO through the L2 cache."""
    program, local_head = head_program(heads_together)
    item, first_key = program // key_tiles, program % key_tiles * KEYS
    kv_head = first_kv_head + local_head
    block, list_begin, begin, end = load_item(
        item, kv_head, item_start, item_block, list_start, block_skipped, num_blocks, max_items, item_rows,
        NUM_HEADS // NUM_KV_HEADS,
    )  # fmt: skip
    start, length = tl.load(block_start + block), tl.load(block_length + block)
    if (begin < end) & (first_key < length):
        GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
        key = first_key + tl.arange(0, KEYS)
        stride = NUM_KV_HEADS * HEAD_DIM
        key_tile = load_rows(k + kv_head * HEAD_DIM, start + key, key < length, stride, HEAD_DIM, BLOCK_D)
        value_tile = load_rows(v + kv_head * HEAD_DIM, start + key, key < length, stride, HEAD_DIM, BLOCK_D)
        rows += kv_head.to(tl.int64) * region
        slot_stats += local_head.to(tl.int64) * region

        d_key = tl.zeros([KEYS, BLOCK_D], dtype=tl.float32)
        d_value = tl.zeros([KEYS, BLOCK_D], dtype=tl.float32)
        # Own rows before the key tile do not see it; own rows within it need the causal mask.
        begin = tl.minimum(tl.maximum(begin, list_begin + first_key * GROUP), end)
        own_end = list_begin + tl.minimum(first_key + KEYS, length) * GROUP
        masked_end, full_end = split_tiles(begin, end, own_end, ROWS)
        for first_slot in range(masked_end, full_end, ROWS):
            d_key, d_value, _ = _backward_kv_tile(
                q, d_out, slot_stats, rows, key_tile, value_tile, d_key, d_value, key, first_slot, list_begin, end,
                length, scale_log2, ROWS, NUM_HEADS // NUM_KV_HEADS, HEAD_DIM, BLOCK_D, not EXACT,
            )  # fmt: skip
        for first in range(begin, masked_end + (end - full_end), ROWS):
            first_slot = tl.where(first < masked_end, first, first - masked_end + full_end)
            d_key, d_value, _ = _backward_kv_tile(
                q, d_out, slot_stats, rows, key_tile, value_tile, d_key, d_value, key, first_slot, list_begin, end,
                length, scale_log2, ROWS, NUM_HEADS // NUM_KV_HEADS, HEAD_DIM, BLOCK_D, True,
            )  # fmt: skip

        _store_kv(
            d_key, d_value, d_k, d_v, splits, item_start, split_start, item, kv_head, local_head, block,
            num_blocks, max_splits, block_size, start, length, key, scale, stride, HEAD_DIM, BLOCK_D,
        )  # fmt: skip


@triton.jit(do_not_specialize=["first_kv_head", "num_blocks", "max_splits", "block_size"])
def reduce_kv_kernel(
    splits, split_start, block_start, block_length, d_k, d_v,
    first_kv_head, num_blocks, max_splits, block_size, scale,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """Sums the partial dK and dV of a block whose list was cut, in the order of its items."""
    block, first_key, local_head = tl.program_id(0), tl.program_id(1) * KEYS, tl.program_id(2)
    kv_head = first_kv_head + local_head
    entry = kv_head * (num_blocks + 1) + block
    begin, end = tl.load(split_start + entry), tl.load(split_start + entry + 1)
    start, length = tl.load(block_start + block), tl.load(block_length + block)
    if (begin < end) & (first_key < length):
        key = first_key + tl.arange(0, KEYS)
        d_key = tl.zeros([KEYS, BLOCK_D], dtype=tl.float32)
        d_value = tl.zeros([KEYS, BLOCK_D], dtype=tl.float32)
        for split in range(begin, end):
            part = splits + (local_head.to(tl.int64) * max_splits + split) * 2 * block_size * HEAD_DIM
            d_key += load_rows(part, key, key < length, HEAD_DIM, HEAD_DIM, BLOCK_D)
            d_value += load_rows(part, block_size + key, key < length, HEAD_DIM, HEAD_DIM, BLOCK_D)
        stride = NUM_KV_HEADS * HEAD_DIM
        store_rows(d_k + kv_head * HEAD_DIM, start + key, d_key * scale, key < length, stride, HEAD_DIM, BLOCK_D)
        store_rows(d_v + kv_head * HEAD_DIM, start + key, d_value, key < length, stride, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["first_kv_head", "num_blocks", "max_items", "item_rows", "region"])
def backward_q_kernel(
    q, k, v, d_out, row_stats, rows, list_start, item_start, item_block, block_start, block_length, block_skipped,
    partial, first_kv_head, num_blocks, max_items, item_rows, region, scale_log2,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One program: the partial dQ of ROWS rows of one list, from all keys of its (long) block."""
    kv_head = first_kv_head + tl.program_id(1)
    block, list_begin, begin, end = load_item(
        tl.program_id(0), kv_head, item_start, item_block, list_start, block_skipped, num_blocks, max_items, item_rows,
        NUM_HEADS // NUM_KV_HEADS,
    )  # fmt: skip
    if begin < end:
        start, length = tl.load(block_start + block), tl.load(block_length + block)
        stride = NUM_KV_HEADS * HEAD_DIM
        k += kv_head * HEAD_DIM + start.to(tl.int64) * stride
        v += kv_head * HEAD_DIM + start.to(tl.int64) * stride
        slot = begin + tl.arange(0, ROWS)
        inside = slot < end
        row = tl.load(rows + kv_head.to(tl.int64) * region + slot, mask=inside, other=0)
        query = gather_rows(q, row, HEAD_DIM, BLOCK_D)
        d_out_tile = gather_rows(d_out, row, HEAD_DIM, BLOCK_D)
        log_sum, delta = unpack_stats(tl.load(row_stats + row))

        d_query = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
        last_key, full_end, keys_end = key_range(slot, end, list_begin, length, NUM_HEADS // NUM_KV_HEADS, KEYS)
        for first_key in range(0, full_end, KEYS):
            d_query = _backward_q_tile(
                k, v, query, d_out_tile, log_sum, delta, d_query, first_key, length, last_key, scale_log2, stride,
                HEAD_DIM, BLOCK_D, KEYS, False,
            )  # fmt: skip
        for first_key in range(full_end, keys_end, KEYS):
            d_query = _backward_q_tile(
                k, v, query, d_out_tile, log_sum, delta, d_query, first_key, length, last_key, scale_log2, stride,
                HEAD_DIM, BLOCK_D, KEYS, True,
            )  # fmt: skip
        partial += tl.program_id(1).to(tl.int64) * region * HEAD_DIM
        store_rows(partial, slot, d_query, inside, HEAD_DIM, HEAD_DIM, BLOCK_D)


@triton.jit
def _backward_q_tile(
    k, v, query, d_out_tile, log_sum, delta, d_query, first_key, length, last_key, scale_log2, stride,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dQ (without the softmax scale) after KEYS more keys."""
    key = first_key + tl.arange(0, KEYS)
    key_tile = load_keys(k, key, length, stride, HEAD_DIM, BLOCK_D, MASKED)
    value_tile = load_keys(v, key, length, stride, HEAD_DIM, BLOCK_D, MASKED)
    score = tl.dot(query, tl.trans(key_tile))
    d_weight = tl.dot(d_out_tile, tl.trans(value_tile))
    weight = tl.exp2(score * scale_log2 - log_sum[:, None])
    if MASKED:
        weight = tl.where(key[None, :] <= last_key[:, None], weight, 0.0)
    d_score = (weight * (d_weight - delta[:, None])).to(query.dtype)
    return tl.dot(d_score, key_tile, d_query)


@triton.jit(do_not_specialize=["first_kv_head", "num_heads_here", "num_tokens", "region"])
def merge_q_kernel(
    partial, slots, d_q, first_kv_head, num_heads_here, num_tokens, region, scale,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    TOP_K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dQ of ROWS rows: the sum of the partial dQ in their slots, times the softmax scale."""
    token, head, local_head, inside = rows_of_group(
        tl.program_id(0), first_kv_head, num_heads_here, num_tokens, NUM_HEADS // NUM_KV_HEADS, ROWS
    )
    row = token.to(tl.int64) * NUM_HEADS + head
    base = local_head.to(tl.int64) * region
    total = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
    for i in range(TOP_K):
        slot = tl.load(slots + row * TOP_K + i, mask=inside, other=-1)
        total += load_rows(partial, base + slot, slot >= 0, HEAD_DIM, HEAD_DIM, BLOCK_D).to(tl.float32)
    store_rows(d_q, row, total * scale, inside, HEAD_DIM, HEAD_DIM, BLOCK_D)
