"""What a model exported with its own code has in place of moba.attention and moba.kinds: two kinds of attention, and
two ways to compute them.

train/hf/remote_code.py takes these definitions, those of moba/transformers.py, and all that they reach, and makes one
file of them that needs torch and transformers alone. A name of REPLACES is this module's there.

Shapes: T queries, S keys, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from moba.attention import shape_of
from moba.backends.dense import dense_torch
from moba.backends.refusals import triton as triton_refuses
from moba.backends.torch_blocks import moba_torch
from moba.checks import check_tensors
from moba.documents import Documents
from moba.hf_layout import token_layout
from moba.hf_refusals import InputsCheck
from moba.kinds import Full, Moba, Routing
from moba.kinds.base import check_counts
from moba.kinds.moba import check_first_blocks
from moba.routing import layout_means, select_blocks
from moba.transformers import attention_forward, prompt

NAME = __name__
"""What transformers calls this attention: each module that it loads has its own, so that two exports can be loaded."""
SET_PLAN = "put"
TELL_PROMPT = "model.prompt(tokens)"
SPARSE, DENSE = Moba.name, Full.name


@dataclass(frozen=True)
class AttentionSpec:
    """The attention of one layer: MoBA, or full where there is no block size."""

    block_size: int | None = None
    top_k: int = 1
    first_blocks: int = 0

    def __post_init__(self):
        if self.block_size is not None:
            check_counts(SPARSE, block_size=self.block_size, top_k=self.top_k)
            check_first_blocks(self.first_blocks, self.top_k)

    def dense(self) -> AttentionSpec:
        """Full attention."""
        return AttentionSpec()

    @property
    def routing(self) -> Routing | None:
        """How it picks blocks; None if it does not."""
        return None if self.block_size is None else Routing(self.block_size, self.top_k, "mean", self.first_blocks)


def from_entry(entry: Sequence[Any]) -> AttentionSpec:
    """The attention that an entry [kind, block_size, top_k] of the config's plan stands for, of MoBA perhaps with
    first_blocks behind; ValueError for none."""
    if len(entry) not in (3, 4):
        raise ValueError("needs [kind, block_size, top_k], or [kind, block_size, top_k, first_blocks]")
    name, *sizes = entry
    if name not in (SPARSE, DENSE):
        raise ValueError(f"kind={name!r}: choose one of {SPARSE}, {DENSE}")
    if name == SPARSE:
        check_counts(SPARSE, block_size=sizes[0])
        return AttentionSpec(*sizes)
    if sizes != [None, None]:
        raise ValueError(f"needs [{DENSE}, null, null]")
    return AttentionSpec()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kind: AttentionSpec,
    documents: Documents,
    *,
    softmax_scale: float | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, None]:
    """(attention of this kind [T, H, D] in q's dtype, None). q is [T, H, D], k and v are [S, G, D] of the documents.

    MoBA runs in Triton where no gradient is asked for, on CUDA in half precision with all keys at hand, and in torch
    otherwise.
    """
    check_tensors(q, k, v)
    routing = kind.routing
    if routing is None or routing.block_size * routing.top_k >= documents.longest_k:
        options = {"softmax_scale": softmax_scale, "deterministic": deterministic, "return_lse": False}
        return dense_torch(q, k, v, documents, **options)[0], None
    differentiable = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    shape = shape_of(q, k, softmax_scale, deterministic)
    whole = documents.cu_seqlens_k is None
    if q.is_cuda and whole and not differentiable:
        refusal = triton_refuses(kind, shape, documents)  # pyright: ignore[reportArgumentType]  # it reads routing alone
        if refusal is None:
            return moba_triton(q, k, v, routing, documents, softmax_scale), None
    layout = documents.layout(routing.block_size)
    selection_HTK = select_blocks(q, layout_means(k, layout), layout, routing.top_k, routing.first_blocks)
    sizes = {"block_size": routing.block_size, "top_k": routing.top_k, "softmax_scale": softmax_scale}
    return moba_torch(q, k, v, documents, **sizes, selection=selection_HTK)[0], None


@torch.no_grad()
def moba_triton(
    q: Tensor, k: Tensor, v: Tensor, routing: Routing, documents: Documents, softmax_scale: float | None = None
) -> Tensor:
    """MoBA attention [T, H, D] of at least one token by the Triton kernels."""
    from moba.backends.triton_attention import device_of, routed_forward

    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    with device_of(q):
        layout = documents.kernel_layout(routing.block_size)
    return routed_forward(q, k, v, layout, routing.block_size, routing.top_k, scale, routing.first_blocks)[0]


class RemoteModel:
    """Put before a language model's class of transformers, it makes MoBA, as config.moba says, the attention that the
    model has unless another `attn_implementation` is asked for."""

    @staticmethod
    def prompt(tokens: int):
        """Context in which the first `tokens` columns of each text, padding included, are prompt and later ones
        decoded; for prompts in chunks, speculative decoding and use_cache=False."""
        return prompt(tokens)

    def __init__(self, config, *args, **kwargs):
        AttentionInterface.register(NAME, attention_forward)
        AttentionMaskInterface.register(NAME, token_layout)
        if config._attn_implementation is None:
            config._attn_implementation = NAME
        super().__init__(config, *args, **kwargs)  # pyright: ignore[reportCallIssue]  # the model's, not object's
        self.register_forward_pre_hook(InputsCheck(NAME), with_kwargs=True)  # pyright: ignore[reportAttributeAccessIssue]


REPLACES = {
    "moba.attention": ("attend",),
    "moba.kinds": ("AttentionSpec", "from_entry"),
    "moba.kinds.base": ("AttentionSpec",),
    "moba.transformers": ("NAME", "SET_PLAN", "TELL_PROMPT"),
}
"""What of which module is this module's in the file."""
