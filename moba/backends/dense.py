"""Full attention, and sliding windows on CUDA, document by document: cuDNN, varlen flash, or torch's own.

Shapes: T queries, S keys, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from moba.backends.cudnn import cudnn_attention
from moba.backends.torch_blocks import moba_torch
from moba.backends.varlen import varlen_attention
from moba.documents import Documents

# Full attention through the block-sparse code (for its log-sum-exp): its blocks.
FULL_BLOCK = 1024


def dense_cudnn(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, *, softmax_scale: float | None, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """(out [T, H, D], log-sum-exp [H, T] without gradient, or None): long documents by cuDNN, short ones by varlen
    flash."""
    assert documents.lengths is not None and documents.cu_seqlens_k is None, documents
    # Its plans are for strides as well.
    q, k, v = (x.contiguous() for x in (q, k, v))
    out, lse = cudnn_attention(q, k, v, documents.lengths, softmax_scale, return_lse=True)
    return out, lse if return_lse else None


def dense_flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    *,
    softmax_scale: float | None,
    deterministic: bool,
    return_lse: bool,
    window: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(out [T, H, D], log-sum-exp [H, T] without gradient, or None) by flash-attn or torch's own flash kernels."""
    cu_q = documents.cu_seqlens
    cu_k = cu_q if documents.cu_seqlens_k is None else documents.cu_seqlens_k
    longest = (documents.longest, documents.longest_k)
    options = {"softmax_scale": softmax_scale, "deterministic": deterministic, "window": window}
    out, lse = varlen_attention(q, k, v, cu_q, cu_k, *longest, return_lse=True, **options)
    return out, lse if return_lse else None


def dense_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    *,
    softmax_scale: float | None,
    deterministic: bool,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """(out [T, H, D], log-sum-exp [H, T] without gradient, or None) in plain PyTorch, on any device."""
    has_past = documents.cu_seqlens_k is not None or documents.starts is not None
    one_query = has_past and documents.ends_with_queries and documents.longest == 1
    nondeterministic = deterministic and q.device.type == "cuda"
    if return_lse or nondeterministic or (has_past and not one_query):
        # What scaled_dot_product_attention lacks, the block-sparse code has; with every block selected it is dense.
        num_blocks = max(1, -(-documents.longest_k // FULL_BLOCK))
        return moba_torch(q, k, v, documents, block_size=FULL_BLOCK, top_k=num_blocks, softmax_scale=softmax_scale)
    return _one_by_one(q, k, v, documents, softmax_scale, is_causal=not one_query), None


def _one_by_one(q, k, v, documents: Documents, softmax_scale: float | None, is_causal: bool) -> Tensor:
    """scaled_dot_product_attention of one document after the other."""
    bounds, bounds_k = (list(accumulate(lengths, initial=0)) for lengths in documents.host_lengths())
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
