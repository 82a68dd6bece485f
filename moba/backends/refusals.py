"""Why a backend cannot compute something, asked before it runs: refuses(kind, q, documents) -> reason, or None.

Imports no torch, so that a plan can ask as well; each reason names a backend that can.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moba.documents import Documents
    from moba.kinds.base import AttentionSpec, QueryShape

FLASH_HEAD_DIM = 256
# Beyond, flash's backward kernel reads out of bounds (illegal memory access seen at 2.9e9 elements, torch 2.11).
FLASH_ROW_ELEMENTS = 1 << 31
# Sequences of one varlen call: a dimension of the CUDA grid.
FLASH_LISTS = 65535
CUDNN_HEAD_DIM = 128
TRITON_TOP_K = 64
TRITON_HEAD_DIM = 256


class BackendUnavailable(ValueError):
    """A backend cannot do what was asked of it; the message names one that can."""


def nothing(kind: AttentionSpec, q: QueryShape, documents: Documents | None) -> str | None:
    """None: it can do everything."""
    return None


def never(q: QueryShape, documents: Documents | None) -> bool:
    """False: only who names the backend gets it."""
    return False


def past_only(kind: AttentionSpec, q: QueryShape, documents: Documents | None) -> str | None:
    """For backends whose queries are the last of their document's keys."""
    if documents is not None and not documents.ends_with_queries:
        return "queries from the middle of their document: backend='torch' of MoBA and of full attention has them"
    return None


def reference(kind: AttentionSpec, q: QueryShape, documents: Documents | None) -> str | None:
    """For the dense definition of MoBA."""
    if kind.routing is not None and kind.routing.gate != "mean":
        return "backend='reference' knows MoBA's own gate alone: use 'torch', 'flash' or 'triton' for another"
    return past_only(kind, q, documents)


def flash(kind: AttentionSpec, q: QueryShape, documents: Documents | None) -> str | None:
    """For varlen flash kernels."""
    if q.device != "cuda":
        return f"backend='flash' needs CUDA tensors but q is on {q.device}: use backend='torch'"
    if q.dtype not in ("float16", "bfloat16"):
        return (
            f"dtype=torch.{q.dtype}: flash kernels take torch.bfloat16 or torch.float16; backend 'torch' takes any "
            "dtype"
        )
    if q.head_dim % 8 or q.head_dim > FLASH_HEAD_DIM:
        return (
            f"head_dim={q.head_dim}: flash kernels take multiples of 8 up to {FLASH_HEAD_DIM}; backend 'torch' takes "
            "any head size"
        )
    return past_only(kind, q, documents)


def shortest_on_cudnn(head_dim: int) -> int:
    """Tokens from which a document is faster on cuDNN than among others in a varlen flash call, forward and backward
    together. Measured on an H100 by benchmarks/dense.py, at head sizes of 64 and 128."""
    return 4096 if head_dim > 64 else 8192


def long_documents(q: QueryShape, documents: Documents | None) -> bool:
    """True if cuDNN has a document to compute."""
    longest = (q.longest or q.num_tokens) if documents is None else documents.longest
    return longest >= shortest_on_cudnn(q.head_dim)


def cudnn(kind: AttentionSpec, q: QueryShape, documents: Documents | None) -> str | None:
    """For cuDNN's kernels, one long document per call."""
    if q.device != "cuda":
        return f"backend='cudnn' needs CUDA tensors but q is on {q.device}: use backend='torch'"
    if q.dtype not in ("float16", "bfloat16"):
        return f"dtype=torch.{q.dtype}: cuDNN takes torch.bfloat16 or torch.float16; backend 'torch' takes any dtype"
    if q.head_dim % 8 or q.head_dim > CUDNN_HEAD_DIM:
        problem = f"head_dim={q.head_dim}: cuDNN takes multiples of 8 up to {CUDNN_HEAD_DIM}"
    elif q.deterministic:
        problem = "cuDNN's gradients do not repeat bit for bit, as deterministic mode asks"
    elif not q.has_cudnn:
        problem = "cuDNN's attention needs a torch with cuDNN and a GPU of compute capability 8.0 or newer"
    elif documents is not None and documents.cu_seqlens_k is not None:
        problem = "cu_seqlens_k is given, but cuDNN attends from all tokens of a document here"
    elif documents is None and q.has_slices:
        problem = "processes have slices of documents, but cuDNN attends from all tokens of a document here"
    elif documents is not None and documents.lengths is None:
        problem = "cuDNN takes lengths from the host, and cu_seqlens lies on the GPU: hand it in on the CPU"
    else:
        return past_only(kind, q, documents)
    return f"{problem}; backend 'flash' can do this"


def moba_flash(kind: AttentionSpec, q: QueryShape, documents: Documents | None) -> str | None:
    """For MoBA by two varlen flash calls."""
    routing = kind.routing
    assert routing is not None, kind
    num_keys, num_documents = (q.num_tokens, 1) if documents is None else (documents.num_keys, documents.number)
    picked = q.num_tokens * (routing.top_k - 1) * q.head_dim
    if picked > FLASH_ROW_ELEMENTS or num_keys // routing.block_size + num_documents > FLASH_LISTS:
        return (
            f"block_size={routing.block_size}, top_k={routing.top_k}: more routed rows or blocks than backend 'flash' "
            f"can index at {q.num_tokens} tokens; use backend 'triton' or 'torch'"
        )
    return flash(kind, q, documents)


def decodes(documents: Documents) -> bool:
    """True if it is known that each document has one query, its last token."""
    return documents.ends_with_queries and documents.lengths is not None and set(documents.lengths) == {1}


def triton(kind: AttentionSpec, q: QueryShape, documents: Documents | None) -> str | None:
    """For the fused kernels, which run on the CPU in Triton's interpreter alone."""
    routing = kind.routing
    assert routing is not None, kind
    if not has_triton():
        return "backend='triton' needs the triton package: use 'flash' on CUDA or 'torch' on any device"
    interpreted = q.device != "cuda" and _interpreted()
    dtypes = ("float16", "float32") if interpreted else ("float16", "bfloat16")
    scale = 1.0 if q.softmax_scale is None else q.softmax_scale
    group = q.num_heads // q.num_kv_heads
    if q.dtype not in dtypes:
        names = " and ".join(f"torch.{name}" for name in dtypes)
        problem = f"dtype torch.{q.dtype}: the triton backend takes {names}"
    elif q.device != "cuda" and not interpreted:
        problem = f"device {q.device}: the triton backend needs CUDA"
    elif q.head_dim > TRITON_HEAD_DIM or q.head_dim % 8:
        problem = f"head size {q.head_dim}: the triton backend takes multiples of 8 up to {TRITON_HEAD_DIM}"
    elif routing.top_k > TRITON_TOP_K:
        problem = f"top_k={routing.top_k}: the triton backend takes at most {TRITON_TOP_K}"
    elif scale <= 0:
        problem = f"softmax_scale={scale}: the triton backend needs a positive one"
    elif q.num_tokens * group * routing.top_k >= 1 << 31:
        picks = f"{q.num_tokens} tokens x {group} heads of a group x top_k={routing.top_k}"
        problem = f"{picks}: the triton backend counts fewer than 2**31"
    else:
        return past_only(kind, q, documents)
    return f"{problem}; backend='torch' can do this"


def has_triton() -> bool:
    """True if Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def _interpreted() -> bool:
    from moba.backends.triton_attention import INTERPRETED

    return INTERPRETED
