"""Checks of what callers hand to the attention functions: one ValueError naming argument, value and what would work.

Shapes and dtypes are checked everywhere. The values of `cu_seqlens` are checked where they lie in host memory; on
CUDA reading them would make the host wait for the device at every layer.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from moba.documents import Documents
    from moba.kinds.base import AttentionSpec


def check_blocks(block_size: int, top_k: int) -> None:
    """Raises ValueError unless both are integers of at least 1."""
    _check_counts(block_size=block_size, top_k=top_k)


def check_window(window: int) -> None:
    """Raises ValueError unless it is an integer of at least 1."""
    _check_counts(window=window)


def _check_counts(**values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r}: needs an integer of at least 1")


def check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None = None) -> None:
    """Raises ValueError unless q is [T, H, D], k (and v) [S, G, D], H a multiple of G, of one dtype and device."""
    tensors = {"q": q, "k": k} if v is None else {"q": q, "k": k, "v": v}
    for name, x in tensors.items():
        if x.dim() != 3:
            raise ValueError(f"{name} has shape {list(x.shape)}: needs three dimensions, [tokens, heads, head size]")
        if not x.is_floating_point():
            raise ValueError(f"{name} has dtype {x.dtype}: needs float32, bfloat16, float16 or float64")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device} but q is {q.dtype} on {q.device}: they must agree")
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"k has head size {k.shape[2]} but q has {q.shape[2]}: they must agree")
    if k.shape[1] < 1 or q.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise ValueError(f"q has {q.shape[1]} heads and k has {k.shape[1]}: q's must be a multiple of k's")
    if v is not None and v.shape != k.shape:
        raise ValueError(f"v has shape {list(v.shape)} but k has {list(k.shape)}: they must agree")


def check_scale(softmax_scale: float | None) -> None:
    """Raises ValueError unless it is None or a finite number."""
    if softmax_scale is not None and not (isinstance(softmax_scale, int | float) and math.isfinite(softmax_scale)):
        raise ValueError(f"softmax_scale={softmax_scale!r}: needs a finite number, or None for head size ** -0.5")


def check_selection(selection: torch.Tensor, q: torch.Tensor, kind: AttentionSpec, documents: Documents) -> None:
    """Raises ValueError unless it is int32 [H, T, top_k] on q's device for a kind that picks blocks and a backend that
    takes it, and where it lies in host memory of blocks that are there, the query's own last."""
    routing = kind.routing
    if routing is None or kind.backend == "reference":
        raise ValueError(f"selection with {kind}, backend={kind.backend!r}: for MoBA on auto, triton, flash or torch")
    shape = [q.shape[1], q.shape[0], routing.top_k]
    if selection.dtype != torch.int32 or list(selection.shape) != shape or selection.device != q.device:
        raise ValueError(
            f"selection is {selection.dtype} {list(selection.shape)} on {selection.device}: needs torch.int32 {shape} "
            f"([heads, tokens, top_k]) on {q.device}, as moba.route gives it"
        )
    if selection.device.type == "cpu" and selection.numel():
        layout = documents.layout(routing.block_size)
        own_T = (layout.query_block_T - layout.query_first_block_T).to(torch.int32)
        history, own = selection[:, :, :-1], selection[:, :, -1]
        ascending = history.sort(dim=-1).values
        is_twice = (ascending.diff(dim=-1) == 0) & (ascending[:, :, 1:] >= 0)
        wrong = (own != own_T).any() | (history < -1).any() | (history >= own_T[:, None]).any() | is_twice.any()
        if bool(wrong):
            raise ValueError(
                "selection has blocks that a query cannot have: its own block last, before it different blocks from "
                "its document's past, or -1"
            )


def check_documents(
    cu_seqlens: torch.Tensor | None, cu_seqlens_k: torch.Tensor | None, num_queries: int, num_keys: int
) -> None:
    """Raises ValueError unless the bounds are int32 [N+1] and, where they lie in host memory, fit T and S tokens."""
    if cu_seqlens is None and cu_seqlens_k is not None:
        raise ValueError(
            "cu_seqlens_k is given but cu_seqlens is not: give both, such as cu_seqlens=[0, T] for one document"
        )
    if cu_seqlens_k is None and num_keys != num_queries:
        raise ValueError(
            f"k has {num_keys} tokens but q has {num_queries}: give cu_seqlens and cu_seqlens_k where they differ"
        )
    for name, bounds, total in (("cu_seqlens", cu_seqlens, num_queries), ("cu_seqlens_k", cu_seqlens_k, num_keys)):
        if bounds is not None:
            _check_bounds(name, bounds, total)
    if cu_seqlens is not None and cu_seqlens_k is not None:
        _check_pair(cu_seqlens, cu_seqlens_k)


def _check_bounds(name: str, bounds: torch.Tensor, total: int) -> None:
    if bounds.dtype != torch.int32 or bounds.dim() != 1 or bounds.numel() < 2:
        raise ValueError(
            f"{name} has dtype {bounds.dtype} and shape {list(bounds.shape)}: "
            f"needs int32 [documents + 1], such as [0, {total}]"
        )
    if bounds.device.type != "cpu":
        return
    values = bounds.tolist()
    if values[0] != 0 or values[-1] != total:
        raise ValueError(
            f"{name} goes from {values[0]} to {values[-1]}: must start at 0 and end at {total}, the number of tokens"
        )
    if any(b < a for a, b in pairwise(values)):
        raise ValueError(f"{name}={_shorten(values)}: must not decrease (a repeated entry is an empty document)")


def _check_pair(cu_seqlens: torch.Tensor, cu_seqlens_k: torch.Tensor) -> None:
    if cu_seqlens.numel() != cu_seqlens_k.numel():
        raise ValueError(
            f"cu_seqlens_k describes {cu_seqlens_k.numel() - 1} documents but cu_seqlens {cu_seqlens.numel() - 1}: "
            "they must agree"
        )
    if cu_seqlens.device != cu_seqlens_k.device:
        raise ValueError(
            f"cu_seqlens is on {cu_seqlens.device}, cu_seqlens_k on {cu_seqlens_k.device}: they must agree"
        )
    if cu_seqlens.device.type == "cpu":
        more_queries = (cu_seqlens.diff() > cu_seqlens_k.diff()).nonzero().flatten().tolist()
        if more_queries:
            raise ValueError(
                f"cu_seqlens gives documents {_shorten(more_queries)} more queries than cu_seqlens_k gives them keys: "
                "queries are the last of their document's keys, so there must be at least as many keys"
            )


def _shorten(values: list[int]) -> str:
    return str(values) if len(values) <= 12 else f"{values[:12]}...".replace("]...", ", ...]")
