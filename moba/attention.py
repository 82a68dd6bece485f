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
import torch.nn.functional as F

from moba.checks import BackendUnavailable, check_blocks, check_documents, check_scale, check_tensors, check_window
from moba.gates import select
from moba.reference import reference_attention, reference_sliding
from moba.spec import BACKENDS, AttentionSpec

__all__ = ["BackendUnavailable", "attention", "full_attention", "moba_attention", "sliding_attention"]

logger = logging.getLogger("moba")

# What `auto` tries, the fastest first.
MOBA_BACKENDS = {"cuda": ("triton", "flash", "torch")}
FULL_BACKENDS = {"cuda": ("flash", "torch")}  # sliding windows too
ELSEWHERE = ("torch",)

# Full attention through the block-sparse code (for its log-sum-exp): its blocks.
FULL_BLOCK = 1024

Output = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


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
        return _run_moba(name, q, k, v, block_size=block_size, top_k=top_k, **documents, **options)

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
        return _run_full(name, q, k, v, longest, **documents, **options)

    candidates = FULL_BACKENDS.get(q.device.type, ELSEWHERE)
    if backend in ("auto", "triton"):
        return _first_available("full", candidates if backend == "auto" else ("triton", *candidates), run)
    return run(backend)


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
        return _run_sliding(name, q, k, v, longest, window=window, deterministic=deterministic, **documents)

    candidates = FULL_BACKENDS.get(q.device.type, ELSEWHERE)
    if backend in ("auto", "triton"):
        candidates = candidates if backend == "auto" else ("triton", *candidates)
        out, lse = _first_available("sliding", candidates, run)
    else:
        out, lse = run(backend)
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


# -------------------- backends


def _run_moba(name: str, q, k, v, *, deterministic: bool, **arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) by the backend of that name; raises BackendUnavailable."""
    if "selection" in arguments and name in ("reference", "triton"):
        raise BackendUnavailable(f"backend={name!r} knows MoBA's own gate alone: use 'torch' or 'flash' for another")
    if name == "reference":
        return reference_attention(q, k, v, return_lse=True, **arguments)
    if name == "torch":
        from moba.backends.torch_blocks import moba_torch

        return moba_torch(q, k, v, **arguments)
    if name == "flash":
        _need_cuda(name, q)
        from moba.backends.flash import moba_flash

        return moba_flash(q, k, v, deterministic=deterministic, **arguments)
    try:
        from moba.backends.triton_attention import moba_triton
    except ImportError as error:
        raise BackendUnavailable(
            f"backend='triton' needs the triton package ({error}): use 'flash' on CUDA or 'torch' on any device"
        ) from error
    return moba_triton(q, k, v, deterministic=deterministic, **arguments)


def _run_full(
    name: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    longest: tuple[int, int],
    *,
    cu_seqlens: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    softmax_scale: float | None,
    deterministic: bool,
    return_lse: bool,
) -> Output:
    """Full attention by the backend of that name; `longest`: bounds on a document's queries and keys."""
    documents = {"cu_seqlens": cu_seqlens, "cu_seqlens_k": cu_seqlens_k, "softmax_scale": softmax_scale}
    if name == "triton":
        raise BackendUnavailable("there is no dense kernel")
    if name == "flash":
        _need_cuda(name, q)
        from moba.backends.varlen import varlen_attention

        cu_q = _bounds(cu_seqlens, q.shape[0], q.device)
        cu_k = cu_q if cu_seqlens_k is None else cu_seqlens_k
        return varlen_attention(q, k, v, cu_q, cu_k, *longest, True, softmax_scale, deterministic, return_lse)
    if name == "reference":
        out, lse = reference_attention(q, k, v, block_size=max(1, longest[1]), top_k=1, return_lse=True, **documents)
        return (out, lse.detach()) if return_lse else out
    one_query = cu_seqlens_k is not None and longest[0] == 1
    nondeterministic = deterministic and q.device.type == "cuda"
    if return_lse or nondeterministic or (cu_seqlens_k is not None and not one_query):
        # What scaled_dot_product_attention lacks, the block-sparse code has; with every block selected it is dense.
        from moba.backends.torch_blocks import moba_torch

        num_blocks = max(1, -(-longest[1] // FULL_BLOCK))
        out, lse = moba_torch(q, k, v, block_size=FULL_BLOCK, top_k=num_blocks, **documents)
        return (out, lse) if return_lse else out
    return _dense_documents(q, k, v, is_causal=not one_query, **documents)


def _run_sliding(
    name: str, q, k, v, longest: tuple[int, int], *, deterministic: bool, **arguments
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of a sliding window by the backend of that name; `longest` as for `_run_full`."""
    if name == "triton":
        raise BackendUnavailable("there is no sliding-window kernel")
    if name == "reference":
        return reference_sliding(q, k, v, return_lse=True, **arguments)
    if name == "torch":
        from moba.backends.torch_sliding import sliding_torch

        return sliding_torch(q, k, v, **arguments)
    _need_cuda(name, q)
    from moba.backends.varlen import varlen_attention

    cu_q = _bounds(arguments["cu_seqlens"], q.shape[0], q.device)
    cu_k = cu_q if arguments["cu_seqlens_k"] is None else arguments["cu_seqlens_k"]
    options = {"softmax_scale": arguments["softmax_scale"], "window": arguments["window"]}
    return varlen_attention(q, k, v, cu_q, cu_k, *longest, deterministic=deterministic, return_lse=True, **options)


def _dense_documents(q, k, v, *, cu_seqlens, cu_seqlens_k, softmax_scale, is_causal: bool) -> torch.Tensor:
    """scaled_dot_product_attention of one document after the other; on CUDA waits for the device for their lengths."""
    bounds = _bounds(cu_seqlens, q.shape[0], q.device).tolist()
    bounds_k = bounds if cu_seqlens_k is None else cu_seqlens_k.tolist()
    outputs = [q[:0]]
    for i in range(len(bounds) - 1):
        if bounds[i] < bounds[i + 1]:
            q_1HTD = q[bounds[i] : bounds[i + 1]].transpose(0, 1)[None]
            k_1GSD, v_1GSD = (x[bounds_k[i] : bounds_k[i + 1]].transpose(0, 1)[None] for x in (k, v))
            grouped = q.shape[1] != k.shape[1]
            out_1HTD = F.scaled_dot_product_attention(
                q_1HTD, k_1GSD, v_1GSD, is_causal=is_causal, scale=softmax_scale, enable_gqa=grouped
            )
            outputs.append(out_1HTD[0].transpose(0, 1))
    return torch.cat(outputs)


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


def _need_cuda(name: str, q: torch.Tensor) -> None:
    if q.device.type != "cuda":
        raise BackendUnavailable(f"backend={name!r} needs CUDA tensors but q is on {q.device}: use backend='torch'")


def _on(device: torch.device, bounds: torch.Tensor | None) -> torch.Tensor | None:
    return None if bounds is None else bounds.to(device, non_blocking=True)


def _if_different(bounds: torch.Tensor | None, bounds_k: torch.Tensor | None, same_total: bool) -> torch.Tensor | None:
    """bounds_k, or None where it is known without waiting that it says the same as bounds."""
    if bounds_k is None or bounds_k is bounds:
        return None
    one_document = bounds_k.numel() == 2
    same = same_total and (one_document or (bounds_k.device.type == "cpu" and torch.equal(bounds, bounds_k)))
    return None if same else bounds_k


def _bounds(bounds: torch.Tensor | None, total: int, device: torch.device) -> torch.Tensor:
    """The bounds, or those of one document, int32."""
    return torch.arange(2, device=device, dtype=torch.int32) * total if bounds is None else bounds


def _longest(bounds: torch.Tensor | None, total: int) -> int:
    """Tokens of the longest document; `total`, which bounds it, where the bounds lie on a device."""
    return int(bounds.diff().max()) if bounds is not None and bounds.device.type == "cpu" else total


def _longest_pair(cu_seqlens, cu_seqlens_k, q: torch.Tensor, k: torch.Tensor) -> tuple[int, int]:
    """Bounds on a document's queries and keys."""
    bounds_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    return _longest(cu_seqlens, q.shape[0]), _longest(bounds_k, k.shape[0])
