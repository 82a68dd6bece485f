"""A call of attention on one backend by its name; arguments are checked and lie on one device by then.

Backends are imported when first used, so that a kernel's package is needed by those alone who ask for it.

Shapes: T queries, S keys, H query heads, G key/value heads, D head size, N documents.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moba.checks import BackendUnavailable
from moba.reference import reference_attention, reference_sliding

# Full attention through the block-sparse code (for its log-sum-exp): its blocks.
FULL_BLOCK = 1024

Output = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def run_moba(name: str, q, k, v, *, deterministic: bool, **arguments) -> tuple[torch.Tensor, torch.Tensor]:
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


def run_full(
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


def run_sliding(
    name: str, q, k, v, longest: tuple[int, int], *, deterministic: bool, **arguments
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of a sliding window by the backend of that name; `longest` as for `run_full`."""
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


def _need_cuda(name: str, q: torch.Tensor) -> None:
    if q.device.type != "cuda":
        raise BackendUnavailable(f"backend={name!r} needs CUDA tensors but q is on {q.device}: use backend='torch'")


def _bounds(bounds: torch.Tensor | None, total: int, device: torch.device) -> torch.Tensor:
    """The bounds, or those of one document, int32."""
    return torch.arange(2, device=device, dtype=torch.int32) * total if bounds is None else bounds
