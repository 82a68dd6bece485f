"""Variable-length ("varlen") flash attention with its log-sum-exp, forward and backward as two plain functions.

The paper's MoBA algorithm (flash.py) needs more than an autograd attention: its backward pass hands each part the
log-sum-exp and the output of the *whole* softmax. So a Primitive is a pair of functions without autograd. Three
exist:

- flash-attn's private varlen functions, if the package is installed (2.6 to 2.8: their signatures differ);
- torch's own copy of the same kernels, `aten::_flash_attention_forward/_backward`;
- a loop over sequences in plain PyTorch, any device and dtype, for tests and for machines without CUDA.

Shapes: q [Tq, H, D]; k, v [Tk, H_kv, D], H % H_kv == 0, never repeated; cu_q, cu_k int32 [N+1] prefix sums of the
lengths; lse [H, Tq], natural logarithm, float32 (float64 where the plain primitive runs in float64). `causal` aligns
the last query of a sequence with its last key, as flash-attn does since 2.1.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moba.routing import score_dtype


class Primitive(NamedTuple):
    """Varlen attention of one provider.

    forward(q, k, v, cu_q, cu_k, max_q, max_k, causal, softmax_scale, window=None) -> out [Tq, H, D], lse [H, Tq]
    backward(dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, causal, softmax_scale, deterministic, window=None)
        -> dq, dk, dv

    backward takes whatever out and lse it is given: with those of a softmax over more keys than k it returns this
    part's share of the gradients. A sequence may have no queries (its dk, dv are zero) or no tokens at all. `window`,
    only with causal: a query sees that many keys, up to the one at its own position.
    """

    name: str
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


# -------------------- plain PyTorch


def _sequences(q: Tensor, cu_q: Tensor, cu_k: Tensor):
    """Yields (query slice, key slice) of every sequence that has queries."""
    bounds_q, bounds_k = cu_q.tolist(), cu_k.tolist()
    for i in range(len(bounds_q) - 1):
        if bounds_q[i + 1] > bounds_q[i]:
            yield slice(bounds_q[i], bounds_q[i + 1]), slice(bounds_k[i], bounds_k[i + 1])


def _scores(q_THD: Tensor, k_SKD: Tensor, causal: bool, scale: float, window: int | None) -> Tensor:
    """Scaled, masked scores of one sequence: [H_kv, H / H_kv, Tq, Tk]; consecutive query heads share a key head."""
    q_TKGD = q_THD.unflatten(1, (k_SKD.shape[1], -1))
    scores = torch.einsum("tkgd,skd->kgts", q_TKGD, k_SKD) * scale
    if causal:
        num_q, num_k = scores.shape[-2:]
        visible = torch.ones(num_q, num_k, dtype=torch.bool, device=q_THD.device).tril(num_k - num_q)
        if window is not None:
            visible = visible.triu(num_k - num_q - window + 1)
        scores = scores.masked_fill(~visible, float("-inf"))
    return scores


def _plain_forward(q, k, v, cu_q, cu_k, max_q, max_k, causal, softmax_scale, window=None):
    dtype = score_dtype(q)
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=dtype, device=q.device)
    for rows, cols in _sequences(q, cu_q, cu_k):
        scores = _scores(q[rows].to(dtype), k[cols].to(dtype), causal, softmax_scale, window)
        lse_KGT = scores.logsumexp(-1)
        probs = (scores - lse_KGT[..., None]).exp()
        out[rows] = torch.einsum("kgts,skd->tkgd", probs, v[cols].to(dtype)).flatten(1, 2).to(q.dtype)
        lse[:, rows] = lse_KGT.flatten(0, 1)
    return out, lse


def _plain_backward(
    dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, causal, softmax_scale, deterministic, window=None
):
    dtype = score_dtype(q)
    num_kv_heads = k.shape[1]
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows, cols in _sequences(q, cu_q, cu_k):
        q_s, k_s, v_s, dout_s = q[rows].to(dtype), k[cols].to(dtype), v[cols].to(dtype), dout[rows].to(dtype)
        lse_KGT = lse[:, rows].unflatten(0, (num_kv_heads, -1))
        probs = (_scores(q_s, k_s, causal, softmax_scale, window) - lse_KGT[..., None]).exp()
        dout_TKGD = dout_s.unflatten(1, (num_kv_heads, -1))
        delta_KGT = (dout_s * out[rows].to(dtype)).sum(-1).unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0)
        dscores = probs * (torch.einsum("tkgd,skd->kgts", dout_TKGD, v_s) - delta_KGT[..., None]) * softmax_scale
        dv[cols] = torch.einsum("kgts,tkgd->skd", probs, dout_TKGD).to(v.dtype)
        dk[cols] = torch.einsum("kgts,tkgd->skd", dscores, q_s.unflatten(1, (num_kv_heads, -1))).to(k.dtype)
        dq[rows] = torch.einsum("kgts,skd->tkgd", dscores, k_s).flatten(1, 2).to(q.dtype)
    return dq, dk, dv


PLAIN = Primitive("plain", _plain_forward, _plain_backward)


# -------------------- CUDA


@contextlib.contextmanager
def _deterministic_algorithms(enabled: bool):
    """Turns torch's global determinism flag on for the body: the only way to reach it in aten's flash backward."""
    if not enabled or torch.are_deterministic_algorithms_enabled():
        yield
        return
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False, warn_only=warn_only)


def _aten_window(window: int | None) -> dict[str, int]:
    """The window as aten's functions take it: keys to the left of the query's own, and to the right."""
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


def _aten_forward(q, k, v, cu_q, cu_k, max_q, max_k, causal, softmax_scale, window=None):
    sizes = (cu_q, cu_k, max_q, max_k, 0.0, causal)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, *sizes, False, scale=softmax_scale, **_aten_window(window)
    )
    return out, lse


def _aten_backward(
    dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, causal, softmax_scale, deterministic, window=None
):
    # Without dropout the random state is never read, but the schema wants tensors.
    rng_state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    unused = torch.empty(0, device=q.device)
    sizes = (cu_q, cu_k, max_q, max_k, 0.0, causal)
    with _deterministic_algorithms(deterministic):
        return torch.ops.aten._flash_attention_backward(
            dout, q, k, v, out, lse, *sizes, rng_state, unused, scale=softmax_scale, **_aten_window(window)
        )


ATEN = Primitive("aten", _aten_forward, _aten_backward)


@functools.cache
def _flash_attn_primitive() -> Primitive | None:
    """The primitive of the flash-attn package; None where it isn't installed (or was built for another torch)."""
    try:
        import flash_attn  # pyright: ignore[reportMissingImports]  # optional
        from flash_attn.flash_attn_interface import (  # pyright: ignore[reportMissingImports]
            _flash_attn_varlen_backward,
            _flash_attn_varlen_forward,
        )
    except ImportError:
        return None
    version = tuple(int(part) for part in flash_attn.__version__.split(".")[:2])
    # 2.7 split the window pair into two arguments and dropped the padded copies from the forward's results.
    is_pair = version < (2, 7)
    lse_position = 5 if is_pair else 1

    def window_arguments(window):
        sides = (-1, -1) if window is None else (window - 1, 0)
        return (sides,) if is_pair else sides

    def forward(q, k, v, cu_q, cu_k, max_q, max_k, causal, softmax_scale, window=None):
        sizes = (cu_q, cu_k, max_q, max_k, 0.0, softmax_scale, causal)
        results = _flash_attn_varlen_forward(q, k, v, *sizes, *window_arguments(window))
        return results[0], results[lse_position]

    def backward(dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, causal, softmax_scale, deterministic, window=None):
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        sizes = (cu_q, cu_k, max_q, max_k, 0.0, softmax_scale, causal)
        softcap, alibi_slopes = 0.0, None
        _flash_attn_varlen_backward(
            dout, q, k, v, out, lse, dq, dk, dv, *sizes, *window_arguments(window), softcap, alibi_slopes, deterministic
        )
        return dq, dk, dv

    return Primitive(f"flash-attn {flash_attn.__version__}", forward, backward)


def default_primitive(q: Tensor) -> Primitive:
    """The fastest primitive for q: flash-attn, else torch's flash kernels, on CUDA; plain PyTorch elsewhere."""
    if not q.is_cuda:
        return PLAIN
    return _flash_attn_primitive() or ATEN


# -------------------- autograd


class _VarlenAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k, max_q, max_k, causal, softmax_scale, deterministic, primitive, window):
        out, lse = primitive.forward(q, k, v, cu_q, cu_k, max_q, max_k, causal, softmax_scale, window)
        ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k)
        ctx.call = (max_q, max_k, causal, softmax_scale, deterministic, window)
        ctx.primitive = primitive
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, _dlse):  # pyright: ignore[reportIncompatibleMethodOverride]  # torch: *grad_outputs
        *tensors, cu_q, cu_k = ctx.saved_tensors
        grads = ctx.primitive.backward(dout.contiguous(), *tensors, cu_q, cu_k, *ctx.call)
        return (*grads, *[None] * 9)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    causal: bool = True,
    softmax_scale: float | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    primitive: Primitive | None = None,
    window: int | None = None,
):
    """Dense attention within each sequence, differentiable in q, k, v: out [Tq, H, D], with return_lse and lse [H, Tq].

    max_q, max_k are the longest lengths in tokens or any bound on them. Where a sequence has more keys than queries,
    its queries are its last tokens. `window` (with causal) limits a query to its last so many keys. lse carries no
    gradient. Which dtypes and head sizes flash kernels take is said by moba/backends/refusals.py.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if q.shape[0] == 0:
        out, lse = q.clone(), q.new_empty(q.shape[1], 0, dtype=score_dtype(q))
    else:
        primitive = primitive or default_primitive(q)
        options = (causal, scale, deterministic, primitive, window)
        out, lse = _VarlenAttention.apply(q, k, v, cu_q, cu_k, max_q, max_k, *options)
    return (out, lse) if return_lse else out
