"""The attention module of a decoder layer: projections, optional QK-norm, RoPE, and full or MoBA attention in between.

Parameters are named as in Hugging Face's Llama, Qwen and SmolLM models. MoBA adds none, so replacing `spec` switches
between full attention and MoBA, or between block sizes, without touching a weight.

Shapes: T tokens of a pack, C hidden size, H query heads, G key/value heads, D head size, N documents.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moba.attention import attention
from moba.kv_cache import KVCache, LayerCache
from moba.spec import AttentionSpec

__all__ = ["KVCache", "LayerCache", "MoBAAttention", "RMSNorm", "apply_rope"]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in x's dtype.

    The quotient is computed in float32 and rounded to x's dtype before the weight is applied: bit for bit what Hugging
    Face's Llama models do, whose weights are read and written here.
    """

    def __init__(self, size: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


def apply_rope(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """x with each pair (i, i + D/2) of every head rotated by the token's angle i: [T, H, D] in x's dtype.

    cos and sin hold the D/2 angles twice, [T, D] (Hugging Face's "rotate half" convention).
    """
    first, second = x_THD.chunk(2, dim=-1)
    quarter_turn = torch.cat([-second, first], dim=-1)
    return (x_THD * cos_TD[:, None] + quarter_turn * sin_TD[:, None]).to(x_THD.dtype)


class MoBAAttention(nn.Module):
    """Causal self-attention over packed documents, full or MoBA as `spec` says. `spec` may be replaced at any time."""

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
    ):
        super().__init__()
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads={num_heads}, num_kv_heads={num_kv_heads}: the first must be a multiple of the second"
            )
        self.head_dim = head_dim
        self.spec = spec or AttentionSpec()
        self.observer: Callable[[MoBAAttention, Tensor, Tensor, Tensor | None], None] | None = None
        """Called with (self, q, k, cu_seqlens) before each attention without a cache (moba.stats.record_routing)."""
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)
        self.q_norm = RMSNorm(head_dim, norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, norm_eps) if qk_norm else None

    def forward(
        self, x_TC: Tensor, cos_TD: Tensor, sin_TD: Tensor, cu_seqlens: Tensor | None, cache: LayerCache | None = None
    ) -> Tensor:
        """The attention output of every token, [T, C].

        cu_seqlens int32 [N+1] bounds the documents (None = one). With a cache, document i continues the cached sequence
        i, and cos, sin are those of the positions where it continues. Gradients repeat bit for bit if torch's
        deterministic algorithms are switched on.
        """
        q_THD = self.q_proj(x_TC).unflatten(-1, (-1, self.head_dim))
        k_TGD = self.k_proj(x_TC).unflatten(-1, (-1, self.head_dim))
        v_TGD = self.v_proj(x_TC).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None:
            q_THD, k_TGD = self.q_norm(q_THD), self.k_norm(k_TGD)
        q_THD, k_TGD = apply_rope(q_THD, cos_TD, sin_TD), apply_rope(k_TGD, cos_TD, sin_TD)
        if self.observer is not None and cache is None:
            self.observer(self, q_THD, k_TGD, cu_seqlens)
        if cache is not None:
            out_THD = cache.attend(q_THD, k_TGD, v_TGD, self.spec, cu_seqlens)
        else:
            deterministic = torch.are_deterministic_algorithms_enabled()
            out_THD = attention(q_THD, k_TGD, v_TGD, self.spec, cu_seqlens=cu_seqlens, deterministic=deterministic)
        return self.o_proj(out_THD.flatten(1))
