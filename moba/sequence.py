"""One sequence over several processes. Two ways to attend to tokens that other processes hold:

By heads (`SequenceAxis`; Ulysses, arXiv 2309.14509): each process holds a slice of the tokens, in order, and for the
time of an attention all tokens of a share of the heads. Whoever attends sees whole documents. Query heads are dealt as
evenly as they go, with the key/value heads they read; where two processes share a key/value head, both get it.

By blocks (`BlockAxis`): queries stay where they are, and the keys and values of all processes come to them. Each
process holds a slice from the front of the pack and its mirror image from the back, so that all have about the same
number of earlier keys. The queries of a slice are the last tokens of their documents' keys up to there, which every
backend knows from decoding; block means are made from the keys that have come, so they are those of one process.

Either way kinds, backends and their routing know nothing of it: a selection is that of one process for equal q and k.

The processes of a group call these functions together. Shapes: T tokens of a pack, t of them in this process's slice,
S processes, H query heads, h of them here, G and g key/value heads, D head size, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from moba.documents import Documents

Attention = Callable[[Tensor, Tensor, Tensor, Documents], Tensor]
Observer = Callable[[Tensor, Tensor, Tensor, Documents], None]


class SequenceAxis:
    """The processes that share sequences, by heads, and which slice of them this one holds."""

    def __init__(self, group: dist.ProcessGroup, rank: int, size: int):
        """`group`: the `size` processes; `rank`: this one's place among them."""
        assert 0 <= rank < size, (rank, size)
        self.group, self.rank, self.size = group, rank, size

    @property
    def owners(self) -> list[int]:
        """The process of each slice, in the order of the pack."""
        return list(range(self.size))

    @property
    def least_heads(self) -> int:
        """Query heads that an attention needs at least."""
        return self.size

    def slices(self, total: int, rank: int | None = None) -> list[slice]:
        """The rows of a process (None: of this one), of `total`: as even as they go."""
        rank = self.rank if rank is None else rank
        bounds = pairwise(_deal(total, len(self.owners)))
        return [slice(*ends) for ends, owner in zip(bounds, self.owners) if owner == rank]

    def counts(self, total: int) -> list[int]:
        """Number of rows of each process."""
        return [sum(rows.stop - rows.start for rows in self.slices(total, rank)) for rank in range(self.size)]

    def own(self, x: Tensor, before: int = 0) -> Tensor:
        """This process's rows of x [T, ...], and up to `before` rows ahead of each of its slices."""
        return _joined([x[max(rows.start - before, 0) : rows.stop] for rows in self.slices(len(x))])

    def join(self, x: Tensor, total: int) -> Tensor:
        """All rows [T, ...] of x [t, ...], on every process.

        Its gradient is this process's rows of the gradient of what all compute of it alike: not a sum over processes.
        """
        return _Join.apply(x, self, total, False)

    def halo(self, x_TC: Tensor, before: int, total: int) -> Tensor:
        """x [t, C] with the last `before` rows of the slice before it ahead of each slice (none before the first).

        ValueError if a slice has fewer rows than that.
        """
        shortest = total // len(self.owners)
        if shortest < before:
            raise ValueError(
                f"a pack of {total} tokens over {self.size} processes leaves {shortest} to each"
                f"{'' if len(self.owners) == self.size else ' slice'}: a key convolution of "
                f"width {before + 1} needs at least {before}"
            )
        if before == 0:
            return x_TC
        tails = list(_Tails.apply(x_TC, self, before, total).split(before))
        parts = []
        for rows, part in zip(self.slices(total), x_TC.split(self._lengths(total))):
            parts += [tails.pop(0), part] if rows.start else [part]
        # Who got none still sends back what it got: all take part in the backward pass.
        return torch.cat([*tails, *parts])

    def without_halo(self, x_TC: Tensor, before: int, total: int) -> Tensor:
        """The rows [t, C] of what `halo` has returned."""
        lengths = [length + before * (rows.start > 0) for rows, length in zip(self.slices(total), self._lengths(total))]
        own = zip(x_TC.split(lengths), self._lengths(total))
        return _joined([part[len(part) - length :] for part, length in own])

    def attend(
        self,
        q_tHD: Tensor,
        k_tGD: Tensor,
        v_tGD: Tensor,
        documents: Documents,
        attention: Attention,
        observer: Observer | None = None,
    ) -> Tensor:
        """[t, H, D]: `attention` of this process's tokens to those of the whole pack, which `documents` describe.

        `observer` is shown what this process attends with.
        """
        q_ThD, k_TgD, v_TgD = self.to_heads(q_tHD, k_tGD, v_tGD, documents.num_queries)
        if observer is not None:
            observer(q_ThD, k_TgD, v_TgD, documents)
        return self.to_tokens(attention(q_ThD, k_TgD, v_TgD, documents), q_tHD.shape[1])

    def heads(self, num_heads: int, num_kv_heads: int) -> tuple[int, int]:
        """(query heads, key/value heads) that this process attends with, h and g. ValueError unless all have one."""
        own = _shares(num_heads, num_kv_heads, self.size)[self.rank]
        return own.num_queries, own.num_queries if own.repeat else own.num_kv

    def to_heads(self, q_tHD: Tensor, k_tGD: Tensor, v_tGD: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
        """q [T, h, D] and k, v [T, g, D] of this process's heads, of a pack of `total` tokens."""
        shares = _shares(q_tHD.shape[1], k_tGD.shape[1], self.size)
        kv, repeat = [share.kv for share in shares], shares[self.rank].repeat
        q_ThD = _ToHeads.apply(q_tHD, self, [share.queries for share in shares], total)
        k_TgD, v_TgD = (_ToHeads.apply(x, self, kv, total) for x in (k_tGD, v_tGD))
        if repeat:
            index = torch.tensor(repeat, device=q_ThD.device)
            k_TgD, v_TgD = k_TgD.index_select(1, index), v_TgD.index_select(1, index)
        return q_ThD, k_TgD, v_TgD

    def to_tokens(self, out_ThD: Tensor, num_heads: int) -> Tensor:
        """[t, H, D]: all heads of this process's tokens, of [T, h, D]."""
        return _ToTokens.apply(out_ThD, self, num_heads)

    def swap(self, parts: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> Tensor:
        """Sends parts[i] to process i; returns what the processes sent here, of these shapes, end to end in one flat
        tensor."""
        return self._send(torch.cat([part.reshape(-1) for part in parts]), [part.numel() for part in parts], shapes)

    def swap_rows(self, x: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Sends each process its slice of x [T, ...]; returns what came from each, of these shapes."""
        sizes = [count * math.prod(x.shape[1:]) for count in self.counts(len(x))]
        parts = [x[rows] for rank in range(self.size) for rows in self.slices(len(x), rank)]
        sent = x if len(parts) == self.size else torch.cat(parts)
        flat = self._send(sent.reshape(-1), sizes, shapes).split([math.prod(shape) for shape in shapes])
        return [one.view(shape) for one, shape in zip(flat, shapes)]

    def sum(self, x: Tensor) -> Tensor:
        """x summed over the processes, in place."""
        dist.all_reduce(x, group=self.group)
        return x

    def _lengths(self, total: int) -> list[int]:
        return [rows.stop - rows.start for rows in self.slices(total)]

    def _send(self, sent: Tensor, sizes: list[int], shapes: Sequence[tuple[int, ...]]) -> Tensor:
        expected = [math.prod(shape) for shape in shapes]
        received = sent.new_empty(sum(expected))
        dist.all_to_all_single(received, sent, expected, sizes, group=self.group)
        return received


class BlockAxis(SequenceAxis):
    """The processes that share sequences, by blocks, and which two slices of them this one holds."""

    @property
    def owners(self) -> list[int]:
        return [*range(self.size), *reversed(range(self.size))]

    @property
    def least_heads(self) -> int:
        return 1

    def heads(self, num_heads: int, num_kv_heads: int) -> tuple[int, int]:
        """All of them."""
        return num_heads, num_kv_heads

    def attend(self, q_tHD, k_tGD, v_tGD, documents, attention, observer=None):
        total = documents.num_queries
        k_TGD, v_TGD = (_Join.apply(x, self, total, True) for x in (k_tGD, v_tGD))
        if observer is not None:
            observer(self.join(q_tHD.detach(), total), k_TGD, v_TGD, documents)
        outs = []
        for rows, q_nHD in zip(self.slices(total), q_tHD.split(self._lengths(total))):
            if len(q_nHD):
                keys, pieces = documents.stretch(rows.start, rows.stop)
                outs.append(attention(q_nHD, k_TGD[keys], v_TGD[keys], pieces))
        # Without tokens of its own it still takes part in what the others need of the backward pass.
        return _joined(outs) if outs else q_tHD + 0 * (k_TGD.sum() + v_TGD.sum())


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _deal(total: int, size: int) -> list[int]:
    """Bounds of `size` stretches of `total`, as even as they go."""
    return [total * i // size for i in range(size + 1)]


class _Share:
    """The heads of one process."""

    def __init__(self, first: int, last: int, group: int):
        """Query heads [first, last), of which `group` share a key/value head."""
        self.queries, self.kv = slice(first, last), slice(first // group, (last - 1) // group + 1)
        self.num_queries, self.num_kv = last - first, self.kv.stop - self.kv.start
        read = [head // group - self.kv.start for head in range(first, last)]
        even = len(read) % self.num_kv == 0 and read == sorted([*range(self.num_kv)] * (len(read) // self.num_kv))
        self.repeat: list[int] = [] if even else read
        """Where key/value heads are cut between processes: which of its own each query head reads."""


def _shares(num_heads: int, num_kv_heads: int, size: int) -> list[_Share]:
    if size > num_heads:
        raise ValueError(f"{size} processes for a sequence of {num_heads} heads: each needs at least one")
    return [_Share(first, last, num_heads // num_kv_heads) for first, last in pairwise(_deal(num_heads, size))]


class _ToHeads(torch.autograd.Function):
    """All tokens of some heads, of some tokens of all heads; `heads`: those of each process."""

    @staticmethod
    def forward(ctx, x_tHD, axis: SequenceAxis, heads: list[slice], total: int):
        ctx.axis, ctx.heads, ctx.shape = axis, heads, x_tHD.shape
        own, size = heads[axis.rank], x_tHD.shape[2]
        shapes = [(count, own.stop - own.start, size) for count in axis.counts(total)]
        return axis.swap([x_tHD[:, one] for one in heads], shapes).view(total, -1, size)

    @staticmethod
    def backward(ctx, grad_ThD):  # pyright: ignore[reportIncompatibleMethodOverride]  # torch: *grad_outputs
        num_tokens, num_heads, size = ctx.shape
        shapes = [(num_tokens, one.stop - one.start, size) for one in ctx.heads]
        received = ctx.axis.swap_rows(grad_ThD, shapes)
        if sum(shape[1] for shape in shapes) == num_heads:
            return torch.cat(received, 1), None, None, None
        # Heads that two processes read have a gradient from each.
        grad_tHD = grad_ThD.new_zeros(ctx.shape)
        for one, part in zip(ctx.heads, received):
            grad_tHD[:, one] += part
        return grad_tHD, None, None, None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out_ThD, axis: SequenceAxis, num_heads: int):
        total, _, size = out_ThD.shape
        ctx.axis, ctx.shape = axis, out_ThD.shape
        mine, heads = axis.counts(total)[axis.rank], _deal(num_heads, axis.size)
        shapes = [(mine, last - first, size) for first, last in pairwise(heads)]
        return torch.cat(axis.swap_rows(out_ThD, shapes), 1)

    @staticmethod
    def backward(ctx, grad_tHD):  # pyright: ignore[reportIncompatibleMethodOverride]  # torch: *grad_outputs
        axis, (total, own, size) = ctx.axis, ctx.shape
        heads = _deal(grad_tHD.shape[1], axis.size)
        parts = [grad_tHD[:, first:last] for first, last in pairwise(heads)]
        shapes = [(count, own, size) for count in axis.counts(total)]
        return axis.swap(parts, shapes).view(ctx.shape), None, None


class _Join(torch.autograd.Function):
    """All rows of what each process has some of; `summed`: whether the processes compute different things of them, so
    that gradients are summed over processes, in float32 at least and in the order of the ranks."""

    @staticmethod
    def forward(ctx, x, axis: SequenceAxis, total: int, summed: bool):
        ctx.axis, ctx.summed, ctx.shape = axis, summed, x.shape
        counts = axis.counts(total)
        rows = axis.swap([x] * axis.size, [(count, *x.shape[1:]) for count in counts]).view(total, *x.shape[1:])
        if len(axis.owners) == axis.size:
            return rows
        order = [one for rank in range(axis.size) for one in axis.slices(total, rank)]
        parts = zip(order, rows.split([one.stop - one.start for one in order]))
        return torch.cat([part for _, part in sorted(parts, key=lambda pair: (pair[0].start, pair[0].stop))])

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]  # torch: *grad_outputs
        axis = ctx.axis
        if not ctx.summed:
            return axis.own(grad), None, None, None
        first, *others = axis.swap_rows(grad, [ctx.shape] * axis.size)
        total = first.to(torch.promote_types(grad.dtype, torch.float32), copy=True)
        for other in others:
            total += other
        return total.to(grad.dtype), None, None, None


class _Tails(torch.autograd.Function):
    """The last `rows` rows of the slice before each of this process's slices; none for the first of the pack."""

    @staticmethod
    def forward(ctx, x_tC, axis: SequenceAxis, rows: int, total: int):
        ctx.axis, ctx.rows, ctx.total, ctx.shape = axis, rows, total, x_tC.shape
        ends = _ends(axis, total)
        sent = [[x_tC[ends[g] - rows : ends[g]] for g in _passed(axis, axis.rank, to)] for to in range(axis.size)]
        came = [_passed(axis, source, axis.rank) for source in range(axis.size)]
        parts = _exchange(axis, sent, [len(slices) * rows for slices in came], x_tC)
        found = dict(zip((g for slices in came for g in slices), parts.split(rows)))
        return torch.cat([parts[:0], *(found[g] for g in sorted(found))])

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]  # torch: *grad_outputs
        axis, rows = ctx.axis, ctx.rows
        came = [_passed(axis, source, axis.rank) for source in range(axis.size)]
        part = dict(zip(sorted(g for slices in came for g in slices), grad.split(rows)))
        went = [_passed(axis, axis.rank, to) for to in range(axis.size)]
        sent = [[part[g] for g in slices] for slices in came]
        back = _exchange(axis, sent, [len(slices) * rows for slices in went], grad)
        whole, ends = grad.new_zeros(ctx.shape), _ends(axis, ctx.total)
        for g, one in zip((g for slices in went for g in slices), back.split(rows)):
            whole[ends[g] - rows : ends[g]] = one
        return whole, None, None, None


def _passed(axis: SequenceAxis, source: int, target: int) -> list[int]:
    """The slices of the pack that `source` holds whose next is held by `target`."""
    return [g for g, pair in enumerate(pairwise(axis.owners)) if pair == (source, target)]


def _ends(axis: SequenceAxis, total: int) -> dict[int, int]:
    """Where each slice that this process holds ends among its rows."""
    own = [g for g, owner in enumerate(axis.owners) if owner == axis.rank]
    return dict(zip(own, accumulate(rows.stop - rows.start for rows in axis.slices(total))))


def _exchange(axis: SequenceAxis, sent: list[list[Tensor]], received: list[int], like: Tensor) -> Tensor:
    """What came here, [sum of received, C], for the rows sent to each process."""
    parts = [torch.cat([like[:0], *one]) for one in sent]
    return axis.swap(parts, [(count, *like.shape[1:]) for count in received]).view(-1, *like.shape[1:])
