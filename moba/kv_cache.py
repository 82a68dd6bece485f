"""Keys and values kept between calls of a model, so that a text can be read in chunks and continued token by token.

MoBA stays MoBA with a cache: a chunk routes over all cached blocks, and a single new token scores the cached means of
the complete blocks and attends to the ones it picks, which costs O(blocks + top_k * block_size) instead of O(length).
Only complete blocks compete (MoBA paper, section 2.2), so a mean is computed once, when its block fills up, by the
same function as in training.

Batches are packed, as everywhere: sequence i of the cache continues with the tokens of document i.
For inference only: nothing here is differentiable.

Shapes: T new tokens, S cached tokens of a sequence, H query heads, G key/value heads, D head size, B block size,
K = top_k.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from moba.attention import attend, shape_of
from moba.backends.choice import choose
from moba.documents import Documents, one_document
from moba.key_conv import KeyConvolution
from moba.kinds import AttentionSpec, Full, Moba
from moba.routing import block_means, select_blocks

DECODE_OWN, DECODE_DENSE = DECODE_MODES = (Moba.name, Full.name)
"""How tokens behind the prompt attend: by their layer's own kind, or to everything that this kind replaces."""
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
        assert self._k is not None
        return self._k[: self.length]

    @property
    def v(self) -> Tensor:
        """[S, G, D], a view."""
        assert self._v is not None
        return self._v[: self.length]

    def append(self, k_TGD: Tensor, v_TGD: Tensor) -> None:
        """Puts new keys and values behind the cached ones. Raises ValueError if they carry gradients, which would be
        lost."""
        if k_TGD.requires_grad or v_TGD.requires_grad:
            raise ValueError(
                "a KV cache holds no gradients: run the model under torch.no_grad() or torch.inference_mode()"
            )
        total = self.length + k_TGD.shape[0]
        if self._k is None or self._v is None or total > self._k.shape[0]:
            self._k, self._v = self._grown(total, k_TGD)
        self._k[self.length : total] = k_TGD
        self._v[self.length : total] = v_TGD
        self.length = total

    def _grown(self, total: int, like_TGD: Tensor) -> tuple[Tensor, Tensor]:
        capacity = max(total, 2 * self.length, MIN_CAPACITY)
        k, v = (like_TGD.new_empty(capacity, *like_TGD.shape[1:]) for _ in range(2))
        if self.length:
            k[: self.length], v[: self.length] = self.k, self.v
        return k, v

    def mark(self) -> tuple[int, Tensor | None]:
        """Where the sequence ends now, for `rewind`."""
        return self.length, self.key_tail

    def rewind(self, mark: tuple[int, Tensor | None]) -> None:
        """Forgets what was read since the mark; copies nothing."""
        self.length, self.key_tail = mark
        if self._means is not None and self._means_block_size is not None:
            self._means = self._means[: self.length // self._means_block_size]

    def documents(self, num_new: int) -> Documents:
        """The sequence as the document of its last `num_new` tokens."""
        return one_document(num_new, self.length, self.k.device)

    def block_means(self, block_size: int) -> Tensor:
        """Means of the complete blocks, float32 [S // B, G, D]. Computes the missing ones; all, if the block size
        changed."""
        if block_size != self._means_block_size:
            self._means, self._means_block_size = None, block_size
        known = 0 if self._means is None else self._means.shape[0]
        complete = self.length // block_size
        if known < complete or self._means is None:
            new = block_means(self.k[known * block_size : complete * block_size], block_size)[: complete - known]
            self._means = new if self._means is None else torch.cat([self._means, new])
        return self._means


class LayerCache:
    """The sequences of one layer, and the attention of new tokens over them."""

    def __init__(self, num_sequences: int, prompts: Sequence[int] | None):
        self.sequences = [SequenceCache() for _ in range(num_sequences)]
        self.prompts = prompts
        """Tokens of each sequence's prompt, behind which attention is dense; None: it never is."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, documents: Documents) -> Tensor:
        """Appends k, v [T, G, D] and returns the attention of q [T, H, D] over all that is cached: [T, H, D].

        `documents` says which tokens belong to which sequence.
        """
        bounds = self._bounds(documents)
        outs = [q[:0]]
        for i, (sequence, start, stop) in enumerate(zip(self.sequences, bounds, bounds[1:])):
            prompt = stop - start if self.prompts is None else max(self.prompts[i] - sequence.length, 0)
            # A piece that reaches beyond the prompt is attended in two: what one returns must not depend on the cut.
            split = min(start + prompt, stop)
            for first, last, dense in ((start, split, False), (split, stop, True)):
                if last > first:
                    sequence.append(k[first:last], v[first:last])
                    outs.append(self._attend_one(q[first:last], sequence, spec, dense))
        return torch.cat(outs) if len(outs) > 2 else outs[-1]

    def convolve(self, convolution: KeyConvolution, k_TC: Tensor, documents: Documents) -> Tensor:
        """The key convolution of new tokens, [T, G * D], where each sequence's follow those it has seen before."""
        bounds = self._bounds(documents)
        outs = [k_TC[:0]]
        for sequence, start, stop in zip(self.sequences, bounds, bounds[1:]):
            if stop > start:
                known = [k_TC[:0] if sequence.key_tail is None else sequence.key_tail, k_TC[start:stop]]
                joined_SC = torch.cat(known)
                outs.append(convolution(joined_SC)[known[0].shape[0] :])
                sequence.key_tail = joined_SC[1 - len(convolution.weight) :].clone()  # not a view of the chunk
        return torch.cat(outs)

    def _bounds(self, documents: Documents) -> list[int]:
        if documents.number != len(self.sequences):
            raise ValueError(
                f"the batch has {documents.number} sequences but the cache was made for {len(self.sequences)}: "
                "give every cached sequence per entry, an empty one if it gets no tokens"
            )
        return list(accumulate(documents.host_lengths()[0], initial=0))

    def _attend_one(self, q: Tensor, sequence: SequenceCache, spec: AttentionSpec, dense: bool) -> Tensor:
        if q.shape[0] == 1 < sequence.length:  # the same as below, reading less
            return spec.decode(q, sequence, dense=dense)
        kind = spec.dense() if dense else spec
        return attend(q, sequence.k, sequence.v, kind, sequence.documents(q.shape[0]))[0]


class KVCache:
    """Caches of all layers of a model: `cache[i]` is layer i's, `cache.lengths` the tokens read so far.

    `decode` says how the tokens behind the prompt attend in MoBA layers: "moba" routes them like any others, "full"
    lets them see everything, as the paper evaluates (MoBA while reading the prompt, full attention while generating);
    `prompts`, the tokens of each sequence's prompt, is for "full" alone. Chunks of any size give the same. Full layers
    and sliding windows stay as they are. Specs may be swapped between calls; a window's cache keeps all keys, so that
    it may be widened. Raises ValueError for what does not fit.
    """

    def __init__(
        self,
        num_layers: int,
        num_sequences: int = 1,
        decode: str = DECODE_OWN,
        prompts: Sequence[int] | None = None,
    ):
        if decode not in DECODE_MODES:
            raise ValueError(f"decode={decode!r}: choose one of {', '.join(DECODE_MODES)}")
        if (decode == DECODE_DENSE) != (prompts is not None) or len(prompts or [0] * num_sequences) != num_sequences:
            raise ValueError(
                f"prompts={prompts} with decode={decode!r} and {num_sequences} sequences: decode={DECODE_DENSE!r} "
                "needs the tokens of each sequence's prompt, and nothing else takes them"
            )
        self.layers = [LayerCache(num_sequences, prompts) for _ in range(num_layers)]

    def __getitem__(self, layer: int) -> LayerCache:
        return self.layers[layer]

    @property
    def lengths(self) -> list[int]:
        """Tokens cached of each sequence: the position of its next token."""
        return [sequence.length for sequence in self.layers[-1].sequences]

    def mark(self) -> list[list[tuple[int, Tensor | None]]]:
        """Where all sequences end now, to be given to `rewind`: what follows may then be read in several ways."""
        return [[sequence.mark() for sequence in layer.sequences] for layer in self.layers]

    def rewind(self, marks: list[list[tuple[int, Tensor | None]]]) -> None:
        """Forgets what was read since the mark was made; a mark made later than that is void."""
        for layer, own in zip(self.layers, marks):
            for sequence, mark in zip(layer.sequences, own):
                sequence.rewind(mark)


def decode_triton(q: Tensor, sequence: SequenceCache, kind: Moba) -> Tensor | None:
    """`decode_moba` by the Triton kernels; None where they are not to be had, or another backend was asked for."""
    documents = sequence.documents(1)
    shape = shape_of(q, sequence.k)._replace(differentiable=False)
    if not q.is_cuda or choose(kind, shape, documents).backend != "triton":
        return None
    from moba.backends.triton_decode import moba_decode

    assert documents.cu_seqlens_k is not None
    start, length = documents.cu_seqlens_k.long().split(1)
    means = sequence.block_means(kind.block_size)
    sizes = {"block_size": kind.block_size, "top_k": kind.top_k, "first_blocks": kind.first_blocks}
    return moba_decode(q, sequence.k, sequence.v, means, start, length, start, max_length=sequence.length, **sizes)[0]


def decode_moba(q: Tensor, sequence: SequenceCache, block_size: int, top_k: int, first_blocks: int = 0) -> Tensor:
    """MoBA of the newest token of a sequence, [1, H, D], for its query q [1, H, D], in torch; reads only the blocks it
    selects."""
    k, v, length = sequence.k, sequence.v, sequence.length
    num_heads, num_kv_heads = q.shape[1], k.shape[1]
    layout = sequence.documents(1).layout(block_size)
    # The means of the complete blocks are all that select_blocks reads, though the layout has slots for more.
    selection_HK = select_blocks(q, sequence.block_means(block_size), layout, top_k, first_blocks)[:, 0]
    key_HKB = selection_HK[:, :, None] * block_size + torch.arange(block_size, device=q.device)
    seen_HKB = (key_HKB >= 0) & (key_HKB < length)
    key_HS = key_HKB.clamp(0, length - 1).flatten(1)
    kv_head_H1 = torch.arange(num_heads, device=q.device)[:, None] // (num_heads // num_kv_heads)
    out_H1D = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1), k[key_HS, kv_head_H1], v[key_HS, kv_head_H1], attn_mask=seen_HKB.flatten(1)[:, None]
    )
    return out_H1D.transpose(0, 1)
