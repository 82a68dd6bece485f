"""The public entry to attention: checks the arguments, picks a backend, and calls it.

`attend` is the one way in: any kind of attention over the documents of a pack. `moba_attention` is sparse,
`full_attention` dense and causal, `sliding_attention` sees the latest tokens only, for those who have `cu_seqlens`. All
take packed documents: q [T, H, D], k and v [S, G, D]. Nothing here reads values of CUDA tensors. `prepare` does early
what the first calls would have to wait for.

Shapes: T queries, S keys, H query heads, G key/value heads, D head size, N documents.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch

from moba.backends.choice import choose, log_choice
from moba.backends.refusals import BackendUnavailable, shortest_on_cudnn
from moba.checks import check_blocks, check_scale, check_selection, check_tensors, check_window
from moba.documents import Documents
from moba.kinds import BACKENDS, AttentionSpec, Full, Moba, QueryShape, Sliding

__all__ = ["BackendUnavailable", "Output", "attend", "full_attention", "moba_attention", "sliding_attention"]

Output = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kind: AttentionSpec,
    documents: Documents,
    *,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    selection: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns (attention of this kind [T, H, D] in q's dtype, log-sum-exp [H, T] without gradient or None).

    q is [T, H, D], k and v are [S, G, D] on the device of `documents`. The second is None unless `return_lse`.
    `selection`, for kinds that select blocks: as for `moba_attention`. Raises ValueError for tensors that do not fit,
    BackendUnavailable (a ValueError) if the kind's backend does not support the call.
    """
    check_tensors(q, k, v)
    check_scale(softmax_scale)
    assert (documents.num_queries, documents.num_keys) == (q.shape[0], k.shape[0]), (documents, q.shape, k.shape)
    options: dict[str, Any] = {}
    if selection is None:
        kind = kind.at(documents.longest_k)
    else:
        check_selection(selection, q, kind, documents)
        options["selection"] = selection
    shape = shape_of(q, k, softmax_scale, deterministic)
    choice = choose(kind, shape, documents)
    log_choice(kind.name, choice)
    options |= {"softmax_scale": softmax_scale, "deterministic": deterministic, "return_lse": return_lse}
    out, lse = kind.run(choice.backend, q, k, v, documents, **options)
    return out, lse.detach() if return_lse and lse is not None else None


def shape_of(
    q: torch.Tensor, k: torch.Tensor, softmax_scale: float | None = None, deterministic: bool = False
) -> QueryShape:
    """What backends have to know of these tensors, and of how they are to be computed."""
    return QueryShape(
        device=q.device.type,
        dtype=str(q.dtype).removeprefix("torch."),
        num_tokens=q.shape[0],
        num_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        head_dim=q.shape[2],
        softmax_scale=softmax_scale,
        deterministic=deterministic or torch.are_deterministic_algorithms_enabled(),
        has_cudnn=q.device.type == "cuda" and _has_cudnn(q.device),
    )


@functools.cache
def _has_cudnn(device: torch.device) -> bool:
    return torch.backends.cudnn.is_available() and torch.cuda.get_device_capability(device) >= (8, 0)


def prepare(kinds: Iterable[AttentionSpec], q: torch.Tensor, k: torch.Tensor, longest: int) -> int:
    """Builds the plans of cuDNN that these kinds may need for documents of up to `longest` tokens, so that no later
    call waits for them (some 0.1 s each); returns how many. Nothing where cuDNN would not be chosen.

    q [., H, D] and k [., G, D] give heads, head size, dtype and device.
    """
    lengths = planned_lengths(kinds, shape_of(q, k), longest)
    if lengths:
        from moba.backends.cudnn import build_plans

        build_plans(q, k, lengths)
    return len(lengths)


def planned_lengths(kinds: Iterable[AttentionSpec], q: QueryShape, longest: int) -> list[int]:
    """The padded lengths at which cuDNN computes documents of up to `longest` tokens for any of these kinds."""
    from moba.backends.cudnn import padded_lengths

    kinds, found = set(kinds), []
    first = shortest_on_cudnn(q.head_dim)
    for padded in padded_lengths(longest, first):
        # The shortest document that is computed at this length: what is dense for it alone is enough.
        documents = Documents.from_lengths([first])
        at = {kind.at(first) for kind in kinds}
        if any(choose(kind, q, documents).backend == "cudnn" for kind in at):
            found.append(padded)
        first = padded + 1
    return found


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
    first_blocks: int = 0,
    selection: torch.Tensor | None = None,
) -> Output:
    """Returns MoBA attention [T, H, D] in q's dtype; with `return_lse` also the log-sum-exp [H, T] (natural logarithm,
    no gradient).

    q is [T, H, D], k and v are [S, G, D], H a multiple of G (grouped-query attention; each query head selects its own
    blocks). Each query attends causally to its own block of `block_size` tokens and to the top_k - 1 complete earlier
    blocks of its document whose mean key has the largest dot product with the query (MoBA paper, section 2.2). `top_k`
    includes the query's own block: 1 is block-local attention, and block_size * top_k >= length is full attention. It
    also includes the `first_blocks` blocks at the start of the document, which are always attended to (0: none, as in
    the paper).

    Documents are [cu_seqlens[i], cu_seqlens[i+1]) (int32 [N+1]; a repeated entry is an empty document; None = one
    document). Blocks start at the first token of the document. If there are more keys than queries (decoding, chunked
    prefill), `cu_seqlens_k` has the bounds of the keys, and the queries are the last tokens of their document.
    `softmax_scale` defaults to D ** -0.5. With float64 inputs everything is float64; half precisions accumulate in
    float32.

    `backend`: "triton" (fused, CUDA), "flash" (flash-attn or torch's flash kernels, CUDA), "torch" (block-sparse, any
    device), "reference" (dense masks, for tests) or "auto": the fastest that supports the call, logged once.
    `deterministic` requests bitwise reproducible gradients; "torch" always has them. `gate`: "mean", or
    what replaces it (moba/gates.py), on all backends but "reference".

    `selection`, int32 [H, T, top_k] in the form of `moba.route`, replaces routing on all backends but "reference": the
    blocks that were recorded elsewhere, for example where a text was sampled. Its values are checked on the CPU only;
    on CUDA, blocks that a query cannot have give wrong results or fail. Raises ValueError for bad arguments,
    BackendUnavailable (a ValueError) if the requested backend does not support the call.
    """
    check_blocks(block_size, top_k)
    _check_backend(backend)
    kind = Moba(block_size, top_k, gate=gate, first_blocks=first_blocks, backend=backend)
    bounds = (cu_seqlens, cu_seqlens_k)
    return _packed(q, k, v, kind, *bounds, softmax_scale, return_lse, deterministic, selection)


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
    """Returns dense causal attention within each document, [T, H, D]; with `return_lse` also the log-sum-exp [H, T].

    Arguments as for `moba_attention`. Backends: "cudnn" (CUDA, half precision: documents of 4K tokens or more one by
    one, 8K at head sizes up to 64, shorter ones on varlen flash; needs the bounds on the CPU; gradients are not bitwise
    reproducible), "flash" (varlen flash kernels, CUDA, half precision), "torch" (scaled_dot_product_attention document
    by document), "reference". "triton" has no dense kernel: it means "auto" here, which is logged.
    """
    _check_backend(backend)
    kind = Full(backend=backend)
    return _packed(q, k, v, kind, cu_seqlens, cu_seqlens_k, softmax_scale, return_lse, deterministic)


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
    """Returns attention of each query to the last `window` tokens of its document, including itself, [T, H, D]; with
    `return_lse` also the log-sum-exp [H, T].

    Arguments and backends as for `full_attention`; "torch" computes tiles along the diagonal. Work and memory grow
    with T * window, and a window that covers the document is full attention.
    """
    check_window(window)
    _check_backend(backend)
    kind = Sliding(window, backend=backend)
    return _packed(q, k, v, kind, cu_seqlens, cu_seqlens_k, softmax_scale, return_lse, deterministic)


def _packed(
    q, k, v, kind: AttentionSpec, cu_seqlens, cu_seqlens_k, softmax_scale, return_lse, deterministic, selection=None
) -> Output:
    """`attend` over the documents of these bounds; the output alone unless `return_lse`."""
    check_tensors(q, k, v)
    documents = Documents.from_bounds(cu_seqlens, cu_seqlens_k, q.shape[0], k.shape[0], q.device)
    options = {"softmax_scale": softmax_scale, "return_lse": return_lse, "deterministic": deterministic}
    out, lse = attend(q, k, v, kind, documents, **options, selection=selection)
    return out if lse is None else (out, lse)


def _check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: choose one of {', '.join(BACKENDS)}")
