"""Keys and values kept between calls of a model, so that a text can be read in chunks and continued token by token.

MoBA stays MoBA with a cache: a chunk routes over all cached blocks, and a single new token scores the cached means of
the complete blocks and attends to the ones it picks, which costs O(blocks + top_k * block_size) instead of O(length).
Only complete blocks compete (MoBA paper, section 2.2), so a mean is computed once, when its block fills up, by the
same function as in training.

Batches are packed, as everywhere: sequence i of the cache continues with the tokens [cu_seqlens[i], cu_seqlens[i+1]).
For inference only: nothing here is differentiable.

Shapes: T new tokens, S cached tokens of a sequence, H query heads, G key/value heads, D head size, B block size,
K = top_k.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from moba.attention import attention, full_attention
from moba.key_conv import KeyConvolution
from moba.routing import BlockLayout, block_means, select_blocks
from moba.spec import AttentionSpec

DECODE_MODES = ("moba", "full")
MIN_CAPACITY = 256


class SequenceCache:
    """Keys, values and block means of one sequence in one layer."""

    def __init__(self):
        self.length = 0
        self.key_tail: Tensor | None = None
        """The last keys as they were before the key convolution, [<= width - 1, G * D]."""
        self._k = self._v = None  # [capacity, G, D], capacity doubles when full
        self._means: Tensor | None = None
        self._means_block_size: int | None = None

    @property
    def k(self) -> Tensor:
        """[S, G, D], a view."""
        return self._k[: self.length]

    @property
    def v(self) -> Tensor:
        """[S, G, D], a view."""
        return self._v[: self.length]

    def append(self, k_TGD: Tensor, v_TGD: Tensor) -> None:
        """Puts new keys and values behind the cached ones. Raises ValueError if they carry gradients, which would be
        lost."""
        if k_TGD.requires_grad or v_TGD.requires_grad:
            raise ValueError(
                "a KV cache holds no gradients: run the model under torch.no_grad() or torch.inference_mode()"
            )
        total = self.length + k_TGD.shape[0]
        if self._k is None or total > self._k.shape[0]:
            self._grow(total, k_TGD)
        self._k[self.length : total] = k_TGD
        self._v[self.length : total] = v_TGD
        self.length = total

    def _grow(self, total: int, like_TGD: Tensor) -> None:
        capacity = max(total, 2 * self.length, MIN_CAPACITY)
        k, v = (like_TGD.new_empty(capacity, *like_TGD.shape[1:]) for _ in range(2))
        if self.length:
            k[: self.length], v[: self.length] = self.k, self.v
        self._k, self._v = k, v

    def block_means(self, block_size: int) -> Tensor:
        """Means of the complete blocks, float32 [S // B, G, D]. Computes the missing ones; all, if the block size
        changed."""
        if block_size != self._means_block_size:
            self._means, self._means_block_size = None, block_size
        known = 0 if self._means is None else self._means.shape[0]
        complete = self.length // block_size
        if known < complete or self._means is None:
            new = block_means(self.k[known * block_size : complete * block_size], None, block_size)[: complete - known]
            self._means = new if self._means is None else torch.cat([self._means, new])
        return self._means


class LayerCache:
    """The sequences of one layer, and the attention of new tokens over them."""

    def __init__(self, num_sequences: int, decode: str):
        self.sequences = [SequenceCache() for _ in range(num_sequences)]
        self.decode = decode

    def attend(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, cu_seqlens: Tensor | None) -> Tensor:
        """Appends k, v [T, G, D] and returns the attention of q [T, H, D] over all that is cached: [T, H, D].

        cu_seqlens [N+1] says which tokens belong to which sequence; None = all to the only one. With several
        sequences it is read on the host.
        """
        bounds = self._bounds(cu_seqlens, q.shape[0])
        outs = [q[:0]]
        for sequence, start, stop in zip(self.sequences, bounds, bounds[1:]):
            if stop > start:
                sequence.append(k[start:stop], v[start:stop])
                outs.append(self._attend_one(q[start:stop], sequence, spec))
        return torch.cat(outs) if len(outs) > 2 else outs[-1]

    def convolve(self, convolution: KeyConvolution, k_TC: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """The key convolution of new tokens, [T, G * D], where each sequence's follow those it has seen before."""
        bounds = self._bounds(cu_seqlens, k_TC.shape[0])
        outs = [k_TC[:0]]
        for sequence, start, stop in zip(self.sequences, bounds, bounds[1:]):
            if stop > start:
                known = [k_TC[:0] if sequence.key_tail is None else sequence.key_tail, k_TC[start:stop]]
                joined_SC = torch.cat(known)
                outs.append(convolution(joined_SC)[known[0].shape[0] :])
                sequence.key_tail = joined_SC[1 - len(convolution.weight) :].clone()  # not a view of the chunk
        return torch.cat(outs)

    def _bounds(self, cu_seqlens: Tensor | None, num_tokens: int) -> list[int]:
        num_given = 1 if cu_seqlens is None else cu_seqlens.numel() - 1
        if num_given != len(self.sequences):
            raise ValueError(
                f"cu_seqlens has {num_given} sequences but the cache was made for {len(self.sequences)}: "
                "give every cached sequence an entry, an empty one if it gets no tokens"
            )
        return [0, num_tokens] if num_given == 1 else cu_seqlens.tolist()

    def _attend_one(self, q: Tensor, sequence: SequenceCache, spec: AttentionSpec) -> Tensor:
        num_new, length = q.shape[0], sequence.length
        decoding = num_new == 1 and length > 1
        if decoding and spec.kind == "moba" and self.decode == "moba" and spec.gate == "mean":
            return decode_moba(q, sequence, spec.block_size, spec.top_k)
        bounds = {
            "cu_seqlens": _document(num_new, q.device),
            "cu_seqlens_k": _document(length, q.device),
        }
        if decoding and spec.kind == "sliding":
            seen = min(spec.window, length)
            bounds["cu_seqlens_k"] = _document(seen, q.device)
            return full_attention(q, sequence.k[-seen:], sequence.v[-seen:], **bounds)
        if decoding and self.decode == "full":
            return full_attention(q, sequence.k, sequence.v, **bounds)
        return attention(q, sequence.k, sequence.v, spec, **bounds)


class KVCache:
    """Caches of all layers of a model: `cache[i]` is layer i's, `cache.lengths` the tokens read so far.

    `decode` says how a single new token attends in MoBA layers: "moba" routes it like any other token, "full" lets it
    see everything, as the paper evaluates (MoBA while reading the prompt, full attention while generating). Chunks of
    more than one token always follow the layer's AttentionSpec, and so do full layers and sliding windows. Specs may
    be swapped between calls; a window's cache keeps all keys, so that it may be widened.
    """

    def __init__(self, num_layers: int, num_sequences: int = 1, decode: str = "moba"):
        if decode not in DECODE_MODES:
            raise ValueError(f"decode={decode!r}: choose one of {', '.join(DECODE_MODES)}")
        self.layers = [LayerCache(num_sequences, decode) for _ in range(num_layers)]

    def __getitem__(self, layer: int) -> LayerCache:
        return self.layers[layer]

    @property
    def lengths(self) -> list[int]:
        """Tokens cached of each sequence: the position of its next token."""
        return [sequence.length for sequence in self.layers[-1].sequences]


def decode_moba(q: Tensor, sequence: SequenceCache, block_size: int, top_k: int) -> Tensor:
    """MoBA of the newest token of a sequence, [1, H, D], for its query q [1, H, D]; reads only the blocks it
    selects."""
    k, v, length = sequence.k, sequence.v, sequence.length
    num_heads, num_kv_heads = q.shape[1], k.shape[1]
    layout = _newest_token_layout(block_size, length, q.device)
    # The means of the complete blocks are all that select_blocks reads, though the layout has slots for more.
    selection_HK = select_blocks(q, sequence.block_means(block_size), layout, top_k)[:, 0]
    key_HKB = selection_HK[:, :, None] * block_size + torch.arange(block_size, device=q.device)
    seen_HKB = (key_HKB >= 0) & (key_HKB < length)
    key_HS = key_HKB.clamp(0, length - 1).flatten(1)
    kv_head_H1 = torch.arange(num_heads, device=q.device)[:, None] // (num_heads // num_kv_heads)
    out_H1D = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1), k[key_HS, kv_head_H1], v[key_HS, kv_head_H1], attn_mask=seen_HKB.flatten(1)[:, None]
    )
    return out_H1D.transpose(0, 1)


@functools.lru_cache(maxsize=64)
def _newest_token_layout(block_size: int, length: int, device: torch.device) -> BlockLayout:
    """The layout for one query at the end of `length` keys; layers and steps ask for the same one."""
    return BlockLayout.build(block_size, 1, length, _document(1, device), _document(length, device), device)


@functools.lru_cache(maxsize=64)
def _document(length: int, device: torch.device) -> Tensor:
    """int32 [0, length]: the bounds of one document."""
    return torch.tensor([0, length], dtype=torch.int32, device=device)
