"""Next-token cross-entropy that never holds the logits of all tokens.

At 32K tokens and a vocabulary of 128K the float32 logits would take 17 GB. Here one tile of tokens has logits at a
time, recomputed in the backward pass. The result is a per-token loss, so that the loss by position
(train/record/position_loss.py) needs no second pass.

Shape suffixes: T tokens, C hidden size, V vocabulary rows.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from data.packing import IGNORED


def tiled_cross_entropy(hidden_TC: torch.Tensor, weight_VC: torch.Tensor, labels_T: torch.Tensor, tile: int):
    """Per-token cross-entropy in nats: float32 `[T]`, 0 where the label is -100.

    `hidden_TC` and `weight_VC` share a floating dtype; `labels_T` is int64 and already shifted. `tile` tokens have
    logits at a time. Logits, softmax and the sum of the weight's gradient over tiles are float32 (float64 for float64
    inputs) whatever the inputs; gradients come back in the inputs' dtypes, for any upstream gradient. A tile without a
    label is skipped on the CPU only; on a GPU the check would be a synchronisation.
    """
    assert hidden_TC.ndim == 2 and weight_VC.ndim == 2 and hidden_TC.shape[1] == weight_VC.shape[1], (
        hidden_TC.shape,
        weight_VC.shape,
    )
    assert labels_T.shape == hidden_TC.shape[:1], (labels_T.shape, hidden_TC.shape)
    assert hidden_TC.dtype == weight_VC.dtype, (hidden_TC.dtype, weight_VC.dtype)
    assert tile >= 1, tile
    if hidden_TC.is_cuda and (fused := _fused()) is not None and hidden_TC.dtype in fused.DTYPES:
        return fused.fused_cross_entropy(hidden_TC, weight_VC, labels_T, tile)
    return _TiledCrossEntropy.apply(hidden_TC, weight_VC, labels_T, tile)


@functools.cache
def _fused() -> ModuleType | None:
    """train/model/fused_loss.py; None without triton."""
    return importlib.import_module("train.model.fused_loss") if importlib.util.find_spec("triton") else None


class _TiledCrossEntropy(torch.autograd.Function):
    """The reference, for CPUs, float64 and where triton is missing; the fused one is tested against it."""

    @staticmethod
    def forward(ctx, hidden_TC, weight_VC, labels_T, tile):
        wide = torch.promote_types(hidden_TC.dtype, torch.float32)
        loss_T = torch.zeros(labels_T.shape, dtype=wide, device=labels_T.device)
        with torch.autocast(hidden_TC.device.type, enabled=False):
            for rows in _tiles(labels_T, tile):
                logits = _matmul_wide(hidden_TC[rows], weight_VC.t())
                loss_T[rows] = F.cross_entropy(logits, labels_T[rows], ignore_index=IGNORED, reduction="none")
        ctx.save_for_backward(hidden_TC, weight_VC, labels_T)
        ctx.tile = tile
        return loss_T.float()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_T):  # pyright: ignore[reportIncompatibleMethodOverride]  # torch: *grad_outputs
        hidden_TC, weight_VC, labels_T = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        wide = torch.promote_types(hidden_TC.dtype, torch.float32)
        grad_hidden = torch.zeros_like(hidden_TC) if needs_hidden else None
        # Float32 even for a bf16 weight: a sum over tiles in bf16 would lose the small terms.
        grad_weight = torch.zeros_like(weight_VC, dtype=wide) if needs_weight else None
        with torch.autocast(hidden_TC.device.type, enabled=False):
            for rows in _tiles(labels_T, ctx.tile):
                valid = labels_T[rows] != IGNORED
                target = torch.where(valid, labels_T[rows], 0)[:, None]
                scale = torch.where(valid, grad_T[rows].to(wide), 0.0)[:, None]
                dlogits = torch.softmax(_matmul_wide(hidden_TC[rows], weight_VC.t()), 1)
                dlogits.scatter_add_(1, target, dlogits.new_full((1, 1), -1.0).expand_as(target))
                # One pass scales and rounds.
                dlogits = torch.mul(dlogits, scale, out=torch.empty_like(dlogits, dtype=hidden_TC.dtype))
                if grad_hidden is not None:
                    grad_hidden[rows] = torch.mm(dlogits, weight_VC)
                if grad_weight is not None:
                    grad_weight += _matmul_wide(dlogits.t(), hidden_TC[rows])
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight_VC.dtype), None, None


def _tiles(labels_T: torch.Tensor, tile: int):
    """Slices of `tile` tokens that cover all tokens, without those known to hold no label."""
    for start in range(0, labels_T.numel(), tile):
        rows = slice(start, min(start + tile, labels_T.numel()))
        if labels_T.device.type == "cpu" and bool((labels_T[rows] == IGNORED).all()):
            continue
        yield rows


def _matmul_wide(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b` in float32 for 16-bit inputs (products of 16-bit numbers, not rounded again), else in the inputs'
    dtype."""
    if a.dtype not in (torch.bfloat16, torch.float16):
        return torch.mm(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())
