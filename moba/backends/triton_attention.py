"""MoBA attention fused in Triton, forward and backward: routing, lists and attention as two `torch.library` operators.

`moba::triton_forward` and `moba::triton_backward` are opaque to torch.compile, which traces around them by their fake
versions. The backward reuses the forward's lists, so both work on the same blocks. Under activation checkpointing the
forward runs twice; every step of it has a fixed order and no float atomics, so the second run selects and computes the
same bits.

Nothing waits for the device: all sizes are bounds known from shapes. docs/kernels.md explains the design and its
measurements.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from moba.backends.triton_backward import attention_backward
from moba.backends.triton_forward import attention_forward
from moba.backends.triton_lists import Layout, Lists, build_lists, place_kernel
from moba.backends.triton_routing import select_blocks
from moba.documents import Documents

WORKSPACE_BYTES = 5 << 28
"""Budget for partial results. Key/value heads are worked through in groups that fit it. One head's partial results are
the least that is used, T * G * K * D numbers for the G = H / H_kv query heads of a group, even if they exceed the
budget."""

INTERPRETED = not isinstance(place_kernel, triton.JITFunction)
"""Whether kernels run in Triton's interpreter, on the CPU (TRITON_INTERPRET=1 when this was imported)."""


def moba_triton(
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
    """MoBA attention [T, H, D] and its log-sum-exp, float32 [H, T] (natural log); sizes as in `moba.moba_attention`.

    `selection`: int32 [H, T, K] as of `moba.route`, to be used instead of routing. Both outputs are differentiable.
    Gradients are bitwise repeatable: no step uses float atomics. What these kernels cannot do is said by
    moba/backends/refusals.py.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    with device_of(q):
        layout = documents.kernel_layout(block_size)
    tensors = (layout.start_M, layout.length_M, layout.skipped_M, layout.first_block_T, layout.own_block_T)
    selection_THK = None if selection is None else _moved(selection, layout.first_block_T[:, None]).transpose(0, 1)
    return triton_forward(q, k, v, *tensors, block_size, top_k, scale, first_blocks, selection_THK)[:2]


@torch.no_grad()
def route_triton(
    q: Tensor, k: Tensor, documents: Documents, block_size: int, top_k: int, first_blocks: int = 0
) -> Tensor:
    """What `moba_triton` selects, int32 [H, T, K] as of `moba.route`."""
    q, k = q.contiguous(), k.contiguous()
    with device_of(q):
        layout = documents.kernel_layout(block_size)
        if q.shape[0] == 0:
            return layout.first_block_T.new_empty(q.shape[1], 0, top_k)
        selection_THK = select_blocks(q, k, layout, block_size, top_k, first_blocks)
    selection_HTK = selection_THK.sort(dim=-1).values.transpose(0, 1)  # history lies before the own block
    return _moved(selection_HTK, -layout.first_block_T[:, None]).contiguous()


def _moved(selection_HTK: Tensor, by_T1: Tensor) -> Tensor:
    """A selection whose blocks are counted from elsewhere; -1s stay."""
    return torch.where(selection_HTK >= 0, selection_HTK + by_T1, -1)


@torch.library.custom_op("moba::triton_forward", mutates_args=())
def triton_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start_M: Tensor,
    length_M: Tensor,
    skipped_M: Tensor,
    first_block_T: Tensor,
    own_block_T: Tensor,
    block_size: int,
    top_k: int,
    softmax_scale: float,
    first_blocks: int = 0,
    selection_THK: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out [T, H, D], lse float32 [H, T], and the tensors of `Lists` for the backward: rows, slots, list_start), from
    the tensors of a `Layout`. `selection_THK`: int32 blocks counted through the pack, None: route."""
    if q.shape[0] == 0:
        return _empty_outputs(q, k, start_M, top_k)
    layout = Layout(start_M.shape[0], start_M, length_M, skipped_M, first_block_T, own_block_T)
    out, lse, lists = routed_forward(q, k, v, layout, block_size, top_k, softmax_scale, first_blocks, selection_THK)
    return out, lse, lists.rows, lists.slots, lists.list_start


def routed_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    block_size: int,
    top_k: int,
    softmax_scale: float,
    first_blocks: int = 0,
    selection_THK: Tensor | None = None,
) -> tuple[Tensor, Tensor, Lists]:
    """(out [T, H, D], lse float32 [H, T], the lists of the selected blocks) of at least one token; no gradient."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    with device_of(q):
        if selection_THK is None:
            selection_THK = select_blocks(q, k, layout, block_size, top_k, first_blocks)
        lists = build_lists(selection_THK.contiguous(), layout, k.shape[1])
        del selection_THK
        out, lse = attention_forward(q, k, v, lists, block_size, softmax_scale, WORKSPACE_BYTES)
    return out, lse, lists


@triton_forward.register_fake
def _(
    q, k, v, start_M, length_M, skipped_M, first_block_T, own_block_T, block_size, top_k, softmax_scale,
    first_blocks=0, selection_THK=None,
):  # fmt: skip
    return _empty_outputs(q, k, start_M, top_k)


def _empty_outputs(q: Tensor, k: Tensor, start_M: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (num_tokens, num_heads, _), num_kv_heads = q.shape, k.shape[1]
    num_blocks = start_M.shape[0]
    region = num_tokens * (num_heads // num_kv_heads) * top_k
    return (
        q.new_empty(q.shape),
        q.new_empty((num_heads, num_tokens), dtype=torch.float32),
        q.new_empty((num_kv_heads, region), dtype=torch.int32),
        q.new_empty((num_tokens, num_heads, top_k), dtype=torch.int32),
        q.new_empty((num_kv_heads, num_blocks + 1), dtype=torch.int32),
    )


@torch.library.custom_op("moba::triton_backward", mutates_args=())
def triton_backward(
    d_out: Tensor,
    d_lse: Tensor | None,
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
    skipped_M: Tensor,
    block_size: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dQ, dK, dV) in the shapes of q, k and v, from what the forward returned and the gradients of its first two."""
    q, k, v, d_out = q.contiguous(), k.contiguous(), v.contiguous(), d_out.contiguous()
    d_lse = None if d_lse is None else d_lse.contiguous()
    if q.shape[0] == 0:
        return torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    with device_of(q):
        lists = Lists(rows.shape[1], start_M.shape[0], rows, slots, list_start, start_M, length_M, skipped_M)
        return attention_backward(d_out, d_lse, q, k, v, out, lse, lists, block_size, softmax_scale, WORKSPACE_BYTES)


@triton_backward.register_fake
def _(
    d_out, d_lse, q, k, v, out, lse, rows, slots, list_start, start_M, length_M, skipped_M, block_size, softmax_scale
):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output) -> None:
    q, k, v, start_M, length_M, skipped_M, _, _, ctx.block_size, _, ctx.softmax_scale, *_ = inputs
    ctx.save_for_backward(q, k, v, *output, start_M, length_M, skipped_M)
    ctx.set_materialize_grads(False)


def _gradients(ctx, d_out, d_lse, *_):
    q, k, v, out, lse, *lists = ctx.saved_tensors
    d_out = torch.zeros_like(out) if d_out is None else d_out
    d_q, d_k, d_v = triton_backward(d_out, d_lse, q, k, v, out, lse, *lists, ctx.block_size, ctx.softmax_scale)
    return d_q, d_k, d_v, *[None] * 10


triton_forward.register_autograd(_gradients, setup_context=_save)


def device_of(x: Tensor) -> torch.cuda.device:
    """Context in which Triton launches on the device of x."""
    return torch.cuda.device(x.device.index if x.device.type == "cuda" else -1)
