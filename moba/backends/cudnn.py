"""Dense causal attention of packed documents on cuDNN's kernels, one long document after the other.

On Hopper they are nearly twice as fast as FlashAttention 2, but they take one length per call, and build a plan (some
0.1 s) for each length they have not seen. So:

- lengths come from the host, as ints: asking the device for them would stall its queue;
- a document is computed at one of few padded lengths. Under causality that is harmless: keys behind a document's end
  lie in every one of its queries' future, and what the padding's own queries give is dropped. The padding is whatever
  follows in the pack, so nothing is copied for it, but at the pack's end. It must be finite, like all that a model
  computes; what a padded query contributes to the gradients is exactly zero, since its output's gradient is;
- short documents, where a call for each would cost more than it saves, stay with varlen flash attention, a call for
  each run of neighbours.

Plans are kept a thread, and autograd runs the backward pass on one of its own: `build_plans` goes through autograd.

Shapes: T tokens, H query heads, G key/value heads, D head size, N documents, P a padded length.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from moba.backends.refusals import shortest_on_cudnn
from moba.backends.varlen import PLAIN, Primitive, default_primitive
from moba.routing import score_dtype

PARTS = 8
"""Padded lengths between a power of two and the next: an eighth of the power is the most that padding adds."""


class Dense(NamedTuple):
    """Dense causal attention of one sequence by one provider, as two functions without autograd.

    forward(q [P, H, D], k, v [P, G, D], scale) -> out [P, H, D], lse
    backward(dout, q, k, v, out, lse, scale) -> dq, dk, dv

    lse is float32 [H, P] but for dimensions of 1, which differ between versions of torch.
    """

    name: str
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


class Run(NamedTuple):
    """A stretch of a pack that one call computes: a long document, or neighbouring short ones."""

    start: int
    lengths: tuple[int, ...]
    padded: int
    """Length at which a long document is computed; 0 for short ones."""

    @property
    def stop(self) -> int:
        """The token behind the last."""
        return self.start + sum(self.lengths)


def padded_length(length: int) -> int:
    """The smallest multiple of an eighth of a power of two, at least 128, that a document of `length` tokens fits.

    For n tokens between powers of two p < n <= 2 p, multiples of p / 8: at most an eighth longer, a 24th on average.
    """
    power = 1 << max(length - 1, 1).bit_length() - 1
    step = max(power // PARTS, 128)
    return -(-length // step) * step


def padded_lengths(longest: int, shortest: int) -> list[int]:
    """All padded lengths of documents of `shortest` to `longest` tokens, ascending: the plans there can be."""
    found, length = [], shortest
    while length <= longest:
        found.append(padded_length(length))
        length = found[-1] + 1
    return found


def runs_of(lengths: Sequence[int], shortest: int) -> list[Run]:
    """The calls that compute documents of these lengths, in order; empty documents take part in none."""
    runs: list[Run] = []
    start = 0
    for length in lengths:
        if length >= shortest:
            runs.append(Run(start, (length,), padded_length(length)))
        elif length and runs and not runs[-1].padded and runs[-1].stop == start:
            runs[-1] = runs[-1]._replace(lengths=(*runs[-1].lengths, length))
        elif length:
            runs.append(Run(start, (length,), 0))
        start += length
    return runs


def cudnn_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    softmax_scale: float | None = None,
    return_lse: bool = False,
    *,
    shortest: int | None = None,
    dense: Dense | None = None,
    varlen: Primitive | None = None,
):
    """Dense causal attention within documents of `lengths` tokens: out [T, H, D]; with return_lse also lse [H, T].

    q [T, H, D], k, v [T, G, D], `lengths` on the host, their sum T. Documents of `shortest` tokens or more (None: as
    fits the head size) run on `dense` (cuDNN), shorter ones on `varlen`; on a CPU both are plain PyTorch. lse is the
    natural log-sum-exp in float32, without gradient. Gradients may differ in their last bits from run to run. What
    cuDNN takes is asked of moba.backends.refusals before.
    """
    assert sum(lengths) == q.shape[0] == k.shape[0], (sum(lengths), q.shape, k.shape)
    dense = dense or (CUDNN if q.is_cuda else PLAIN_DENSE)
    varlen = varlen or default_primitive(q)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    runs = tuple(runs_of(lengths, shortest or shortest_on_cudnn(q.shape[-1])))
    if not runs:
        out, lse = q.clone(), q.new_empty(q.shape[1], 0, dtype=score_dtype(q))
    else:
        out, lse = _CudnnAttention.apply(q, k, v, runs, scale, dense, varlen)
    return (out, lse) if return_lse else out


def build_plans(q: Tensor, k: Tensor, lengths: Sequence[int]) -> None:
    """Makes cuDNN build its plans for documents of these padded lengths, forward and backward.

    q [., H, D] and k [., G, D] give heads, head size, dtype and device. Without this, each new length stalls the step
    it first appears in. Through activation checkpointing, so that autograd's thread has the forward plans as well.
    """
    for length in lengths:
        inputs = [x.new_zeros(length, *x.shape[1:]).requires_grad_() for x in (q, k, k)]
        attention = functools.partial(cudnn_attention, lengths=[length], shortest=1)
        checkpoint(attention, *inputs, use_reentrant=False, preserve_rng_state=False).sum().backward()


class _CudnnAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, runs, scale, dense, varlen):
        outs, lses, kept = [], [], []
        for run in runs:
            if run.padded:
                length = run.lengths[0]
                out, lse = dense.forward(*(_window(x, run) for x in (q, k, v)), scale)
                outs.append(out[:length])
                lses.append(lse.reshape(q.shape[1], -1)[:, :length])
                kept.append(lse)  # of the padding too: its probabilities have to be finite again
            else:
                rows = slice(run.start, run.stop)
                out, lse = varlen.forward(q[rows], k[rows], v[rows], *_varlen_sizes(run, q.device), True, scale)
                outs.append(out)
                lses.append(lse)
                kept.append(lse)
        out, lse = _joined(outs, 0), _joined(lses, 1)
        ctx.save_for_backward(q, k, v, out, *kept)
        ctx.call = runs, scale, dense, varlen
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, _dlse):  # pyright: ignore[reportIncompatibleMethodOverride]  # torch: *grad_outputs
        q, k, v, out, *kept = ctx.saved_tensors
        runs, scale, dense, varlen = ctx.call
        dout, grads = dout.contiguous(), []
        for run, lse in zip(runs, kept):
            rows = slice(run.start, run.stop)
            if run.padded:
                length = run.lengths[0]
                windows = [_window(x, run) for x in (q, k, v, out)]
                found = dense.backward(_padded(dout[rows], run.padded), *windows, lse, scale)
                grads.append([x[:length] for x in found])
            else:
                tensors = (dout[rows], q[rows], k[rows], v[rows], out[rows], lse)
                grads.append(varlen.backward(*tensors, *_varlen_sizes(run, q.device), True, scale, False))
        return (*(_joined(parts, 0) for parts in zip(*grads)), None, None, None, None)


def _window(x: Tensor, run: Run) -> Tensor:
    """The rows from the document's start at its padded length: those of the pack where it has so many, else zeros."""
    rows = x[run.start : run.start + run.padded]
    return _padded(rows, run.padded)


def _padded(x: Tensor, length: int) -> Tensor:
    """x [n, ., .] with zeros behind it, [length, ., .]; itself if it is as long."""
    return x if x.shape[0] == length else F.pad(x, (0, 0, 0, 0, 0, length - x.shape[0]))


def _joined(parts: list[Tensor] | tuple[Tensor, ...], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _varlen_sizes(run: Run, device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    """(cu_q, cu_k, max_q, max_k) of a run of short documents."""
    bounds = torch.tensor([0, *run.lengths]).cumsum(0).to(torch.int32).to(device, non_blocking=True)
    longest = max(run.lengths)
    return bounds, bounds, longest, longest


# -------------------- providers


def _batched(x: Tensor) -> Tensor:
    """[P, H, D] as cuDNN takes it, [1, H, P, D]: a view, token-major in memory."""
    return x.transpose(0, 1)[None]


def _unbatched(x: Tensor) -> Tensor:
    return x[0].transpose(0, 1)


def _cudnn_forward(q, k, v, scale):
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *map(_batched, (q, k, v)), None, True, 0.0, True, False, scale=scale
    )
    return _unbatched(out), lse


def _cudnn_backward(dout, q, k, v, out, lse, scale):
    # Without dropout the random state is never read, but the schema wants tensors.
    unread = torch.empty((), dtype=torch.int64, device=q.device)
    no_bias, no_bounds = None, (None, None)
    sizes = (q.shape[0], k.shape[0], 0.0, True)
    grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *map(_batched, (dout, q, k, v, out)), lse, unread, unread, no_bias, *no_bounds, *sizes, scale=scale
    )
    dq, dk, dv = map(_unbatched, grads)
    return dq, dk, dv


def _plain_sizes(q: Tensor) -> tuple[Tensor, Tensor, int, int]:
    bounds = torch.tensor([0, q.shape[0]], dtype=torch.int32)
    return bounds, bounds, q.shape[0], q.shape[0]


def _plain_forward(q, k, v, scale):
    return PLAIN.forward(q, k, v, *_plain_sizes(q), True, scale)


def _plain_backward(dout, q, k, v, out, lse, scale):
    return PLAIN.backward(dout, q, k, v, out, lse, *_plain_sizes(q), True, scale, False)


CUDNN = Dense("cudnn", _cudnn_forward, _cudnn_backward)
PLAIN_DENSE = Dense("plain", _plain_forward, _plain_backward)
