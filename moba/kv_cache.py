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
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from moba.attention import attend, shape_of
from moba.backends.choice import choose
from moba.backends.refusals import decodes
from moba.documents import Documents, last_tokens, one_document
from moba.key_conv import KeyConvolution
from moba.kinds import AttentionSpec, Full, Moba
from moba.routing import block_means, select_blocks

DECODE_OWN, DECODE_DENSE = DECODE_MODES = (Moba.name, Full.name)
"""How tokens behind the prompt attend: by their layer's own kind, or to everything that this kind replaces."""
MIN_CAPACITY = 256
JOINED_TOKENS = 64
"""Up to so many new tokens per sequence are attended for all sequences at once, which costs a copy of their keys and
values, and saves as many launches as there are sequences."""


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
        new = [(s, stop - start) for s, start, stop in zip(self.sequences, bounds, bounds[1:]) if stop > start]
        if self.prompts is None and len(new) > 1 and max(length for _, length in new) <= JOINED_TOKENS:
            return self._attend_together(q, k, v, spec, [s for s, _ in new], [length for _, length in new])
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

    @staticmethod
    def _attend_together(
        q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, sequences: list[SequenceCache], lengths: list[int]
    ) -> Tensor:
        for sequence, *own in zip(sequences, k.split(lengths), v.split(lengths)):
            sequence.append(*own)
        documents = last_tokens(tuple(lengths), tuple(sequence.length for sequence in sequences), q.device)
        if max(lengths) == 1:
            return spec.decode(q, sequences, documents, dense=False)
        return attend(q, *joined(sequences), spec, documents)[0]

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
                "give every cached sequence an entry, an empty one if it gets no tokens"
            )
        return list(accumulate(documents.host_lengths()[0], initial=0))

    def _attend_one(self, q: Tensor, sequence: SequenceCache, spec: AttentionSpec, dense: bool) -> Tensor:
        if q.shape[0] == 1 < sequence.length:  # the same as below, reading less
            return spec.decode(q, [sequence], sequence.documents(1), dense=dense)
        kind = spec.dense() if dense else spec
        return attend(q, sequence.k, sequence.v, kind, sequence.documents(q.shape[0]))[0]


class KVCache:
    """Caches of all layers of a model: `cache[i]` is layer i's, `cache.lengths` the tokens read so far.

    `decode` sets the attention of the tokens after the prompt in MoBA layers: "moba" routes them like all others;
    "full" is full attention, as in the paper's evaluations (MoBA for the prompt, full attention for new tokens).
    `prompts`, only for "full", is the number of prompt tokens of each sequence. Results do not depend on how a text is
    cut into chunks. Full layers and sliding windows are not affected. Specs may be replaced between calls; the cache of
    a sliding-window layer keeps all keys, so that its window may be widened. Raises ValueError for arguments that do
    not fit.
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


def decode_triton(q: Tensor, sequences: Sequence[SequenceCache], documents: Documents, kind: Moba) -> Tensor | None:
    """`decode_moba` by the Triton kernels, sequence by sequence without copying keys; None where they cannot run or
    another backend was requested."""
    shape = shape_of(q, sequences[0].k)
    if not q.is_cuda or not decodes(documents) or choose(kind, shape, documents).backend != "triton":
        return None
    from moba.backends.triton_decode import moba_decode

    bounds_k = documents.key_bounds.long()
    lengths_N, zero = bounds_k.diff(), bounds_k[:1]
    run = partial(moba_decode, block_size=kind.block_size, top_k=kind.top_k, first_blocks=kind.first_blocks)
    outs = []
    for n, sequence in enumerate(sequences):
        given = (q[n : n + 1], sequence.k, sequence.v, sequence.block_means(kind.block_size))
        outs.append(run(*given, zero, lengths_N[n : n + 1], zero)[0])
    return torch.cat(outs)


def joined(sequences: Sequence[SequenceCache]) -> tuple[Tensor, Tensor]:
    """Keys and values [S, G, D] of some sequences, one behind the other; of one alone without a copy."""
    if len(sequences) == 1:
        return sequences[0].k, sequences[0].v
    return torch.cat([sequence.k for sequence in sequences]), torch.cat([sequence.v for sequence in sequences])


def decode_moba(
    q: Tensor,
    sequences: Sequence[SequenceCache],
    documents: Documents,
    block_size: int,
    top_k: int,
    first_blocks: int = 0,
) -> Tensor:
    """MoBA of the newest token of N sequences, [N, H, D], for their queries q [N, H, D]; attends to the blocks it
    selects alone. `documents` are those tokens as the last of all that is cached."""
    k, v = joined(sequences)
    num_heads, num_kv_heads = q.shape[1], k.shape[1]
    layout = documents.layout(block_size)
    selection_HNK = select_blocks(q, _means_of(sequences, block_size, layout.num_blocks), layout, top_k, first_blocks)
    key_HNS = (selection_HNK[..., None] * block_size + torch.arange(block_size, device=q.device)).flatten(2)
    bounds_k = documents.key_bounds
    start_N1, length_N1 = bounds_k[:-1, None], bounds_k.diff()[:, None]
    seen_NHS = ((key_HNS >= 0) & (key_HNS < length_N1)).transpose(0, 1)
    key_NHS = (torch.minimum(key_HNS.clamp(min=0), length_N1 - 1) + start_N1).transpose(0, 1)
    kv_head_H1 = torch.arange(num_heads, device=q.device)[:, None] // (num_heads // num_kv_heads)
    out_NH1D = torch.nn.functional.scaled_dot_product_attention(
        q[:, :, None], k[key_NHS, kv_head_H1], v[key_NHS, kv_head_H1], attn_mask=seen_NHS[:, :, None]
    )
    return out_NH1D[:, :, 0]


def _means_of(sequences: Sequence[SequenceCache], block_size: int, num_blocks: int) -> Tensor:
    """Block means of some sequences in the slots of their layout, float32 [num_blocks, G, D], 0 where a block is not
    complete; of one sequence those of the complete blocks, which are all that is read."""
    means = [sequence.block_means(block_size) for sequence in sequences]
    if len(sequences) == 1:
        return means[0]
    nothing = means[0].new_zeros(1, *means[0].shape[1:])
    slots = [part for s, own in zip(sequences, means) for part in (own, nothing[: s.length % block_size])]
    used = sum(map(len, slots))
    return torch.cat([*slots, nothing.expand(num_blocks - used, -1, -1)])
