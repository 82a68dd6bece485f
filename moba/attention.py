"""The public entry to attention: checks the arguments, picks a backend, and calls it.

`moba_attention` is sparse, `full_attention` dense and causal, `sliding_attention` sees the latest tokens only, and
`attention` is whichever an AttentionSpec says. All take packed documents: q [T, H, D], k and v [S, G, D], document
bounds in `cu_seqlens`. Nothing here reads values of CUDA tensors.

Shapes: T queries, S keys, H query heads, G key/value heads, D head size, N documents.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence

import torch

from moba.checks import BackendUnavailable, check_blocks, check_documents, check_scale, check_tensors, check_window
from moba.dispatch import Output, run_full, run_moba, run_sliding
from moba.gates import select
from moba.spec import BACKENDS, AttentionSpec

__all__ = ["BackendUnavailable", "attention", "full_attention", "moba_attention", "sliding_attention"]

logger = logging.getLogger("moba")

# What `auto` tries, the fastest first.
MOBA_BACKENDS = {"cuda": ("triton", "flash", "torch")}
FULL_BACKENDS = {"cuda": ("flash", "torch")}  # sliding windows too
ELSEWHERE = ("torch",)


def moba_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    block_size: int,
    top_k: int,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    deterministic: bool = False,
    gate: str = "mean",
) -> Output:
    """MoBA attention [T, H, D] in q's dtype; with `return_lse` also the log-sum-exp [H, T] (natural, no gradient).

    q is [T, H, D], k and v are [S, G, D], H a multiple of G (grouped queries; each query head routes on its own).
    Each query attends causally to its own block of `block_size` tokens and to the top_k - 1 complete earlier blocks
    of its document whose mean key has the largest product with it (MoBA paper, section 2.2). `top_k` counts the own
    block: 1 is block-local attention, and block_size * top_k >= the length is full attention.

    Documents are [cu_seqlens[i], cu_seqlens[i+1]) (int32 [N+1]; a repeated entry is an empty document; None = one
    document). Blocks are counted from the start of the document. Where keys outnumber queries (decoding, chunked
    prefill), `cu_seqlens_k` bounds the keys, and queries are the last of their document's keys. `softmax_scale`
    defaults to D ** -0.5. With float64 inputs everything is float64; half precisions accumulate in float32.

    `backend`: "triton" (fused, CUDA), "flash" (flash-attn or torch's flash kernels, CUDA), "torch" (block-sparse, any
    device), "reference" (dense masks, for tests) or "auto": the fastest that can do it, logged once. `deterministic`
    asks for bitwise repeatable gradients; "torch" always has them. `gate`: "mean", or a control in its place
    ("local", "random", "oracle": moba/gates.py), for which "torch" and "flash" are there. Raises ValueError for bad
    arguments, BackendUnavailable (a ValueError) if the backend that was named cannot do it.
    """
    check_blocks(block_size, top_k)
    _check(q, k, v, cu_seqlens, cu_seqlens_k, softmax_scale, backend)
    cu_seqlens_k = _if_different(cu_seqlens, cu_seqlens_k, q.shape[0] == k.shape[0])
    documents = {"cu_seqlens": _on(q.device, cu_seqlens), "cu_seqlens_k": _on(q.device, cu_seqlens_k)}
    options = {"softmax_scale": softmax_scale, "deterministic": deterministic}
    longest = _longest(cu_seqlens if cu_seqlens_k is None else cu_seqlens_k, k.shape[0])
    if backend == "auto" and block_size * top_k >= longest:
        return full_attention(q, k, v, **documents, **options, return_lse=return_lse)

    if gate != "mean":
        options["selection"] = select(gate, q, k, block_size, top_k, **documents, softmax_scale=softmax_scale)

    def run(name: str):
        return run_moba(name, q, k, v, block_size=block_size, top_k=top_k, **documents, **options)

    if backend == "auto":
        out, lse = _first_available("MoBA", MOBA_BACKENDS.get(q.device.type, ELSEWHERE), run)
    else:
        out, lse = run(backend)
    return (out, lse.detach()) if return_lse else out


def full_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    deterministic: bool = False,
) -> Output:
    """Dense causal attention within each document: [T, H, D], with `return_lse` also the log-sum-exp [H, T].

    Arguments as for `moba_attention`. Backends: "flash" (varlen flash kernels, CUDA, half precision), "torch"
    (scaled_dot_product attention document by document), "reference". "triton" has no dense kernel: it stands for
    "auto" here, and is logged.
    """
    _check(q, k, v, cu_seqlens, cu_seqlens_k, softmax_scale, backend)
    cu_seqlens_k = _if_different(cu_seqlens, cu_seqlens_k, q.shape[0] == k.shape[0])
    longest = _longest_pair(cu_seqlens, cu_seqlens_k, q, k)
    documents = {"cu_seqlens": _on(q.device, cu_seqlens), "cu_seqlens_k": _on(q.device, cu_seqlens_k)}
    options = {"softmax_scale": softmax_scale, "deterministic": deterministic, "return_lse": return_lse}

    def run(name: str):
        return run_full(name, q, k, v, longest, **documents, **options)

    return _dense_by("full", backend, q.device, run)


def sliding_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    window: int,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    deterministic: bool = False,
) -> Output:
    """Attention of each query to the last `window` tokens of its document, its own included: [T, H, D], with
    `return_lse` also the log-sum-exp [H, T].

    Arguments and backends as for `full_attention`; "torch" computes tiles along the diagonal. Work and memory grow
    with T * window, and a window that covers the document is full attention.
    """
    check_window(window)
    _check(q, k, v, cu_seqlens, cu_seqlens_k, softmax_scale, backend)
    cu_seqlens_k = _if_different(cu_seqlens, cu_seqlens_k, q.shape[0] == k.shape[0])
    longest = _longest_pair(cu_seqlens, cu_seqlens_k, q, k)
    documents = {"cu_seqlens": _on(q.device, cu_seqlens), "cu_seqlens_k": _on(q.device, cu_seqlens_k)}
    documents["softmax_scale"] = softmax_scale
    if backend == "auto" and window >= longest[1]:
        return full_attention(q, k, v, **documents, return_lse=return_lse, deterministic=deterministic)

    def run(name: str):
        return run_sliding(name, q, k, v, longest, window=window, deterministic=deterministic, **documents)

    out, lse = _dense_by("sliding", backend, q.device, run)
    return (out, lse.detach()) if return_lse else out


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: AttentionSpec,
    *,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
) -> Output:
    """`full_attention`, `moba_attention` or `sliding_attention`, as `spec` says."""
    options = {
        "cu_seqlens": cu_seqlens,
        "cu_seqlens_k": cu_seqlens_k,
        "softmax_scale": softmax_scale,
        "return_lse": return_lse,
        "deterministic": deterministic,
        "backend": spec.backend,
    }
    if spec.kind == "full":
        return full_attention(q, k, v, **options)
    if spec.kind == "sliding":
        return sliding_attention(q, k, v, window=spec.window, **options)
    return moba_attention(q, k, v, block_size=spec.block_size, top_k=spec.top_k, gate=spec.gate, **options)


# -------------------- choice of a backend


def _dense_by(what: str, backend: str, device: torch.device, run: Callable[[str], Output]) -> Output:
    """The result of dense attention by the backend that was named. "triton" has none: it stands for "auto", and the
    log says so."""
    candidates = FULL_BACKENDS.get(device.type, ELSEWHERE)
    if backend == "auto":
        return _first_available(what, candidates, run)
    if backend == "triton":
        return _first_available(what, ("triton", *candidates), run)
    return run(backend)


def _first_available(what: str, candidates: Sequence[str], run: Callable[[str], Output]) -> Output:
    """The result of the first backend that can; logs once which one it was, and why not a faster one."""
    problems = []
    for name in candidates:
        try:
            result = run(name)
        except BackendUnavailable as error:
            problems.append(f"not {name!r} ({error})")
        else:
            _log_choice(what, name, "; ".join(problems))
            return result
    raise BackendUnavailable("; ".join(problems))


@functools.cache
def _log_choice(what: str, name: str, problems: str) -> None:
    if problems:
        logger.warning("%s attention runs on backend %r: %s", what, name, problems)
    else:
        logger.info("%s attention runs on backend %r", what, name)


# -------------------- arguments


def _check(q, k, v, cu_seqlens, cu_seqlens_k, softmax_scale, backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: choose one of {', '.join(BACKENDS)}")
    check_tensors(q, k, v)
    check_documents(cu_seqlens, cu_seqlens_k, q.shape[0], k.shape[0])
    check_scale(softmax_scale)


def _on(device: torch.device, bounds: torch.Tensor | None) -> torch.Tensor | None:
    return None if bounds is None else bounds.to(device, non_blocking=True)


def _if_different(bounds: torch.Tensor | None, bounds_k: torch.Tensor | None, same_total: bool) -> torch.Tensor | None:
    """bounds_k, or None where it is known without waiting that it says the same as bounds."""
    if bounds_k is None or bounds_k is bounds:
        return None
    one_document = bounds_k.numel() == 2
    same = same_total and (one_document or (bounds_k.device.type == "cpu" and torch.equal(bounds, bounds_k)))
    return None if same else bounds_k


def _longest(bounds: torch.Tensor | None, total: int) -> int:
    """Tokens of the longest document; `total`, which bounds it, where the bounds lie on a device."""
    return int(bounds.diff().max()) if bounds is not None and bounds.device.type == "cpu" else total


def _longest_pair(cu_seqlens, cu_seqlens_k, q: torch.Tensor, k: torch.Tensor) -> tuple[int, int]:
    """Bounds on a document's queries and keys."""
    bounds_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    return _longest(cu_seqlens, q.shape[0]), _longest(bounds_k, k.shape[0])
