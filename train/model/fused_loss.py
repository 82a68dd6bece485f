"""The cross-entropy of train/model/loss.py on a GPU: one kernel per tile in place of six, and one fewer product with
the output matrix.

A tile's logits are read once by a Triton kernel that writes the loss of each token and, rounded, the gradient of the
logits. The gradients of hidden states and weight follow at once, while the forward pass still has the logits, for an
upstream gradient of 1: the backward pass only scales them. That is right where all tokens have the same upstream
gradient, as under a sum or a mean, and whether they have is seen without a synchronisation: the gradient of a sum is
one number, expanded, with a stride of 0. For any other upstream gradient the backward pass recomputes the logits and
scales them token by token.

Memory traffic per token (V vocabulary rows, float32 logits), besides the products': 6 V bytes instead of 38 V.

Shape suffixes: T tokens, C hidden size, V vocabulary rows.
"""

# Triton's stubs know neither launch options, nor that constants become tl.constexpr, nor what its functions return.
# pyright: reportCallIssue=false, reportReturnType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from data.packing import IGNORED

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WHOLE_ROW = 32768
"""Vocabularies up to this size stay on chip between the two uses of a row; larger ones are read twice."""
CHUNK = 8192


@triton.jit
def cross_entropy_kernel(
    logits, labels, upstream, loss, grad, logits_stride, grad_stride,
    V: tl.constexpr, CHUNK: tl.constexpr, IGNORED: tl.constexpr, WITH_GRAD: tl.constexpr, WITH_UPSTREAM: tl.constexpr,
):  # fmt: skip
    """A program per token: its loss, and with WITH_GRAD the gradient of its logits, times its upstream gradient."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, CHUNK)
    label = tl.load(labels + row)
    valid = label != IGNORED
    target = tl.where(valid, label, 0)
    logits += row * logits_stride
    grad += row * grad_stride
    factor = tl.where(valid, 1.0, 0.0)
    if WITH_UPSTREAM:
        factor = tl.where(valid, tl.load(upstream + row), 0.0)
    of_target = tl.load(logits + target)

    if CHUNK >= V:
        x = tl.load(logits + columns, mask=columns < V, other=float("-inf"))
        top = tl.max(x, 0)
        power = tl.exp(x - top)
        total = tl.sum(power, 0)
        if WITH_GRAD:
            share = power / total
            share = tl.where(columns == target, share - 1.0, share) * factor
            tl.store(grad + columns, share.to(grad.dtype.element_ty), mask=columns < V)
    else:
        top = of_target
        total = top * 0.0
        for start in range(0, V, CHUNK):
            x = tl.load(logits + start + columns, mask=start + columns < V, other=float("-inf"))
            higher = tl.maximum(top, tl.max(x, 0))
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), 0)
            top = higher
        if WITH_GRAD:
            for start in range(0, V, CHUNK):
                at = start + columns
                x = tl.load(logits + at, mask=at < V, other=float("-inf"))
                share = tl.exp(x - top) / total
                share = tl.where(at == target, share - 1.0, share) * factor
                tl.store(grad + at, share.to(grad.dtype.element_ty), mask=at < V)
    tl.store(loss + row, tl.where(valid, top + tl.log(total) - of_target, 0.0))


def fused_cross_entropy(hidden_TC: Tensor, weight_VC: Tensor, labels_T: Tensor, tile: int) -> Tensor:
    """Per-token cross-entropy in nats: float32 `[T]`, 0 where the label is -100; as `tiled_cross_entropy`.

    bf16, fp16 or fp32 inputs of one dtype. Gradients are those of float32 logits, rounded to the inputs' dtype.
    """
    return _FusedCrossEntropy.apply(hidden_TC, weight_VC, labels_T, tile, torch.is_grad_enabled())


class _FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TC, weight_VC, labels_T, tile, with_grad):
        # needs_input_grad is true of a weight also where nothing is recorded.
        needed = ctx.needs_input_grad[:2] if with_grad else (False, False)
        loss_T, *grads = _tiles(hidden_TC, weight_VC, labels_T, tile, needed, None)
        ctx.save_for_backward(hidden_TC, weight_VC, labels_T, *grads)
        ctx.tile = tile
        return loss_T

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream_T):  # pyright: ignore[reportIncompatibleMethodOverride]  # torch: *grad_outputs
        hidden_TC, weight_VC, labels_T, *grads = ctx.saved_tensors
        if upstream_T.stride(0) == 0:
            dtype = hidden_TC.dtype
            scale = upstream_T[:1, None]
            # One pass scales in float32 and rounds.
            scaled = [None if g is None else torch.mul(g, scale, out=torch.empty_like(g, dtype=dtype)) for g in grads]
        else:
            needed = ctx.needs_input_grad[:2]
            _, *scaled = _tiles(hidden_TC, weight_VC, labels_T, ctx.tile, needed, upstream_T.contiguous())
            scaled = [None if g is None else g.to(hidden_TC.dtype) for g in scaled]
        return *scaled, None, None, None


def _tiles(
    hidden_TC: Tensor,
    weight_VC: Tensor,
    labels_T: Tensor,
    tile: int,
    needed: tuple[bool, bool],
    upstream_T: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(losses float32 [T], gradient of hidden in its dtype, gradient of weight in float32), the gradients where needed,
    for this upstream gradient or for 1."""
    num_tokens, vocab_size, dtype = labels_T.numel(), weight_VC.shape[0], hidden_TC.dtype
    rows_at_once = min(tile, num_tokens)
    logits = hidden_TC.new_empty(rows_at_once, vocab_size, dtype=torch.float32)
    # Not over the logits: a program would overwrite what its other threads still read.
    dlogits = torch.empty_like(logits, dtype=dtype) if any(needed) else logits
    loss_T = labels_T.new_empty(num_tokens, dtype=torch.float32)
    grad_hidden = torch.empty_like(hidden_TC) if needed[0] else None
    # Float32 even for a bf16 weight: a sum over tiles in bf16 would lose the small terms.
    grad_weight = torch.zeros_like(weight_VC, dtype=torch.float32) if needed[1] else None
    chunk, num_warps = _shape(vocab_size)
    with torch.autocast(hidden_TC.device.type, enabled=False):
        for start in range(0, num_tokens, tile):
            rows = slice(start, min(start + tile, num_tokens))
            size = rows.stop - start
            _product(hidden_TC[rows], weight_VC.t(), logits[:size])
            cross_entropy_kernel[(size,)](
                logits, labels_T[rows], labels_T if upstream_T is None else upstream_T[rows], loss_T[rows], dlogits,
                logits.stride(0), dlogits.stride(0),
                V=vocab_size, CHUNK=chunk, IGNORED=IGNORED, WITH_GRAD=any(needed),
                WITH_UPSTREAM=upstream_T is not None, num_warps=num_warps,
            )  # fmt: skip
            if grad_hidden is not None:
                torch.mm(dlogits[:size], weight_VC, out=grad_hidden[rows])
            if grad_weight is not None:
                _add_product(grad_weight, dlogits[:size].t(), hidden_TC[rows])
    return loss_T, grad_hidden, grad_weight


def _shape(vocab_size: int) -> tuple[int, int]:
    """(columns that a program holds, its warps)."""
    chunk = triton.next_power_of_2(vocab_size) if vocab_size <= WHOLE_ROW else CHUNK
    return chunk, max(4, min(32, chunk // 1024))


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, float32 whatever the inputs: products of 16-bit numbers, not rounded again."""
    if a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a.float(), b.float(), out=out)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, float32, within the product's kernel."""
    if a.dtype != torch.float32 and a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())
