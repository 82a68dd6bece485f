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

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from moba.attention import attend, shape_of
from moba.backends.choice import choose
from moba.backends.refusals import decodes
from moba.documents import Documents, last_tokens, one_document
from moba.key_conv import KeyConvolution
from moba.kinds import AttentionSpec, Full, Moba
from moba.routing import score_dtype, select_blocks

DECODE_OWN, DECODE_DENSE = DECODE_MODES = (Moba.name, Full.name)
"""How tokens behind the prompt attend: by their layer's own kind, or to everything that this kind replaces."""
MIN_CAPACITY = 256
COPIED_TOKENS = 4096
"""Cached tokens per sequence from which sequences of different lengths decode densely one by one: copying so many keys
and values behind each other takes as long as a launch."""


class Storage:
    """Keys and values of the sequences of one layer, a row of `capacity` tokens each, so that all can be read, and
    written, in one call."""

    def __init__(self, number: int, capacity: int = MIN_CAPACITY):
        """`capacity`: tokens to make room for at first; it doubles when a row is full."""
        self._number, self._least = number, capacity
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        """Both [N, capacity, G, D], once something is there."""

    @property
    def capacity(self) -> int:
        """Tokens of a row."""
        return 0 if self.k is None else self.k.shape[1]

    def reserve(self, length: int, k_TGD: Tensor, v_TGD: Tensor) -> tuple[Tensor, Tensor]:
        """(k, v) with room for `length` tokens in each row, to be written. ValueError if what comes, such as these,
        carries gradients, which would be lost."""
        if k_TGD.requires_grad or v_TGD.requires_grad:
            raise ValueError(
                "a KV cache holds no gradients: run the model under torch.no_grad() or torch.inference_mode()"
            )
        if self.k is None or self.v is None or length > self.capacity:
            capacity = max(length, 2 * self.capacity, self._least)
            k, v = (x.new_empty(self._number, capacity, *x.shape[1:]) for x in (k_TGD, v_TGD))
            if self.k is not None and self.v is not None:
                k[:, : self.capacity], v[:, : self.capacity] = self.k, self.v
            self.k, self.v = k, v
        return self.k, self.v


class SequenceCache:
    """Keys, values and block means of one sequence in one layer."""

    def __init__(self, storage: Storage | None = None, row: int = 0):
        """`storage`: which row of which holds the sequence; None: one of its own."""
        self.length = 0
        self.storage, self.row = storage or Storage(1), row
        self.key_tail: Tensor | None = None
        """The last keys as they were before the key convolution, [<= width - 1, G * D]."""
        self._means: Tensor | None = None
        self._means_block_size: int | None = None

    @property
    def k(self) -> Tensor:
        """[S, G, D], a view."""
        assert self.storage.k is not None
        return self.storage.k[self.row, : self.length]

    @property
    def v(self) -> Tensor:
        """[S, G, D], a view."""
        assert self.storage.v is not None
        return self.storage.v[self.row, : self.length]

    def append(self, k_TGD: Tensor, v_TGD: Tensor) -> None:
        """Puts new keys and values behind the cached ones. ValueError if they carry gradients."""
        total = self.length + k_TGD.shape[0]
        k, v = self.storage.reserve(total, k_TGD, v_TGD)
        k[self.row, self.length : total] = k_TGD
        v[self.row, self.length : total] = v_TGD
        self.length = total

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
            k = self.k[known * block_size : complete * block_size].unflatten(0, (complete - known, block_size))
            new = k.sum(1, dtype=score_dtype(k)) / block_size
            self._means = new if self._means is None else torch.cat([self._means, new])
        return self._means


class LayerCache:
    """The sequences of one layer, and the attention of new tokens over them."""

    def __init__(self, num_sequences: int, prompts: Sequence[int] | None, capacity: int):
        self._storage = Storage(num_sequences, capacity)
        self.sequences = [SequenceCache(self._storage, row) for row in range(num_sequences)]
        self.prompts = prompts
        """Tokens of each sequence's prompt, behind which attention is dense; None: it never is."""
        self.ways = 1
        """In how many ways each sequence goes on (`KVCache.in_ways`)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, documents: Documents) -> Tensor:
        """Appends k, v [T, G, D] and returns the attention of q [T, H, D] over all that is cached: [T, H, D].

        `documents` says which tokens belong to which sequence.
        """
        bounds = self._bounds(documents)
        if self.ways > 1:
            return self._attend_in_ways(q, k, v, spec, documents)
        new = [(s, stop - start) for s, start, stop in zip(self.sequences, bounds, bounds[1:]) if stop > start]
        if self.prompts is None and len(new) > 1:
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

    def _attend_together(
        self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, sequences: list[SequenceCache], lengths: list[int]
    ) -> Tensor:
        """In one call for all sequences; unless all have one new token, that takes a copy of what they have cached."""
        starts = [sequence.length for sequence in sequences]
        after = tuple(start + length for start, length in zip(starts, lengths))
        kept = self._storage.reserve(max(after), k, v)
        rows = tuple(sequence.row for sequence in sequences)
        slots = _slots(rows, tuple(starts), after, self._storage.capacity, k.device)
        for all_NCGD, new_TGD in zip(kept, (k, v)):
            all_NCGD.flatten(0, 1).index_copy_(0, slots, new_TGD)
        for sequence, length in zip(sequences, after):
            sequence.length = length
        documents = last_tokens(tuple(lengths), after, q.device)
        if max(lengths) == 1:
            return spec.decode(q, sequences, documents, dense=False)
        return attend(q, *(joined(sequences) if any(starts) else (k, v)), spec, documents)[0]

    def _attend_in_ways(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, documents: Documents) -> Tensor:
        """All sequences' tokens of one way after the other, over a copy of the cached keys and values in which only
        the tokens of the way are replaced."""
        size, number = documents.longest, len(self.sequences)
        assert self.prompts is None and set(documents.host_lengths()[0]) == {size}, (documents, self.prompts)
        after = tuple(sequence.length + size for sequence in self.sequences)
        each = last_tokens((size,) * number, after, q.device)
        places = each.key_bounds[1:, None].long() + torch.arange(-size, 0, device=q.device)
        keys, values = (
            torch.cat([part for pair in zip(past, new[: number * size].split(size)) for part in pair])
            for past, new in (([s.k for s in self.sequences], k), ([s.v for s in self.sequences], v))
        )
        outs = []
        for q_way, k_way, v_way in zip(*(x.split(number * size) for x in (q, k, v))):
            keys.index_copy_(0, places.flatten(), k_way)
            values.index_copy_(0, places.flatten(), v_way)
            outs.append(attend(q_way, keys, values, spec, each)[0])
        return torch.cat(outs)

    def convolve(self, convolution: KeyConvolution, k_TC: Tensor, documents: Documents) -> Tensor:
        """The key convolution of new tokens, [T, G * D], where each sequence's follow those it has seen before; in one
        call for all."""
        self._bounds(documents)
        lengths, sequences = documents.host_lengths()[0], self.sequences * self.ways
        tails = [k_TC[:0] if sequence.key_tail is None else sequence.key_tail for sequence in sequences]
        joined_SC = torch.cat([part for pair in zip(tails, k_TC.split(lengths)) for part in pair])
        sizes = tuple(len(tail) + length for tail, length in zip(tails, lengths))
        ends = list(accumulate(sizes))
        out_SC = convolution(joined_SC, last_tokens(sizes, sizes, k_TC.device).offsets())
        if self.ways == 1:
            kept = [min(size, convolution.reach) for size in sizes]
            # A copy: the rows of a view would keep the whole chunk.
            kept_SC = joined_SC[_last_rows(tuple(ends), tuple(kept), k_TC.device)]
            for sequence, tail in zip(sequences, kept_SC.split(kept)):
                sequence.key_tail = tail
        return out_SC[_last_rows(tuple(ends), tuple(lengths), k_TC.device)]

    def _bounds(self, documents: Documents) -> list[int]:
        if documents.number != len(self.sequences) * self.ways:
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
    a sliding-window layer keeps all keys, so that its window may be widened. `capacity`: tokens of each sequence that
    there is room for at first; it doubles where one is longer. Raises ValueError for arguments that do not fit.
    """

    def __init__(
        self,
        num_layers: int,
        num_sequences: int = 1,
        decode: str = DECODE_OWN,
        prompts: Sequence[int] | None = None,
        capacity: int = MIN_CAPACITY,
    ):
        if decode not in DECODE_MODES:
            raise ValueError(f"decode={decode!r}: choose one of {', '.join(DECODE_MODES)}")
        if (decode == DECODE_DENSE) != (prompts is not None) or len(prompts or [0] * num_sequences) != num_sequences:
            raise ValueError(
                f"prompts={prompts} with decode={decode!r} and {num_sequences} sequences: decode={DECODE_DENSE!r} "
                "needs the tokens of each sequence's prompt, and nothing else takes them"
            )
        self.layers = [LayerCache(num_sequences, prompts, capacity) for _ in range(num_layers)]

    def __getitem__(self, layer: int) -> LayerCache:
        return self.layers[layer]

    @property
    def lengths(self) -> list[int]:
        """Tokens cached of each sequence: the position of its next token."""
        return [sequence.length for sequence in self.layers[-1].sequences]

    @contextmanager
    def in_ways(self, number: int) -> Iterator[None]:
        """Context in which each sequence goes on in several ways, side by side, none of which is kept (a single one is,
        as always): document w * num_sequences + i of a batch is way w of sequence i, and all have as many tokens."""
        for layer in self.layers:
            layer.ways = number
        try:
            yield
        finally:
            for layer in self.layers:
                layer.ways = 1

    def mark(self) -> list[list[tuple[int, Tensor | None]]]:
        """Where all sequences end now, to be given to `rewind`: what follows may then be read in several ways."""
        return [[sequence.mark() for sequence in layer.sequences] for layer in self.layers]

    def rewind(self, marks: list[list[tuple[int, Tensor | None]]]) -> None:
        """Forgets what was read since the mark was made; a mark made later than that is void."""
        for layer, own in zip(self.layers, marks):
            for sequence, mark in zip(layer.sequences, own):
                sequence.rewind(mark)


@lru_cache(maxsize=16)
def _slots(
    rows: tuple[int, ...], starts: tuple[int, ...], stops: tuple[int, ...], capacity: int, device: torch.device
) -> Tensor:
    """int64: where the tokens from `starts` to `stops` of these rows of a storage lie, row after row; layers share
    it."""
    parts = [row * capacity + torch.arange(start, stop) for row, start, stop in zip(rows, starts, stops)]
    return torch.cat(parts).to(device, non_blocking=True)


def _last_rows(ends: tuple[int, ...], counts: tuple[int, ...], device: torch.device) -> Tensor:
    """int64: so many rows before each of these ends."""
    starts = tuple(end - count for end, count in zip(ends, counts))
    return _slots((0,) * len(ends), starts, ends, 0, device)


def decode_triton(q: Tensor, sequences: Sequence[SequenceCache], documents: Documents, kind: Moba) -> Tensor | None:
    """`decode_moba` by the Triton kernels, all sequences at once where they lie; None where they cannot run or another
    backend was requested."""
    storage = sequences[0].storage
    assert storage.k is not None and storage.v is not None
    if not decodes(documents) or choose(kind, shape_of(q, sequences[0].k), documents).backend != "triton":
        return None
    from moba.backends.triton_attention import device_of
    from moba.backends.triton_decode import moba_decode

    assert all(sequence.storage is storage for sequence in sequences)
    rows = tuple(sequence.row for sequence in sequences)
    key_start_N = _slots(rows, (0,) * len(rows), (1,) * len(rows), storage.capacity, q.device)
    means = [sequence.block_means(kind.block_size) for sequence in sequences]
    length_N = documents.key_bounds.long().diff()
    complete_N = length_N // kind.block_size
    with device_of(q):
        out, _, _ = moba_decode(
            q, storage.k.flatten(0, 1), storage.v.flatten(0, 1), means[0] if len(means) == 1 else torch.cat(means),
            key_start_N, length_N, complete_N.cumsum(0) - complete_N,
            block_size=kind.block_size, top_k=kind.top_k, first_blocks=kind.first_blocks,
        )  # fmt: skip
    return out


def decode_dense(q: Tensor, sequences: Sequence[SequenceCache]) -> Tensor | None:
    """Full attention of the newest token of N sequences, [N, H, D], which copies no keys; None where a copy is faster:
    of short sequences of different lengths."""
    lengths, storage = [sequence.length for sequence in sequences], sequences[0].storage
    rows = [sequence.row for sequence in sequences]
    assert storage.k is not None and storage.v is not None
    if min(lengths) == max(lengths) and rows == list(range(rows[0], rows[0] + len(rows))):
        pieces = [(q, *(x[rows[0] : rows[-1] + 1, : lengths[0]] for x in (storage.k, storage.v)))]
    elif sum(lengths) < COPIED_TOKENS * len(lengths):
        return None
    else:
        pieces = [(one, sequence.k[None], sequence.v[None]) for one, sequence in zip(q.split(1), sequences)]
    outs = []
    # Not cuDNN, which makes a plan for each length.
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        for q_NHD, k_NSGD, v_NSGD in pieces:
            k, v = k_NSGD.transpose(1, 2), v_NSGD.transpose(1, 2)
            outs.append(F.scaled_dot_product_attention(q_NHD[:, :, None], k, v, enable_gqa=q.shape[1] != k.shape[1]))
    return torch.cat(outs)[:, :, 0]


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
