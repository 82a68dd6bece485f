"""Key convolution (FlashMoBA, arXiv 2511.11571, appendix C): each key is mixed with the few before it, a channel at a
time.

    k'_t = k_t + SiLU(sum over l < W of w_l * k_(t-l))

with weights w_l of one number a channel. It stands before the block means and the attention, both of which see k'.
Tokens before the start of the document count as zeros. Weights of zero change nothing.

Shapes: T tokens of a pack, C channels of all key heads, W width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moba.routing import score_dtype


class KeyConvolution(nn.Module):
    """The convolution of one layer: W * C weights, zero at first, so that a model starts as one without it."""

    def __init__(self, num_channels: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, num_channels))
        self.reach = width - 1
        """Earlier keys that a key is mixed with."""

    def forward(self, k_TC: Tensor, offset_T: Tensor | None = None, channels: slice = slice(None)) -> Tensor:
        """k' [T, C] in k's dtype; half precisions are computed in float32.

        offset_T int64 (`Documents.offsets`): each token's position in its document; None: all are one document.
        `channels`: which of all k_TC has.
        """
        return _Convolution.apply(k_TC, self.weight[:, channels], offset_T)


class _Convolution(torch.autograd.Function):
    """Keeps the keys alone for the backward pass, where autograd would keep each shifted copy."""

    @staticmethod
    def forward(ctx, k_TC, weight_WC, offset_T):
        ctx.save_for_backward(k_TC, weight_WC, offset_T)
        mixed_TC = _mixed(k_TC, weight_WC, offset_T)
        return in_dtype(k_TC + F.silu(mixed_TC), k_TC.dtype)

    @staticmethod
    def backward(ctx, grad_TC):  # pyright: ignore[reportIncompatibleMethodOverride]  # torch: *grad_outputs
        k_TC, weight_WC, offset_T = ctx.saved_tensors
        mixed_TC = _mixed(k_TC, weight_WC, offset_T)
        gate_TC = torch.sigmoid(mixed_TC)
        grad_TC = grad_TC.to(mixed_TC.dtype)
        dmixed_TC = grad_TC * gate_TC * (1 + mixed_TC * (1 - gate_TC))
        dk_TC, dweights = grad_TC + dmixed_TC * weight_WC[0], []
        for lag in range(len(weight_WC)):
            dweights.append((dmixed_TC * _delayed(k_TC, lag, offset_T)).sum(0))
            if lag:
                reached_TC = _known(dmixed_TC * weight_WC[lag], lag, offset_T)
                dk_TC = dk_TC + F.pad(reached_TC, (0, 0, 0, lag))[lag:]
        return dk_TC.to(k_TC.dtype), torch.stack(dweights).to(weight_WC.dtype), None


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in this dtype, for results of autograd functions: `x.to` of a dtype that x has already is one whose gradient is
    lost where torch 2.11 compiles it."""
    return x if x.dtype == dtype else x.to(dtype)


def _mixed(k_TC: Tensor, weight_WC: Tensor, offset_T: Tensor | None) -> Tensor:
    """What goes into the SiLU, [T, C] in float32 (float64 for float64)."""
    weight_WC = weight_WC.to(score_dtype(k_TC))
    mixed_TC = k_TC * weight_WC[0]
    for lag in range(1, len(weight_WC)):
        mixed_TC = mixed_TC + _delayed(k_TC, lag, offset_T) * weight_WC[lag]
    return mixed_TC


def _delayed(k_TC: Tensor, lag: int, offset_T: Tensor | None) -> Tensor:
    """The key `lag` tokens before each, zero before the document's start."""
    return _known(F.pad(k_TC, (0, 0, lag, 0))[: k_TC.shape[0]], lag, offset_T) if lag else k_TC


def _known(x_TC: Tensor, lag: int, offset_T: Tensor | None) -> Tensor:
    """x, zero for tokens that have fewer than `lag` before them in their document."""
    if offset_T is None:
        offset_T = torch.arange(x_TC.shape[0], device=x_TC.device)
    return x_TC.masked_fill((offset_T < lag)[:, None], 0)
