"""Random packs for the attention tests: hypothesis strategies, tensors, and comparison of outputs and gradients."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from moba.attention import attend
from moba.documents import Documents

HEADS = [(1, 1), (2, 2), (2, 1), (4, 2), (6, 2), (3, 1)]


@dataclass(frozen=True)
class Pack:
    """Documents of `lengths` queries, each with `extra` more keys before its first query, and how MoBA treats them."""

    lengths: list[int]
    block_size: int
    top_k: int
    heads: tuple[int, int] = (2, 1)
    extra: list[int] | None = None
    seed: int = 0
    head_dim: int = 8
    dtype: torch.dtype = torch.float64
    quantised: bool = False
    """Small integers instead of normal numbers: all sums are exact, and scores often equal."""
    first_blocks: int = 0
    options: dict = field(init=False)

    def __post_init__(self):
        cu_seqlens_k = None if self.extra is None else bounds([a + b for a, b in zip(self.lengths, self.extra)])
        options = {"block_size": self.block_size, "top_k": self.top_k}
        options |= {"first_blocks": self.first_blocks} if self.first_blocks else {}
        object.__setattr__(
            self, "options", {**options, "cu_seqlens": bounds(self.lengths), "cu_seqlens_k": cu_seqlens_k}
        )

    def tensors(self, requires_grad=False):
        """q, k, v."""
        generator = torch.Generator().manual_seed(self.seed)
        num_queries, num_keys = sum(self.lengths), sum(self.lengths) + sum(self.extra or [])
        num_heads, num_kv_heads = self.heads

        def tensor(num_tokens, heads):
            shape = (num_tokens, heads, self.head_dim)
            if self.quantised:
                x = torch.randint(-1, 2, shape, generator=generator)
            else:
                x = torch.randn(shape, generator=generator, dtype=torch.float64)
            return x.to(self.dtype).requires_grad_(requires_grad)

        return tensor(num_queries, num_heads), tensor(num_keys, num_kv_heads), tensor(num_keys, num_kv_heads)


def bounds(lengths) -> torch.Tensor:
    """int32 [N+1] document bounds of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def documents_of(q, k, cu_seqlens=None, cu_seqlens_k=None) -> Documents:
    """The documents of these bounds."""
    return Documents.from_bounds(cu_seqlens, cu_seqlens_k, q.shape[0], k.shape[0], q.device)


def by_bounds(function):
    """A backend's function, with the bounds of the documents as the public functions take them."""

    def call(q, k, v, *, cu_seqlens=None, cu_seqlens_k=None, **options):
        return function(q, k, v, documents_of(q, k, cu_seqlens, cu_seqlens_k), **options)

    return call


def attention(q, k, v, kind, *, cu_seqlens=None, cu_seqlens_k=None, **options):
    """`attend` over the documents of these bounds: the output, with return_lse also the log-sum-exp."""
    out, lse = attend(q, k, v, kind, documents_of(q, k, cu_seqlens, cu_seqlens_k), **options)
    return out if lse is None else (out, lse)


def packs(first: bool = False, **fixed) -> st.SearchStrategy[Pack]:
    """Packs with empty documents, ragged tails, documents shorter than a block, some with more keys than queries;
    `first`: with first_blocks."""

    @st.composite
    def build(draw):
        lengths = draw(st.lists(st.one_of(st.just(0), st.integers(1, 48)), min_size=1, max_size=4))
        extra = draw(st.none() | st.lists(st.integers(0, 24), min_size=len(lengths), max_size=len(lengths)))
        block_size = draw(st.sampled_from([1, 2, 4, 8]) if fixed.get("quantised") else st.integers(1, 12))
        values = {
            "lengths": lengths,
            "extra": extra,
            "block_size": block_size,
            "top_k": draw(st.integers(2 if first else 1, 5)),
            "heads": draw(st.sampled_from(HEADS)),
            "seed": draw(st.integers(0, 999)),
        }
        if first:
            values["first_blocks"] = draw(st.integers(1, {**values, **fixed}["top_k"] - 1))
        return Pack(**{**values, **fixed})

    return build()


def with_gradients(function, q, k, v, **options):
    """(out, lse, dq, dk, dv) of function(q, k, v, **options) -> (out, lse) under a fixed random cotangent."""
    out, lse = function(q, k, v, **options)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
    return out, lse, *torch.autograd.grad(out, (q, k, v), cotangent, materialize_grads=True)


def assert_same(got, want, **tolerance):
    """Compares two results of `with_gradients` by name."""
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def plain_full_attention(q, k, v, lengths, lengths_k=None):
    """Causal attention of each document by a masked softmax, last query at the last key: [T, H, D]."""
    outputs, start, start_k = [q[:0]], 0, 0
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    for length, length_k in zip(lengths, lengths_k or lengths):
        q_d, k_d, v_d = q[start : start + length], k[start_k : start_k + length_k], v[start_k : start_k + length_k]
        scores = torch.einsum("thd,shd->hts", q_d, k_d) * q.shape[-1] ** -0.5
        visible = torch.ones(length, length_k, dtype=torch.bool).tril(length_k - length)
        outputs.append(torch.einsum("hts,shd->thd", scores.masked_fill(~visible, float("-inf")).softmax(-1), v_d))
        start, start_k = start + length, start_k + length_k
    return torch.cat(outputs)


def drops_and_keeps(selection) -> tuple[bool, bool]:
    """(some query leaves out a past block, some query picks one) in a selection [H, T, K]."""
    picked = (selection[..., :-1] >= 0).sum(-1)
    return bool((picked < selection[..., -1]).any()), bool((picked > 0).any())


class LargestTensor(TorchDispatchMode):
    """Records the most elements of any operator's result."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return result
