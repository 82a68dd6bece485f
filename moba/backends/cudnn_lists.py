"""MoBA attention of long blocks: products on cuDNN's kernels, everything around them in Triton.

The algorithm is that of flash.py (MoBA paper, algorithm 1), on the lists of triton_lists.py. The *own* part is causal
attention within each block, straight from q, k and v: a sequence per block, whole or a document's tail. The *routed*
part takes the rows of each list, gathered in the order of their slots, over the keys of the list's block: a problem of
one head, in which keys serve all query heads of a group; long lists are cut into sequences of `item_rows`. A merge
kernel joins the two by their log-sum-exp. Backward, both parts are given the joint output and log-sum-exp, so that
their gradients add up; those of keys are added list piece by list piece, in float32.

Lists hold history picks only here: the own block is not selected. Key/value heads go through in groups, and where one
head's rows exceed WORKSPACE_BYTES, tokens in chunks with lists of their own. Nothing waits for the device.

Shapes: T tokens, H query heads, G key/value heads, D head size, B block size, K = top_k, P = K - 1 history picks, M
blocks of the pack.
"""

# Triton's stubs know neither launch options, nor that constants become tl.constexpr, nor what its functions return.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba.backends import triton_attention
from moba.backends.cudnn_ragged import CUDNN_RAGGED, PLAIN_RAGGED, Ragged, Sequences
from moba.backends.triton_attention import counted_in_pack, device_of
from moba.backends.triton_forward import kv_heads_at_once, rows_of_group
from moba.backends.triton_lists import Layout, Lists, build_items, build_lists, load_item, load_rows, store_rows
from moba.backends.triton_routing import select_blocks
from moba.backends.triton_tiles import padded
from moba.documents import Documents


def item_rows(block_size: int, deterministic: bool) -> int:
    """Rows at which lists are cut. Each piece writes gradients of its block's keys, so it is long against a block; and
    a popular block's list must not keep a few programs busy while all others are done. The deterministic backward's
    workspace counts each piece as whole."""
    return 2048 if deterministic else max(8192, 4 * block_size)


def moba_cudnn(
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
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """MoBA attention [T, H, D] and its log-sum-exp, float32 [H, T] (natural log); sizes as in `moba.moba_attention`.

    As `moba_triton`, and the same blocks, of documents whose queries are all their keys; but unless `deterministic`, dQ
    may differ in its last bits from run to run, and there are no gradients through the log-sum-exp. On CUDA: a Hopper
    GPU, nvidia-cudnn-frontend, half precision, and head sizes that are multiples of 16 up to 128.
    """
    assert documents.cu_seqlens_k is None, "queries that are only the last tokens of their documents"
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    with device_of(q):
        layout = documents.kernel_layout(block_size)
    tensors = (layout.start_M, layout.length_M, layout.first_block_T, layout.own_block_T)
    selection_THK = None if selection is None else counted_in_pack(selection, layout)
    return cudnn_forward(q, k, v, *tensors, block_size, top_k, scale, first_blocks, selection_THK, deterministic)[:2]


@torch.library.custom_op("moba::cudnn_forward", mutates_args=())
def cudnn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start_M: Tensor,
    length_M: Tensor,
    first_block_T: Tensor,
    own_block_T: Tensor,
    block_size: int,
    top_k: int,
    softmax_scale: float,
    first_blocks: int = 0,
    selection_THK: Tensor | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out [T, H, D], lse float32 [H, T], and the lists of all chunks of tokens for the backward: rows [G * T * H / G *
    P], slots [T, H, P], list_start [chunks, G, M + 1]), from the tensors of a `Layout`."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out, lse, rows, slots, list_start = _empty_outputs(q, k, start_M, block_size, top_k, deterministic)
    if q.shape[0] == 0:
        return out, lse, rows, slots, list_start
    with device_of(q):
        layout = Layout(start_M.shape[0], start_M, length_M, torch.zeros_like(length_M), first_block_T, own_block_T)
        if selection_THK is None:
            selection_THK = select_blocks(q, k, layout, block_size, top_k, first_blocks)
        work = _Work(q, k, block_size, top_k, deterministic)
        for tokens, lists in work.chunks(rows, slots, list_start, layout):
            made = build_lists(selection_THK[tokens, :, :-1].contiguous(), layout, k.shape[1])
            lists.rows.copy_(made.rows)
            lists.slots.copy_(made.slots)
            lists.list_start.copy_(made.list_start)
        del selection_THK
        chunks = [_Chunk(*chunk, work) for chunk in work.chunks(rows, slots, list_start, layout)]
        lse_TH = torch.empty(q.shape[:2], dtype=lse.dtype, device=q.device)
        ragged, own = _provider(q), _own_blocks(layout, block_size)
        for heads in work.head_groups():
            _forward_heads(q, k, v, out, lse_TH, heads, chunks, own, work, softmax_scale, ragged)
        lse.copy_(lse_TH.T)
    return out, lse, rows, slots, list_start


def _forward_heads(q, k, v, out, lse_TH, heads, chunks, own, work, scale, ragged) -> None:
    """Fills out and lse of the heads of a group."""
    own_out, own_lse = ragged.forward(q[:, heads.q], k[:, heads.kv], v[:, heads.kv], own, scale)
    if work.picks == 0:
        out[:, heads.q], lse_TH[:, heads.q] = own_out, own_lse
        return
    keys, values = _by_head(k[:, heads.kv]), _by_head(v[:, heads.kv])
    for chunk in chunks:
        sequences = chunk.sequences(heads, work)
        rows = chunk.gathered(q[chunk.tokens], heads)
        part, part_lse = ragged.forward(rows, keys, values, sequences, scale)
        del rows
        merge_out_kernel[(triton.cdiv(chunk.num_tokens * heads.num_q, work.merge_rows),)](
            part, part_lse, chunk.lists.slots, own_out[chunk.tokens], own_lse[chunk.tokens], out[chunk.tokens],
            lse_TH[chunk.tokens], heads.kv.start, heads.num_q, chunk.num_tokens, chunk.lists.region,
            **work.constants, PICKS=work.picks, PICKS_PADDED=triton.next_power_of_2(work.picks), ROWS=work.merge_rows,
        )  # fmt: skip


@cudnn_forward.register_fake
def _(
    q, k, v, start_M, length_M, first_block_T, own_block_T, block_size, top_k, softmax_scale, first_blocks=0,
    selection_THK=None, deterministic=False,
):  # fmt: skip
    return _empty_outputs(q, k, start_M, block_size, top_k, deterministic)


def _empty_outputs(q, k, start_M, block_size, top_k, deterministic) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (num_tokens, num_heads, _), num_kv_heads = q.shape, k.shape[1]
    num_chunks = 1 if num_tokens == 0 else _Work(q, k, block_size, top_k, deterministic).num_chunks
    return (
        q.new_empty(q.shape),
        q.new_empty((num_heads, num_tokens), dtype=torch.float32),
        q.new_empty(num_tokens * num_heads * (top_k - 1), dtype=torch.int32),
        q.new_empty((num_tokens, num_heads, top_k - 1), dtype=torch.int32),
        q.new_empty((num_chunks, num_kv_heads, start_M.shape[0] + 1), dtype=torch.int32),
    )


@torch.library.custom_op("moba::cudnn_backward", mutates_args=())
def cudnn_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    rows: Tensor,
    slots: Tensor,
    list_start: Tensor,
    start_M: Tensor,
    length_M: Tensor,
    block_size: int,
    softmax_scale: float,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dQ, dK, dV) in the shapes of q, k and v, from what the forward returned and the gradient of its first."""
    q, k, v, d_out = q.contiguous(), k.contiguous(), v.contiguous(), d_out.contiguous()
    d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if q.shape[0] == 0:
        return d_q, d_k, d_v
    with device_of(q):
        layout = Layout(start_M.shape[0], start_M, length_M, torch.zeros_like(length_M), start_M, start_M)
        work = _Work(q, k, block_size, slots.shape[2] + 1, deterministic)
        chunks = [_Chunk(*chunk, work) for chunk in work.chunks(rows, slots, list_start, layout)]
        ragged, own = _provider(q), _own_blocks(layout, block_size)
        inputs = q, d_out, out, lse.T.contiguous(), k, v
        for heads in work.head_groups():
            _backward_heads(inputs, (d_q, d_k, d_v), heads, chunks, own, work, softmax_scale, ragged)
    return d_q, d_k, d_v


def _backward_heads(inputs, gradients, heads, chunks, own, work, scale, ragged) -> None:
    """Fills the gradients of the heads of a group."""
    q, d_out, out, lse_TH, k, v = inputs
    d_q, d_k, d_v = gradients
    # Copies where heads go in groups: cuDNN's backward wants inputs and gradients to lie alike.
    rows = [x[:, heads.q].contiguous() for x in (d_out, q, out, lse_TH)]
    keys, values = (x[:, heads.kv].contiguous() for x in (k, v))
    own_inputs = (*rows[:2], keys, values, *rows[2:])
    own_dq, *d_keys = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in own_inputs[1:4])
    for blocks in own.split(work.blocks_at_once):
        ragged.backward(*own_inputs, blocks, scale, (own_dq, *d_keys), work.deterministic)
    if work.picks == 0:
        d_q[:, heads.q], d_k[:, heads.kv], d_v[:, heads.kv] = own_dq, *d_keys
        return
    del rows, own_inputs
    keys, values = _by_head(keys), _by_head(values)
    sums = [x if len(chunks) == 1 else torch.empty_like(x, dtype=torch.float32) for x in d_keys]  # one: not used
    for chunk in chunks:
        sequences, here = chunk.sequences(heads, work), chunk.tokens
        rows = [chunk.gathered(x[here], heads) for x in (d_out, q, out)]
        row_lse = chunk.gathered(lse_TH[here, :, None], heads)[:, :, 0]
        item_shape = (sequences.number * work.block_size, 1, work.head_dim)
        row_dq, item_grads = torch.empty_like(rows[0]), [k.new_empty(item_shape) for _ in "kv"]
        part = (*rows[:2], keys, values, rows[2], row_lse, sequences, scale)
        ragged.backward(*part, (row_dq, *item_grads), work.deterministic)
        del rows, part
        merge_dq_kernel[(triton.cdiv(chunk.num_tokens * heads.num_q, work.merge_rows),)](
            row_dq, chunk.lists.slots, own_dq[here], d_q[here], heads.kv.start, heads.num_q, chunk.num_tokens,
            chunk.lists.region, **work.constants, PICKS=work.picks, ROWS=work.merge_rows,
        )  # fmt: skip
        tile = max(16, min(64, triton.next_power_of_2(work.block_size)))
        grid = (chunk.lists.num_blocks, triton.cdiv(work.block_size, tile), heads.num_kv)
        for own_grad, parts, total, grad in zip(d_keys, item_grads, sums, (d_k, d_v)):
            add_items_kernel[grid](
                own_grad, parts, total, grad, chunk.items.item_start, chunk.lists.start_M, chunk.lists.length_M,
                heads.kv.start, chunk.lists.num_blocks, chunk.items.max_items, work.block_size, heads.num_kv,
                NUM_KV_HEADS=work.num_kv_heads, HEAD_DIM=work.head_dim, BLOCK_D=padded(work.head_dim), KEYS=tile,
                FIRST=chunk is chunks[0], LAST=chunk is chunks[-1],
            )  # fmt: skip


@cudnn_backward.register_fake
def _(
    d_out, q, k, v, out, lse, rows, slots, list_start, start_M, length_M, block_size, softmax_scale,
    deterministic=False,
):  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output) -> None:
    q, k, v, start_M, length_M, _, _, ctx.block_size, _, ctx.softmax_scale, _, _, ctx.deterministic = inputs
    ctx.save_for_backward(q, k, v, *output, start_M, length_M)
    ctx.set_materialize_grads(False)


def _gradients(ctx, d_out, d_lse, *_):
    if d_lse is not None:
        raise ValueError("a gradient of the log-sum-exp: moba_cudnn has none, moba_triton has")
    q, k, v, out, lse, *lists = ctx.saved_tensors
    d_out = torch.zeros_like(out) if d_out is None else d_out
    options = (ctx.block_size, ctx.softmax_scale, ctx.deterministic)
    return *cudnn_backward(d_out, q, k, v, out, lse, *lists, *options), *[None] * 10


cudnn_forward.register_autograd(_gradients, setup_context=_save)


# -------------------- how the work is divided


class _Heads(NamedTuple):
    """A group of heads."""

    kv: slice
    q: slice

    @property
    def num_kv(self) -> int:
        return self.kv.stop - self.kv.start

    @property
    def num_q(self) -> int:
        return self.q.stop - self.q.start


class _Chunk:
    """Tokens that have lists of their own, in which rows are counted from their first."""

    def __init__(self, tokens: slice, lists: Lists, work: _Work):
        self.tokens, self.lists, self.num_tokens = tokens, lists, tokens.stop - tokens.start
        self.items = build_items(lists, item_rows(work.block_size, work.deterministic))

    def sequences(self, heads: _Heads, work: _Work) -> Sequences:
        """The routed part of a group of heads: a sequence for each piece of a list."""
        lists, items = self.lists, self.items
        sizes = torch.empty(4, heads.num_kv * items.max_items, dtype=torch.int32, device=lists.rows.device)
        tile = 256
        sequences_kernel[(triton.cdiv(items.max_items, tile), heads.num_kv)](
            lists.list_start, items.item_start, items.item_block, lists.start_M, lists.length_M, lists.skipped_M, sizes,
            heads.kv.start, lists.num_blocks, items.max_items, items.item_rows, lists.region, work.num_tokens,
            heads.num_kv * items.max_items, TILE=tile,
        )  # fmt: skip
        start_dk = torch.arange(sizes.shape[1], dtype=torch.int32, device=sizes.device) * work.block_size
        return Sequences(*sizes, start_dk, items.item_rows, work.block_size, False)

    def gathered(self, x: Tensor, heads: _Heads) -> Tensor:
        """The rows of x [T, H, D or 1] that the slots of a group of heads hold, [slots, 1, D or 1]. Slots that no list
        uses are left as they are: nobody reads them."""
        lists, width = self.lists, x.shape[2]
        out = torch.empty(heads.num_kv * lists.region, 1, width, dtype=x.dtype, device=x.device)
        tile = 64 if width > 1 else 1024
        gather_kernel[(triton.cdiv(lists.region, tile), heads.num_kv)](
            x, lists.rows, lists.list_start, out, heads.kv.start, lists.num_blocks, lists.region,
            WIDTH=width, BLOCK_D=triton.next_power_of_2(width), ROWS=tile,
        )  # fmt: skip
        return out


class _Work:
    """Sizes of a call, all known on the host, and how it is divided so that a part's rows fit WORKSPACE_BYTES: of the
    routed part q, dO, out, dQ and cuDNN's float32 sums of dQ, of the own part dQ and such sums of dQ, dK and dV of each
    query head; deterministic, in the place of the sums of dQ a number for each query and key. It is the same forward
    and backward, which share the lists."""

    def __init__(self, q: Tensor, k: Tensor, block_size: int, top_k: int, deterministic: bool = False):
        self.deterministic = deterministic
        (self.num_tokens, num_heads, self.head_dim), self.num_kv_heads = q.shape, k.shape[1]
        self.block_size, self.picks, self.group = block_size, top_k - 1, num_heads // self.num_kv_heads
        self.merge_rows = 32 if self.head_dim <= 128 else 16
        self.constants = {
            "NUM_HEADS": num_heads, "NUM_KV_HEADS": self.num_kv_heads, "HEAD_DIM": self.head_dim,
            "BLOCK_D": padded(self.head_dim),
        }  # fmt: skip
        budget = triton_attention.WORKSPACE_BYTES
        size = q.element_size()
        pairs = block_size * size
        picked = self.picks * (4 * size * self.head_dim + 12 + (pairs if deterministic else 4 * self.head_dim))
        own = self.head_dim * (size + 12)
        token_bytes = self.group * (picked + own)
        head_bytes = self.num_tokens * token_bytes
        self.kv_heads_at_once = kv_heads_at_once(self.num_kv_heads, head_bytes, budget)
        chunks = triton.cdiv(head_bytes, budget) if self.kv_heads_at_once == 1 else 1
        # Lists as short as a block would not be worth their pieces.
        self.chunk_tokens = min(self.num_tokens, max(block_size, triton.cdiv(self.num_tokens, max(1, chunks))))
        self.num_chunks = triton.cdiv(self.num_tokens, self.chunk_tokens)
        own_block = self.kv_heads_at_once * self.group * block_size * pairs
        self.blocks_at_once = max(1, budget // own_block) if deterministic else self.num_tokens
        """Blocks of the own part that go through together in the backward."""

    def chunks(self, rows: Tensor, slots: Tensor, list_start: Tensor, layout: Layout) -> Iterator[tuple[slice, Lists]]:
        """The chunks of tokens, in order, and their lists as views of the tensors that hold all."""
        token_rows = self.num_kv_heads * self.group * self.picks
        for i in range(self.num_chunks if self.picks else 0):
            tokens = slice(i * self.chunk_tokens, min((i + 1) * self.chunk_tokens, self.num_tokens))
            own_rows = rows[tokens.start * token_rows : tokens.stop * token_rows].view(self.num_kv_heads, -1)
            blocks = (slots[tokens], list_start[i], layout.start_M, layout.length_M, layout.skipped_M)
            yield tokens, Lists(own_rows.shape[1], layout.num_blocks, own_rows, *blocks)

    def head_groups(self) -> Iterator[_Heads]:
        """The groups of heads, in order."""
        for first in range(0, self.num_kv_heads, self.kv_heads_at_once):
            stop = min(first + self.kv_heads_at_once, self.num_kv_heads)
            yield _Heads(slice(first, stop), slice(first * self.group, stop * self.group))


def _provider(q: Tensor) -> Ragged:
    return CUDNN_RAGGED if q.is_cuda else PLAIN_RAGGED


def _own_blocks(layout: Layout, block_size: int) -> Sequences:
    """The own part: a causal sequence for each block."""
    start, length = layout.start_M, layout.length_M
    return Sequences(start, length, start, length, start, block_size, block_size, True)


def _by_head(x_TGD: Tensor) -> Tensor:
    """[T, G, D] as one head after the other, [G * T, 1, D]; a single head as it lies."""
    return x_TGD if x_TGD.shape[1] == 1 else x_TGD.transpose(0, 1).reshape(-1, 1, x_TGD.shape[2])


# -------------------- kernels


@triton.jit(
    do_not_specialize=["first_kv_head", "num_blocks", "max_items", "item_rows", "region", "num_tokens", "total"]
)
def sequences_kernel(
    list_start, item_start, item_block, block_start, block_length, block_skipped, sizes,
    first_kv_head, num_blocks, max_items, item_rows, region, num_tokens, total, TILE: tl.constexpr,
):  # fmt: skip
    """Fills the four rows of `sizes`, each `total` long: first query, queries, first key and keys of every work item of
    a group of heads; no queries and no keys where there is no such item."""
    item, local_head = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.program_id(1)
    inside = item < max_items
    block, _, begin, end = load_item(
        item, first_kv_head + local_head, item_start, item_block, list_start, block_skipped, num_blocks, max_items,
        item_rows, 1,
    )  # fmt: skip
    used = inside & (begin < end)
    entry = sizes + local_head * max_items + item
    tl.store(entry, tl.where(used, local_head * region + begin, 0), mask=inside)
    tl.store(entry + total, tl.where(used, end - begin, 0), mask=inside)
    start = tl.load(block_start + block, mask=used, other=0)
    tl.store(entry + 2 * total, tl.where(used, local_head * num_tokens + start, 0), mask=inside)
    tl.store(entry + 3 * total, tl.load(block_length + block, mask=used, other=0), mask=inside)


@triton.jit(do_not_specialize=["first_kv_head", "num_blocks", "region"])
def gather_kernel(
    x, rows, list_start, out, first_kv_head, num_blocks, region,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out[slot] = x[row of the slot], for ROWS slots of a head, of those that a list has."""
    local_head = tl.program_id(1)
    kv_head = first_kv_head + local_head
    used = tl.load(list_start + kv_head * (num_blocks + 1) + num_blocks)
    slot = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.load(rows + kv_head.to(tl.int64) * region + slot, mask=slot < used, other=0)
    tile = load_rows(x, row, slot < used, WIDTH, WIDTH, BLOCK_D)
    store_rows(out, local_head.to(tl.int64) * region + slot, tile, slot < used, WIDTH, WIDTH, BLOCK_D)


@triton.jit(do_not_specialize=["first_kv_head", "num_heads_here", "num_tokens", "region"])
def merge_out_kernel(
    part, part_lse, slots, own_out, own_lse, out, lse, first_kv_head, num_heads_here, num_tokens, region,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    PICKS: tl.constexpr, PICKS_PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out and lse [T, H] of ROWS rows: the joint softmax of their own part [T, heads here] and the parts in their
    slots."""
    token, head, local_head, inside = rows_of_group(
        tl.program_id(0), first_kv_head, num_heads_here, num_tokens, NUM_HEADS // NUM_KV_HEADS, ROWS
    )
    row = token.to(tl.int64) * NUM_HEADS + head
    own_row = token.to(tl.int64) * num_heads_here + head - first_kv_head * (NUM_HEADS // NUM_KV_HEADS)
    base = local_head.to(tl.int64) * region
    pick = tl.arange(0, PICKS_PADDED)
    slot = tl.load(
        slots + row[:, None] * PICKS + pick[None, :], mask=inside[:, None] & (pick < PICKS)[None, :], other=-1
    )
    parts_lse = tl.load(part_lse + base[:, None] + slot, mask=slot >= 0, other=float("-inf"))
    row_own_lse = tl.load(own_lse + own_row, mask=inside, other=0.0)
    top = tl.maximum(row_own_lse, tl.max(parts_lse, axis=1))
    joint = top + tl.log(tl.exp(row_own_lse - top) + tl.sum(tl.exp(parts_lse - top[:, None]), axis=1))

    total = load_rows(own_out, own_row, inside, HEAD_DIM, HEAD_DIM, BLOCK_D).to(tl.float32)
    total *= tl.exp(row_own_lse - joint)[:, None]
    for i in range(PICKS):
        slot_i = tl.load(slots + row * PICKS + i, mask=inside, other=-1)
        lse_i = tl.load(part_lse + base + slot_i, mask=slot_i >= 0, other=float("-inf"))
        tile = load_rows(part, base + slot_i, slot_i >= 0, HEAD_DIM, HEAD_DIM, BLOCK_D)
        total += tl.exp(lse_i - joint)[:, None] * tile.to(tl.float32)
    store_rows(out, row, total, inside, HEAD_DIM, HEAD_DIM, BLOCK_D)
    tl.store(lse + row, joint, mask=inside)


@triton.jit(do_not_specialize=["first_kv_head", "num_heads_here", "num_tokens", "region"])
def merge_dq_kernel(
    row_dq, slots, own_dq, d_q, first_kv_head, num_heads_here, num_tokens, region,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    PICKS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dQ of ROWS rows: that of the own part and those in their slots."""
    token, head, local_head, inside = rows_of_group(
        tl.program_id(0), first_kv_head, num_heads_here, num_tokens, NUM_HEADS // NUM_KV_HEADS, ROWS
    )
    row = token.to(tl.int64) * NUM_HEADS + head
    own_row = token.to(tl.int64) * num_heads_here + head - first_kv_head * (NUM_HEADS // NUM_KV_HEADS)
    base = local_head.to(tl.int64) * region
    total = load_rows(own_dq, own_row, inside, HEAD_DIM, HEAD_DIM, BLOCK_D).to(tl.float32)
    for i in range(PICKS):
        slot = tl.load(slots + row * PICKS + i, mask=inside, other=-1)
        total += load_rows(row_dq, base + slot, slot >= 0, HEAD_DIM, HEAD_DIM, BLOCK_D).to(tl.float32)
    store_rows(d_q, row, total, inside, HEAD_DIM, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["first_kv_head", "num_blocks", "max_items", "block_size", "num_kv_heads_here"])
def add_items_kernel(
    own, parts, sums, grad, item_start, block_start, block_length,
    first_kv_head, num_blocks, max_items, block_size, num_kv_heads_here,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """The gradients of KEYS keys of a block after one more chunk of tokens: what there is already (FIRST: those of the
    own part, [T, heads here, D]; else `sums`, alike) and those from the items of the block's list, in their order.
    LAST: written to `grad` [T, G, D]; else to `sums`."""
    block, first_key, local_head = tl.program_id(0), tl.program_id(1) * KEYS, tl.program_id(2)
    kv_head = first_kv_head + local_head
    start, length = tl.load(block_start + block), tl.load(block_length + block)
    if first_key < length:
        entry = kv_head * (num_blocks + 1) + block
        key = first_key + tl.arange(0, KEYS)
        inside = key < length
        token = start.to(tl.int64) + key
        local_row = token * num_kv_heads_here + local_head
        if FIRST:
            total = load_rows(own, local_row, inside, HEAD_DIM, HEAD_DIM, BLOCK_D).to(tl.float32)
        else:
            total = load_rows(sums, local_row, inside, HEAD_DIM, HEAD_DIM, BLOCK_D)
        for item in range(tl.load(item_start + entry), tl.load(item_start + entry + 1)):
            part = (local_head.to(tl.int64) * max_items + item) * block_size + key
            total += load_rows(parts, part, inside, HEAD_DIM, HEAD_DIM, BLOCK_D).to(tl.float32)
        if LAST:
            store_rows(grad, token * NUM_KV_HEADS + kv_head, total, inside, HEAD_DIM, HEAD_DIM, BLOCK_D)
        else:
            store_rows(sums, local_row, total, inside, HEAD_DIM, HEAD_DIM, BLOCK_D)
