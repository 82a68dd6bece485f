"""Layers that keep nothing on the GPU: model.activation_checkpointing=offload and offload_heads, for long contexts.

A layer's input is copied to pinned host memory and prefetched for its backward pass, on a stream of its own; the layer
is then recomputed, its MLP by tiles of tokens, so that the MLP's intermediate tensors never exist for all tokens. With
offload_heads its attention runs by groups of heads, so that q, k, v and their gradients never exist for all heads: some
eight tensors of the residual stream's size remain on the GPU, whatever the number of layers.

Shapes: T tokens of a pack, C hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from train.engine.pinned import pin
from train.model.sizes import TILE_TOKENS

_recomputing = False


class HostBuffers:
    """Pinned host memory for the inputs of layers, kept from step to step."""

    def __init__(self):
        self._free: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}

    def take(self, like: Tensor) -> Tensor:
        """A buffer of this shape and dtype."""
        free = self._free.setdefault((like.shape, like.dtype), [])
        return free.pop() if free else _pinned(like)

    def give_back(self, buffer: Tensor) -> None:
        """Frees a buffer for reuse."""
        self._free[buffer.shape, buffer.dtype].append(buffer)


def _pinned(like: Tensor) -> Tensor:
    buffer = torch.empty(like.shape, dtype=like.dtype)
    if like.is_cuda and buffer.numel():
        code = pin(buffer)
        if code:
            raise MemoryError(f"{buffer.nbytes / 2**30:.1f} GiB of host memory cannot be pinned (CUDA error {code})")
    return buffer


class Inputs:
    """The inputs of the layers of one forward pass, on the host."""

    def __init__(self, buffers: HostBuffers, device: torch.device):
        self._buffers, self._kept, self._coming = buffers, [], {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def keep(self, x: Tensor) -> int:
        """Copies x to the host asynchronously; returns its index for `take`."""
        buffer = self._buffers.take(x)
        if self._stream is None:
            buffer.copy_(x)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(x.device))
            with torch.cuda.stream(self._stream):
                buffer.copy_(x, non_blocking=True)
            x.record_stream(self._stream)
        self._kept.append((buffer, x.device))
        return len(self._kept) - 1

    def take(self, place: int) -> Tensor:
        """The input at this index, on its device; prefetches the one before it."""
        x = self._fetch(place)
        del self._coming[place]
        if self._stream is not None:
            torch.cuda.current_stream(x.device).wait_stream(self._stream)
            x.record_stream(torch.cuda.current_stream(x.device))
        # Copies to the host and back share one stream, in order: the buffer may be written again.
        self._buffers.give_back(self._kept[place][0])
        if place:
            self._fetch(place - 1)
        return x

    def _fetch(self, place: int) -> Tensor:
        if place not in self._coming:
            buffer, device = self._kept[place]
            if self._stream is None:
                self._coming[place] = buffer.clone()
            else:
                with torch.cuda.stream(self._stream):
                    self._coming[place] = buffer.to(device, non_blocking=True)
        return self._coming[place]


def offloaded(layer: Callable[..., Tensor], inputs: Inputs, x_TC: Tensor, *arguments) -> Tensor:
    """layer(x, *arguments), recomputed in the backward pass from x, which is kept on the host."""
    return _Offloaded.apply(x_TC, layer, inputs, arguments)


class _Offloaded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TC, layer, inputs, arguments):
        ctx.layer, ctx.inputs, ctx.arguments = layer, inputs, arguments
        ctx.place = inputs.keep(x_TC)
        return layer(x_TC, *arguments)

    @staticmethod
    def backward(ctx, grad_TC):  # pyright: ignore[reportIncompatibleMethodOverride]  # torch: *grad_outputs
        x_TC = ctx.inputs.take(ctx.place).requires_grad_()
        with torch.enable_grad(), _as_recomputation():
            out_TC = ctx.layer(x_TC, *ctx.arguments)
        torch.autograd.backward(out_TC, grad_TC)
        return x_TC.grad, None, None, None


@contextmanager
def _as_recomputation() -> Iterator[None]:
    """Marks a recomputation: the MLP's output, which nothing reads, is not computed."""
    global _recomputing
    _recomputing = True
    try:
        yield
    finally:
        _recomputing = False


def tiled(function: Callable[..., Tensor], x_TC: Tensor, *weights: Tensor) -> Tensor:
    """function(x, *weights), a function of each row alone, by tiles of rows in both passes.

    Nothing but x and the weights is kept. Gradients of the weights are summed over tiles in float32 (float64 for
    float64).
    """
    return _Tiled.apply(x_TC, function, TILE_TOKENS, *weights)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TC, function, tile, *weights):
        ctx.save_for_backward(x_TC, *weights)
        ctx.function, ctx.tile = function, tile
        out_TC = torch.empty_like(x_TC)
        if not _recomputing:
            for x_tC, out_tC in zip(x_TC.split(tile), out_TC.split(tile)):
                out_tC.copy_(function(x_tC, *weights))
        return out_TC

    @staticmethod
    def backward(ctx, grad_TC):  # pyright: ignore[reportIncompatibleMethodOverride]  # torch: *grad_outputs
        x_TC, *weights = ctx.saved_tensors
        dx_TC = torch.empty_like(x_TC)
        sums = [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in weights]
        for x_tC, grad_tC, dx_tC in zip(*(t.split(ctx.tile) for t in (x_TC, grad_TC, dx_TC))):
            leaves = [t.detach().requires_grad_() for t in (x_tC, *weights)]
            with torch.enable_grad():
                out_tC = ctx.function(*leaves)
            dx, *dweights = torch.autograd.grad(out_tC, leaves, grad_tC)
            dx_tC.copy_(dx)
            for total, one in zip(sums, dweights):
                total += one
        return dx_TC, None, None, *(total.to(w.dtype) for total, w in zip(sums, weights))


def mlp_with_residual(
    x_TC: Tensor, norm_C: Tensor, gate_FC: Tensor, up_FC: Tensor, down_CF: Tensor, eps: float
) -> Tensor:
    """x + down(silu(gate(h)) * up(h)) with h the RMSNorm of x: the second half of a decoder layer, of its weights."""
    normed_TC = norm_C * F.rms_norm(x_TC, norm_C.shape, None, eps)
    return x_TC + F.linear(F.silu(F.linear(normed_TC, gate_FC)) * F.linear(normed_TC, up_FC), down_CF)
