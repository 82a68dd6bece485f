"""Attention forward in Triton: partial results per (row, selected block), then one merge per row.

Two kernels, by block size. *Short* blocks fit on chip as one key tile: a program keeps K and V of the block and
streams tiles of its list. *Long* blocks (more keys than a tile): a program keeps one tile of its list and streams the
keys of the block, with the usual online softmax; where gluon_choice.py says so, the kernel of gluon_forward.py does
that. All write for each slot of the list a normalised partial output, in the input's dtype, and its log2-sum-exp; the
merge kernel then finds each row's K slots and adds them up with softmax weights. Where triton_tiles.merges_own says so,
the rows of short blocks attend to their own block in the merge kernel, and only their other picks take slots. No
atomics: the result does not depend on timing.
"""

# Triton's stubs know neither launch options, nor that constants become tl.constexpr, nor what its functions return.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moba.backends.gluon_choice import GLUON_ITEM_ROWS, gluon_kernels
from moba.backends.triton_lists import (
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
from moba.backends.triton_tiles import cdiv, is_short, merges_own, padded, tile_for

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)
PART_STAGES = tl.constexpr(3)
"""Of the loop over partial results in merge_own_kernel: they then come by cp.async to shared memory, and are read from
there in the tensor cores' layout, that of the own part."""


def attention_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lists: Lists,
    block_size: int, softmax_scale: float, workspace_bytes: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Output [T, H, D] in q's dtype and log-sum-exp float32 [H, T] (natural log). The lists are those of a selection in
    which the own block comes last.

    Key/value heads are worked through in groups, as many at a time as keep the partial results within
    `workspace_bytes` (one at least).
    """
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, top_k = k.shape[1], lists.slots.shape[2]
    short = is_short(block_size, head_dim, q.dtype)
    tile = tile_for("forward_short" if short else "forward_long", head_dim, block_size, q.dtype)
    gluon = gluon_kernels("forward", block_size, q, k, v)
    own_in_merge = short and merges_own(block_size, head_dim, q.dtype)
    items = build_items(lists, GLUON_ITEM_ROWS if gluon else tile.rows * (tile.tiles if short else 1))
    constants = {
        "NUM_HEADS": num_heads, "NUM_KV_HEADS": num_kv_heads, "HEAD_DIM": head_dim, "BLOCK_D": padded(head_dim),
    }  # fmt: skip
    picks = {"TOP_K": top_k, "TOP_K_PADDED": triton.next_power_of_2(top_k)}

    out = torch.empty_like(q)
    lse = torch.empty(num_heads, num_tokens, dtype=torch.float32, device=q.device)
    heads_at_once = kv_heads_at_once(num_kv_heads, lists.region * (head_dim * q.element_size() + 4), workspace_bytes)
    partial = torch.empty(heads_at_once, lists.region, head_dim, dtype=q.dtype, device=q.device)
    partial_lse = torch.empty(heads_at_once, lists.region, dtype=torch.float32, device=q.device)
    kernel = forward_short_kernel if short else forward_long_kernel
    for first in range(0, num_kv_heads, heads_at_once):
        count = min(heads_at_once, num_kv_heads - first)
        if gluon:
            gluon.forward_long(q, k, v, lists, items, partial, partial_lse, first, count, softmax_scale * LOG2_E)
        else:
            grid, heads_together = item_grid(items.max_items, count, num_heads // num_kv_heads, tile.warps)
            kernel[grid](
                q, k, v, lists.rows, lists.list_start, items.item_start, items.item_block, lists.start_M,
                lists.length_M, lists.skipped_M, partial, partial_lse, first, lists.num_blocks, items.max_items,
                items.item_rows, lists.region, heads_together, softmax_scale * LOG2_E,
                **constants, ROWS=tile.rows, KEYS=tile.keys, EXACT=block_size % tile.keys == 0,
                **({"SKIP_OWN": own_in_merge} if short else {}), num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
        if own_in_merge:
            of_merge = (block_size, softmax_scale, constants | picks)
            _merge_own(q, k, v, lists, partial, partial_lse, out, lse, first, count, *of_merge)
            continue
        merge_rows = 32 if head_dim <= 128 else 16
        heads = count * (num_heads // num_kv_heads)
        merge_kernel[(cdiv(num_tokens * heads, merge_rows),)](
            partial, partial_lse, lists.slots, out, lse, first, heads, num_tokens, lists.region,
            **constants, **picks, ROWS=merge_rows,
        )  # fmt: skip
    return out, lse


def _merge_own(q, k, v, lists, partial, partial_lse, out, lse, first, count, block_size, softmax_scale, constants):
    """Fills out and lse of the rows of `count` key/value heads."""
    own_rows = block_size * (q.shape[1] // k.shape[1])
    tile = tile_for("merge_own", q.shape[2], block_size, q.dtype)
    rows = min(tile.rows, max(16, triton.next_power_of_2(own_rows)))
    tiles = cdiv(own_rows, rows)
    merge_own_kernel[(tiles * count * lists.num_blocks,)](
        q, k, v, lists.rows, lists.list_start, lists.start_M, lists.length_M, lists.skipped_M, partial, partial_lse,
        lists.slots, out, lse, first, count, len(q), lists.num_blocks, lists.region, tiles, softmax_scale * LOG2_E,
        **constants, ROWS=rows, KEYS=min(tile.keys, max(16, triton.next_power_of_2(block_size))),
        num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
    )  # fmt: skip


def kv_heads_at_once(num_kv_heads: int, bytes_per_head: int, workspace_bytes: int) -> int:
    """How many key/value heads to work on together, in groups of even size: at least one, and within the budget if
    that allows."""
    most = min(num_kv_heads, max(1, workspace_bytes // max(1, bytes_per_head)))
    num_groups = cdiv(num_kv_heads, most)
    return cdiv(num_kv_heads, num_groups)


@triton.jit(do_not_specialize=["first_kv_head", "num_blocks", "max_items", "item_rows", "region", "heads_together"])
def forward_short_kernel(
    q, k, v, rows, list_start, item_start, item_block, block_start, block_length, block_skipped,
    partial, partial_lse, first_kv_head, num_blocks, max_items, item_rows, region, heads_together, scale_log2,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, EXACT: tl.constexpr, SKIP_OWN: tl.constexpr,
):  # fmt: skip
    """One program: one work item, that is up to item_rows rows against one block whose keys fit in one tile; with
    SKIP_OWN only those that are not the block's own."""
    item, local_head = head_program(heads_together)
    kv_head = first_kv_head + local_head
    block, list_begin, begin, end = load_item(
        item, kv_head, item_start, item_block, list_start, block_skipped, num_blocks, max_items, item_rows,
        NUM_HEADS // NUM_KV_HEADS,
    )  # fmt: skip
    if SKIP_OWN:
        begin = tl.maximum(begin, list_begin + tl.load(block_length + block) * (NUM_HEADS // NUM_KV_HEADS))
    if begin < end:
        start, length = tl.load(block_start + block), tl.load(block_length + block)
        key = tl.arange(0, KEYS)
        stride = NUM_KV_HEADS * HEAD_DIM
        key_tile = load_rows(k + kv_head * HEAD_DIM, start + key, key < length, stride, HEAD_DIM, BLOCK_D)
        value_tile = load_rows(v + kv_head * HEAD_DIM, start + key, key < length, stride, HEAD_DIM, BLOCK_D)
        rows += kv_head.to(tl.int64) * region
        partial += (local_head.to(tl.int64) * region + begin) * HEAD_DIM
        partial_lse += local_head.to(tl.int64) * region + begin

        # The block's own rows lead the list and need the causal mask; whole tiles of history rows do not.
        own_end = list_begin + length * (NUM_HEADS // NUM_KV_HEADS)
        masked_end, full_end = split_tiles(begin, end, own_end, ROWS)
        for first_slot in range(masked_end, full_end, ROWS):
            _forward_short_tile(
                q, rows, partial, partial_lse, key_tile, value_tile, first_slot, begin, list_begin, end, length,
                scale_log2, NUM_HEADS // NUM_KV_HEADS, HEAD_DIM, BLOCK_D, ROWS, KEYS, not EXACT,
            )  # fmt: skip
        # The tiles with own rows, and the rest that fills no tile.
        for first in range(begin, masked_end + (end - full_end), ROWS):
            first_slot = tl.where(first < masked_end, first, first - masked_end + full_end)
            _forward_short_tile(
                q, rows, partial, partial_lse, key_tile, value_tile, first_slot, begin, list_begin, end, length,
                scale_log2, NUM_HEADS // NUM_KV_HEADS, HEAD_DIM, BLOCK_D, ROWS, KEYS, True,
            )  # fmt: skip


@triton.jit
def _forward_short_tile(
    q, rows, partial, partial_lse, key_tile, value_tile, first_slot, begin, list_begin, end, length, scale_log2,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Partial results of ROWS slots, written behind those of the work item's first, `begin`; without MASKED all of them
    exist and see all KEYS keys."""
    place = tl.arange(0, ROWS)
    valid_place = tl.minimum(place, end - 1 - first_slot) if MASKED else place
    row = tl.load(rows + first_slot + valid_place)
    query = gather_rows(q, row, HEAD_DIM, BLOCK_D)
    score = tl.dot(query, tl.trans(key_tile))
    if MASKED:
        last_key = last_visible_key(first_slot + place, list_begin, length, GROUP)
        score = tl.where(tl.arange(0, KEYS)[None, :] <= last_key[:, None], score, float("-inf"))
    top = tl.max(score, axis=1) * scale_log2
    weight = tl.exp2(score * scale_log2 - top[:, None])
    total = tl.sum(weight, axis=1)
    out = tl.dot(weight.to(value_tile.dtype), value_tile) * (1.0 / total)[:, None]
    store_slots(partial, first_slot - begin, end - begin, out, ROWS, HEAD_DIM, BLOCK_D, MASKED)
    part_lse = top + tl.log2(total)
    if MASKED:
        tl.store(partial_lse + (first_slot - begin) + place, part_lse, mask=first_slot + place < end)
    else:
        tl.store(partial_lse + (first_slot - begin) + place, part_lse)


@triton.jit(do_not_specialize=["first_kv_head", "num_blocks", "max_items", "item_rows", "region", "heads_together"])
def forward_long_kernel(
    q, k, v, rows, list_start, item_start, item_block, block_start, block_length, block_skipped,
    partial, partial_lse, first_kv_head, num_blocks, max_items, item_rows, region, heads_together, scale_log2,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows of one list against all keys of its block, KEYS at a time."""
    item, local_head = head_program(heads_together)
    kv_head = first_kv_head + local_head
    block, list_begin, begin, end = load_item(
        item, kv_head, item_start, item_block, list_start, block_skipped, num_blocks, max_items, item_rows,
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

        top = tl.zeros([ROWS], dtype=tl.float32) - float("inf")
        total = tl.zeros([ROWS], dtype=tl.float32)
        out = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
        last_key, full_end, keys_end = key_range(slot, end, list_begin, length, NUM_HEADS // NUM_KV_HEADS, KEYS)
        for first_key in range(0, full_end, KEYS):
            top, total, out = _forward_long_tile(
                k, v, query, top, total, out, first_key, length, last_key, scale_log2, stride,
                HEAD_DIM, BLOCK_D, KEYS, False,
            )  # fmt: skip
        for first_key in range(full_end, keys_end, KEYS):
            top, total, out = _forward_long_tile(
                k, v, query, top, total, out, first_key, length, last_key, scale_log2, stride,
                HEAD_DIM, BLOCK_D, KEYS, True,
            )  # fmt: skip

        partial += local_head.to(tl.int64) * region * HEAD_DIM
        partial_lse += local_head.to(tl.int64) * region
        store_rows(partial, slot, out * (1.0 / total)[:, None], inside, HEAD_DIM, HEAD_DIM, BLOCK_D)
        tl.store(partial_lse + slot, top + tl.log2(total), mask=inside)


@triton.jit
def key_range(slot, end, list_begin, length, GROUP: tl.constexpr, KEYS: tl.constexpr):
    """What a tile of slots sees of a block: each one's last key, the end of the keys in tiles that all see whole, and
    the end of the keys that any sees."""
    inside = slot < end
    last_key = last_visible_key(slot, list_begin, length, GROUP)
    full_end = (tl.min(tl.where(inside, last_key, length - 1)) + 1) // KEYS * KEYS
    keys_end = tl.max(tl.where(inside, last_key, -1)) + 1
    return tl.where(inside, last_key, 0), full_end, keys_end


@triton.jit
def _forward_long_tile(
    k, v, query, top, total, out, first_key, length, last_key, scale_log2, stride,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The running (maximum, sum, unnormalised output) after KEYS more keys."""
    key = first_key + tl.arange(0, KEYS)
    key_tile = load_keys(k, key, length, stride, HEAD_DIM, BLOCK_D, MASKED)
    score = tl.dot(query, tl.trans(key_tile))
    if MASKED:
        score = tl.where(key[None, :] <= last_key[:, None], score, float("-inf"))
    new_top = tl.maximum(top, tl.max(score, axis=1) * scale_log2)
    weight = tl.exp2(score * scale_log2 - new_top[:, None])
    decay = tl.exp2(top - new_top)
    total = total * decay + tl.sum(weight, axis=1)
    out = out * decay[:, None]
    value_tile = load_keys(v, key, length, stride, HEAD_DIM, BLOCK_D, MASKED)
    out = tl.dot(weight.to(value_tile.dtype), value_tile, out)
    return new_top, total, out


@triton.jit
def load_keys(base, key, length, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """[KEYS, BLOCK_D] of K or V; unmasked where the caller knows that all keys lie in the block."""
    if MASKED or HEAD_DIM != BLOCK_D:
        return load_rows(base, key, key < length, stride, HEAD_DIM, BLOCK_D)
    return tl.load(base + key[:, None] * stride + tl.arange(0, BLOCK_D)[None, :])


@triton.jit(do_not_specialize=["first_kv_head", "num_heads_here", "num_tokens", "region"])
def merge_kernel(
    partial, partial_lse, slots, out, lse, first_kv_head, num_heads_here, num_tokens, region,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    TOP_K: tl.constexpr, TOP_K_PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: out and lse of ROWS rows, from the partial results in their slots."""
    token, head, local_head, inside = rows_of_group(
        tl.program_id(0), first_kv_head, num_heads_here, num_tokens, NUM_HEADS // NUM_KV_HEADS, ROWS
    )
    row = token.to(tl.int64) * NUM_HEADS + head
    base = local_head.to(tl.int64) * region
    pick = tl.arange(0, TOP_K_PADDED)
    slot = tl.load(
        slots + row[:, None] * TOP_K + pick[None, :], mask=inside[:, None] & (pick < TOP_K)[None, :], other=-1
    )
    parts_lse = tl.load(partial_lse + base[:, None] + slot, mask=slot >= 0, other=float("-inf"))
    top = tl.max(parts_lse, axis=1)
    row_lse = top + tl.log2(tl.sum(tl.exp2(parts_lse - top[:, None]), axis=1))

    total = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
    for i in range(TOP_K):
        slot_i = tl.load(slots + row * TOP_K + i, mask=inside, other=-1)
        lse_i = tl.load(partial_lse + base + slot_i, mask=slot_i >= 0, other=float("-inf"))
        part = load_rows(partial, base + slot_i, slot_i >= 0, HEAD_DIM, HEAD_DIM, BLOCK_D)
        total += tl.exp2(lse_i - row_lse)[:, None] * part.to(tl.float32)
    store_rows(out, row, total, inside, HEAD_DIM, HEAD_DIM, BLOCK_D)
    tl.store(lse + head.to(tl.int64) * num_tokens + token, row_lse * LN_2, mask=inside)


@triton.jit(do_not_specialize=["first_kv_head", "num_kv_heads_here", "num_tokens", "num_blocks", "region", "tiles"])
def merge_own_kernel(
    q, k, v, rows, list_start, block_start, block_length, block_skipped, partial, partial_lse, slots, out, lse,
    first_kv_head, num_kv_heads_here, num_tokens, num_blocks, region, tiles, scale_log2,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    TOP_K: tl.constexpr, TOP_K_PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One program: out and lse of ROWS of the own rows of a block, from its keys and the partial results of their other
    picks. The rows lie as in the list: GROUP to a token."""
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    rest = tl.program_id(0) // tiles
    block = rest // num_kv_heads_here
    local_head = rest - block * num_kv_heads_here
    first_place = (tl.program_id(0) - rest * tiles) * ROWS
    kv_head = first_kv_head + local_head
    skipped, length = tl.load(block_skipped + block), tl.load(block_length + block)
    num_own = (length - skipped) * GROUP
    if first_place < num_own:
        start = tl.load(block_start + block)
        list_begin = tl.load(list_start + kv_head * (num_blocks + 1) + block)
        first_row = tl.load(rows + kv_head.to(tl.int64) * region + list_begin)
        place = first_place + tl.arange(0, ROWS)
        inside = place < num_own
        place = tl.minimum(place, num_own - 1)
        row = (first_row + place // GROUP * NUM_HEADS + place % GROUP).to(tl.int64)
        partial += local_head.to(tl.int64) * region * HEAD_DIM
        partial_lse += local_head.to(tl.int64) * region

        pick = tl.arange(0, TOP_K_PADDED)
        slot = tl.load(slots + row[:, None] * TOP_K + pick[None, :], mask=(pick < TOP_K - 1)[None, :], other=-1)
        parts_lse = tl.load(partial_lse + slot, mask=slot >= 0, other=float("-inf"))

        query = gather_rows(q, row, HEAD_DIM, BLOCK_D)
        last_key = skipped + place // GROUP
        end = skipped + (tl.minimum(first_place + ROWS, num_own) - 1) // GROUP + 1
        stride = NUM_KV_HEADS * HEAD_DIM
        k += kv_head * HEAD_DIM + start.to(tl.int64) * stride
        v += kv_head * HEAD_DIM + start.to(tl.int64) * stride
        top = tl.zeros([ROWS], dtype=tl.float32) - float("inf")
        total = tl.zeros([ROWS], dtype=tl.float32)
        own = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
        for first_key in range(0, end, KEYS):
            top, total, own = _forward_long_tile(
                k, v, query, top, total, own, first_key, end, last_key, scale_log2, stride,
                HEAD_DIM, BLOCK_D, KEYS, True,
            )  # fmt: skip

        own_lse = top + tl.log2(total)
        top = tl.maximum(tl.max(parts_lse, axis=1), own_lse)
        row_lse = top + tl.log2(tl.sum(tl.exp2(parts_lse - top[:, None]), axis=1) + tl.exp2(own_lse - top))
        merged = own * (tl.exp2(own_lse - row_lse) / total)[:, None]
        for i in tl.range(0, TOP_K - 1, num_stages=PART_STAGES):  # the own block is the last pick
            slot_i = tl.load(slots + row * TOP_K + i)
            lse_i = tl.load(partial_lse + slot_i, mask=slot_i >= 0, other=float("-inf"))
            part = load_rows(partial, slot_i, slot_i >= 0, HEAD_DIM, HEAD_DIM, BLOCK_D)
            merged += tl.exp2(lse_i - row_lse)[:, None] * part.to(tl.float32)
        store_rows(out, row, merged, inside, HEAD_DIM, HEAD_DIM, BLOCK_D)
        token, head = row // NUM_HEADS, row % NUM_HEADS
        tl.store(lse + head * num_tokens + token, row_lse * LN_2, mask=inside)


@triton.jit
def rows_of_group(program, first_kv_head, num_heads_here, num_tokens, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """(token, head, key/value head counted from first_kv_head, whether it exists) of ROWS rows of the heads of a head
    group."""
    index = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = index // num_heads_here
    local = (index - token * num_heads_here).to(tl.int32)
    inside = token < num_tokens
    return token.to(tl.int32), first_kv_head * GROUP + local, local // GROUP, inside
