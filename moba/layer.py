"""The attention module of a decoder layer: projections, optional QK-norm, RoPE, and the layer's attention in between.

Parameters are named as in Hugging Face's Llama, Qwen and SmolLM models. MoBA adds none, so replacing `spec` switches
between full attention and MoBA, or between block sizes, without touching a weight. Key convolution, which has weights,
and the absence of RoPE belong to the module, and stay whatever `spec` says.

Shapes: T tokens of a pack, C hidden size, H query heads, G key/value heads, D head size, N documents.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moba.attention import attend
from moba.documents import Documents
from moba.key_conv import KeyConvolution, in_dtype
from moba.kinds import AttentionSpec, Full
from moba.kv_cache import KVCache, LayerCache
from moba.sequence import SequenceAxis

__all__ = ["KVCache", "LayerCache", "MoBAAttention", "RMSNorm", "apply_rope"]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in x's dtype.

    The quotient is computed in float32 and rounded to x's dtype before the weight is applied, as in Hugging Face's
    Llama models, whose weights are read and written here: bit for bit on the CPU; CUDA's fused kernel sums the squares
    in another order.
    """

    def __init__(self, size: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x, self.weight.shape, None, self.eps)


def apply_rope(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """x with each pair (i, i + D/2) of every head rotated by the token's angle i: [T, H, D] in x's dtype.

    cos and sin hold the D/2 angles twice, [T, D] (Hugging Face's "rotate half" convention), and get no gradient. With
    float32 angles the arithmetic is float32, and only the result is rounded to x's dtype.
    """
    return _Rotation.apply(x_THD, cos_TD, sin_TD)


class _Rotation(torch.autograd.Function):
    """The gradient of a rotation is the rotation back: as few passes over memory as forward, where autograd would take
    three times as many."""

    @staticmethod
    def forward(ctx, x_THD, cos_TD, sin_TD):
        ctx.save_for_backward(cos_TD, sin_TD)
        return _rotate(x_THD, cos_TD, sin_TD)

    @staticmethod
    def backward(ctx, grad_THD):  # pyright: ignore[reportIncompatibleMethodOverride]  # torch: *grad_outputs
        cos_TD, sin_TD = ctx.saved_tensors
        return _rotate(grad_THD, cos_TD, -sin_TD), None, None


def _rotate(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    half = x_THD.shape[-1] // 2
    first, second = x_THD[..., :half], x_THD[..., half:]
    sin_T1D = sin_TD[:, None, :half]
    out_THD = x_THD * cos_TD[:, None]
    out_THD[..., :half].addcmul_(second, sin_T1D, value=-1)
    out_THD[..., half:].addcmul_(first, sin_T1D)
    return in_dtype(out_THD, x_THD.dtype)


class MoBAAttention(nn.Module):
    """Causal self-attention over packed documents; `spec` sets the kind of attention and may be replaced at any time.

    The key convolution, if any, is applied right after the projection: before the norm, which thus bounds the keys, and
    before RoPE, since a convolution of rotated keys would depend on absolute positions.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        norm_eps: float = 1e-5,
        spec: AttentionSpec | None = None,
        rope: bool = True,
        key_conv: int = 0,
    ):
        """`rope`: whether positions are encoded at all; `key_conv`: width of the key convolution, 0 for none."""
        super().__init__()
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads={num_heads}, num_kv_heads={num_kv_heads}: the first must be a multiple of the second"
            )
        self.head_dim = head_dim
        self.spec = spec or Full()
        self.observer: Callable[[MoBAAttention, Tensor, Tensor, Tensor, Documents], None] | None = None
        """Called with (self, q, k, v, documents) before each attention without a cache (moba.stats.record_routing)."""
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)
        self.q_norm = RMSNorm(head_dim, norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, norm_eps) if qk_norm else None
        self.k_conv = KeyConvolution(num_kv_heads * head_dim, key_conv) if key_conv else None
        self.rope = rope
        self.axis: SequenceAxis | None = None
        """The processes that share the sequence, if there are several; tokens are then those of this one's slice, and
        documents those of the whole pack."""

    def forward(
        self, x_TC: Tensor, cos_TD: Tensor, sin_TD: Tensor, documents: Documents, cache: LayerCache | None = None
    ) -> Tensor:
        """Returns the attention output of every token, [T, C].

        Without a cache the documents have as many queries as keys. With a cache, document i continues the cached
        sequence i, and cos and sin are those of the continued positions. Gradients are bitwise reproducible if torch's
        deterministic algorithms are switched on.
        """
        qkv = self.project(x_TC, cos_TD, sin_TD, self.offsets(documents), documents, cache)
        return self.o_proj(self.attend(*qkv, documents, cache).flatten(1))

    @property
    def exchanges_keys(self) -> bool:
        """True if keys of other processes have to be known before attention."""
        return self.axis is not None and self.k_conv is not None

    def offsets(self, documents: Documents) -> Tensor | None:
        """What the key convolution has to know of the documents, int64 [T], and of the few tokens before this slice;
        None without one."""
        if self.k_conv is None or self.axis is None:
            return None if self.k_conv is None else documents.offsets()
        return self.axis.own(documents.offsets(), before=self.k_conv.reach)

    def project(
        self,
        x_TC: Tensor,
        cos_TD: Tensor,
        sin_TD: Tensor,
        offset_T: Tensor | None = None,
        documents: Documents | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q [T, H, D] and k, v [T, G, D], convolved, normed and rotated.

        Without a cache a function of tensors with a row per token alone (`offset_T` is of `offsets`), so it can be
        compiled. With a cache the convolution goes on from the keys that it has seen, and over several processes from
        those of the slice before: both need the documents.
        """
        every = slice(None)
        return self._project(x_TC, cos_TD, sin_TD, offset_T, documents, cache, every, every)

    def _project(
        self,
        x_TC: Tensor,
        cos_TD: Tensor,
        sin_TD: Tensor,
        offset_T: Tensor | None,
        documents: Documents | None,
        cache: LayerCache | None,
        query_rows: slice,
        key_rows: slice,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`project` with some rows of the projections, those of whole heads."""
        k_TC = _rows_of(self.k_proj, x_TC, key_rows)
        if self.k_conv is not None:
            if cache is not None and documents is not None:
                k_TC = cache.convolve(self.k_conv, k_TC, documents)
            elif self.axis is not None and documents is not None:
                reach, total = self.k_conv.reach, documents.num_keys
                joined_TC = self.k_conv(self.axis.halo(k_TC, reach, total), offset_T, key_rows)
                k_TC = self.axis.without_halo(joined_TC, reach, total)
            else:
                k_TC = self.k_conv(k_TC, offset_T, key_rows)
        q_THD = _rows_of(self.q_proj, x_TC, query_rows).unflatten(-1, (-1, self.head_dim))
        k_TGD = k_TC.unflatten(-1, (-1, self.head_dim))
        v_TGD = _rows_of(self.v_proj, x_TC, key_rows).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q_THD, k_TGD = self.q_norm(q_THD), self.k_norm(k_TGD)
        if self.rope:
            q_THD, k_TGD = apply_rope(q_THD, cos_TD, sin_TD), apply_rope(k_TGD, cos_TD, sin_TD)
        return q_THD, k_TGD, v_TGD

    def head_groups(self, number: int) -> list[slice]:
        """Key/value heads in at most `number` groups of even size; a process of several that share the sequence has
        query heads of each. With the gate `shared`, which must see all query heads of a key/value head, they are one
        group there."""
        num_kv = self.k_proj.out_features // self.head_dim
        queries_each = self.q_proj.out_features // self.k_proj.out_features
        least = 1 if self.axis is None else -(-self.axis.least_heads // queries_each)
        number = max(1, min(number, num_kv // least))
        if self.axis is not None and self.spec.routing is not None and self.spec.routing.gate == "shared":
            number = 1
        return [slice(num_kv * i // number, num_kv * (i + 1) // number) for i in range(number)]

    def of_heads(self, x_TC: Tensor, cos_TD: Tensor, sin_TD: Tensor, documents: Documents, kv_heads: slice) -> Tensor:
        """What these key/value heads, and the query heads that read them, add to `forward`'s output, [T, C]."""
        queries_each = self.q_proj.out_features // self.k_proj.out_features
        rows = slice(kv_heads.start * self.head_dim, kv_heads.stop * self.head_dim)
        query_rows = slice(rows.start * queries_each, rows.stop * queries_each)
        qkv = self._project(x_TC, cos_TD, sin_TD, self.offsets(documents), documents, None, query_rows, rows)
        out_TC = self.attend(*qkv, documents).flatten(1)
        return F.linear(out_TC, self.o_proj.weight[:, query_rows])

    def attend(
        self, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, documents: Documents, cache: LayerCache | None = None
    ) -> Tensor:
        """[T, H, D]: attention as `spec` says; what depends on the documents, the spec or the cache happens here."""
        if cache is not None:
            return cache.attend(q_THD, k_TGD, v_TGD, self.spec, documents)
        deterministic = torch.are_deterministic_algorithms_enabled()

        def attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
            return attend(q, k, v, self.spec, documents, deterministic=deterministic)[0]

        observer = None if self.observer is None else functools.partial(self.observer, self)
        if self.axis is not None:
            return self.axis.attend(q_THD, k_TGD, v_TGD, documents, attention, observer)
        if observer is not None:
            observer(q_THD, k_TGD, v_TGD, documents)
        return attention(q_THD, k_TGD, v_TGD, documents)


def _rows_of(linear: nn.Linear, x_TC: Tensor, rows: slice) -> Tensor:
    """What some rows of a projection make of x; all of them by the module itself, whose hooks an engine relies on."""
    if rows == slice(None):
        return linear(x_TC)
    return F.linear(x_TC, linear.weight[rows], None if linear.bias is None else linear.bias[rows])
