"""One sequence over several processes, by heads (Ulysses, arXiv 2309.14509): each holds a slice of the tokens, in
order, and for the time of an attention all tokens of a share of the heads.

Whoever attends sees whole documents, so kinds, backends and their routing know nothing of it: a head's selection is
that of one process for equal q and k. Query heads are dealt as evenly as they go, with the key/value heads they read;
where two processes share a key/value head, both get it.

The processes of a group call these functions together. Shapes: T tokens of a pack, t of them in this process's slice,
S processes, H query heads, h of them here, G and g key/value heads, D head size, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor


class SequenceAxis:
    """The processes that share sequences, and which slice of them this one holds."""

    def __init__(self, group: dist.ProcessGroup, rank: int, size: int):
        """`group`: the `size` processes; `rank`: this one's place among them."""
        assert 0 <= rank < size, (rank, size)
        self.group, self.rank, self.size = group, rank, size

    def slices(self, total: int) -> list[slice]:
        """The rows of each process, of `total`: as even as they go."""
        return [slice(*bounds) for bounds in pairwise(_deal(total, self.size))]

    def own(self, x: Tensor, before: int = 0) -> Tensor:
        """This process's rows of x [T, ...], and up to `before` rows of the slices before them."""
        mine = self.slices(len(x))[self.rank]
        return x[max(mine.start - before, 0) : mine.stop]

    def join(self, x: Tensor, total: int) -> Tensor:
        """All rows [T, ...] of x [t, ...], on every process.

        Its gradient is this process's rows of the gradient of what all compute of it alike: not a sum over processes.
        """
        return _Join.apply(x, self, total)

    def halo(self, x_TC: Tensor, before: int, total: int) -> Tensor:
        """x [t, C] behind the last `before` rows of the slice before it (none before the first slice).

        ValueError if a slice has fewer rows than that.
        """
        shortest = total // self.size
        if shortest < before:
            raise ValueError(
                f"a pack of {total} tokens over {self.size} processes leaves {shortest} to each: a key convolution of "
                f"width {before + 1} needs at least {before}"
            )
        return torch.cat([_Tail.apply(x_TC, self, before), x_TC])

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
        sizes = [(rows.stop - rows.start) * math.prod(x.shape[1:]) for rows in self.slices(len(x))]
        flat = self._send(x.reshape(-1), sizes, shapes).split([math.prod(shape) for shape in shapes])
        return [one.view(shape) for one, shape in zip(flat, shapes)]

    def sum(self, x: Tensor) -> Tensor:
        """x summed over the processes, in place."""
        dist.all_reduce(x, group=self.group)
        return x

    def _send(self, sent: Tensor, sizes: list[int], shapes: Sequence[tuple[int, ...]]) -> Tensor:
        expected = [math.prod(shape) for shape in shapes]
        received = sent.new_empty(sum(expected))
        dist.all_to_all_single(received, sent, expected, sizes, group=self.group)
        return received


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
        shapes = [(rows.stop - rows.start, own.stop - own.start, size) for rows in axis.slices(total)]
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
        mine, heads = axis.slices(total)[axis.rank], _deal(num_heads, axis.size)
        shapes = [(mine.stop - mine.start, last - first, size) for first, last in pairwise(heads)]
        return torch.cat(axis.swap_rows(out_ThD, shapes), 1)

    @staticmethod
    def backward(ctx, grad_tHD):  # pyright: ignore[reportIncompatibleMethodOverride]  # torch: *grad_outputs
        axis, (total, own, size) = ctx.axis, ctx.shape
        heads = _deal(grad_tHD.shape[1], axis.size)
        parts = [grad_tHD[:, first:last] for first, last in pairwise(heads)]
        shapes = [(rows.stop - rows.start, own, size) for rows in axis.slices(total)]
        return axis.swap(parts, shapes).view(ctx.shape), None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis: SequenceAxis, total: int):
        ctx.axis = axis
        shapes = [(rows.stop - rows.start, *x.shape[1:]) for rows in axis.slices(total)]
        return axis.swap([x] * axis.size, shapes).view(total, *x.shape[1:])

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]  # torch: *grad_outputs
        return ctx.axis.own(grad), None, None


class _Tail(torch.autograd.Function):
    """The last `rows` rows of the slice before this one; none for the first."""

    @staticmethod
    def forward(ctx, x_tC, axis: SequenceAxis, rows: int):
        ctx.axis, ctx.rows, ctx.shape = axis, rows, x_tC.shape
        return _shift(axis, x_tC[len(x_tC) - rows :], rows, to=1)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]  # torch: *grad_outputs
        received = _shift(ctx.axis, grad, ctx.rows, to=-1)
        whole = grad.new_zeros(ctx.shape)
        whole[ctx.shape[0] - len(received) :] = received
        return whole, None, None


def _shift(axis: SequenceAxis, x: Tensor, rows: int, to: int) -> Tensor:
    """Sends x to the process `to` places on, if there is one; what came here from the other side, or no rows."""
    nothing, target, source = x[:0], axis.rank + to, axis.rank - to
    parts = [x if i == target else nothing for i in range(axis.size)]
    shapes = [(rows if i == source else 0, *x.shape[1:]) for i in range(axis.size)]
    return axis.swap(parts, shapes).view(-1, *x.shape[1:])
