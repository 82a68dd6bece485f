"""The `torch` backend: block-sparse MoBA attention in plain PyTorch, on any device.

Key-major: the queries that chose a block form a list, and each list is one matrix product with the keys of its block.
Short lists are padded and multiplied together, long ones are cut, so that a step always works on about the same number
of scores. Every pick of a query gives a partial output and a log-sum-exp, and the picks of a query are merged at the
end. So nothing is computed for a block that was not chosen, keys are copied once a list and not once per query, and the
workspace is bounded whatever the length. The backward pass recomputes the probabilities from the log-sum-exp.

Sums run in a fixed order (only zeros of padding are added out of order), so results repeat bit for bit. The lengths of
the lists are needed on the host: on CUDA two synchronisations for each chunk of queries and pass.

Shapes: T queries, S keys, H query heads, G key/value heads, R = H / G, D head size, K = top_k, M block slots; C queries
of a chunk; L lists of a step, n rows and b keys of each. A slot is one pick of one (query, head): its position in
[C, H, K], flattened.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from moba.documents import Documents
from moba.routing import BlockLayout, full_precision, layout_means, score_dtype, select_blocks

# Partial outputs [C, H, K, D] that exist at a time (64 MiB of float32).
PARTIAL_ELEMENTS = 1 << 24
# Scores [L, n, b] of a step: few enough for the cache of a CPU core, enough for efficient products.
STEP_ELEMENTS = 1 << 19
# Queries of a piece on the diagonal: the fewer, the less is computed above it.
DIAGONAL_QUERIES = 64


class _Piece(NamedTuple):
    """A list, or a part of one that is too long for a step."""

    num_rows: int
    first_row: int
    """Position in the sorted slots."""
    first_key: int
    num_keys: int
    kv_head: int
    first_offset: int | None
    """On the diagonal (keys of the queries' own block): position of the first query within the block."""


class _Step(NamedTuple):
    """Several pieces, padded to one size."""

    slot_Ln: torch.Tensor
    """int64: slots of the rows; C * H * K where there is none."""
    key_Lb: torch.Tensor
    """int64: rows of k and v seen as [S * G, D]."""
    future_Lnc: torch.Tensor | None
    """bool: the last c keys of the rows that are not to be seen; None if all are."""


def moba_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    documents: Documents,
    *,
    block_size: int,
    top_k: int,
    softmax_scale: float | None = None,
    selection: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [T, H, D] in q's dtype, log-sum-exp [H, T] in float32, or float64 for float64 inputs, without gradient).

    Sizes as for `moba.moba_attention`, which checks them. Queries may lie anywhere in their documents. Half precisions
    are computed in float32. `selection`: int32 [H, T, K] of another gate (moba/gates.py); None = route.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    layout = documents.layout(block_size)
    selection_HTK = select_blocks(q, layout_means(k, layout), layout, top_k) if selection is None else selection
    return _BlockSparse.apply(q, k, v, selection_HTK, layout, scale)


class _BlockSparse(torch.autograd.Function):
    """Attention of every query to its selected blocks, as one softmax."""

    @staticmethod
    def forward(ctx, q, k, v, selection_HTK, layout, scale):
        num_queries, num_heads, head_dim = q.shape
        top_k, dtype = selection_HTK.shape[-1], score_dtype(q)
        k_rows, v_rows = k.reshape(-1, head_dim), v.reshape(-1, head_dim)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse_TH = q.new_empty(num_queries, num_heads, dtype=dtype)
        with full_precision(q.device):
            for start, stop in _chunks(num_queries, num_heads * top_k * head_dim):
                num_slots = (stop - start) * num_heads * top_k
                q_rows = q[start:stop].reshape(-1, head_dim)
                # One place more, for padding.
                partial = q.new_zeros(num_slots + 1, head_dim, dtype=dtype)
                partial_lse = q.new_full((num_slots + 1,), float("-inf"), dtype=dtype)
                for step in _steps(selection_HTK, layout, start, stop, k.shape[1]):
                    scores_Lnb, _, _ = _scores(q_rows, k_rows, step, top_k, scale, dtype)
                    peak_Ln1 = scores_Lnb.amax(dim=-1, keepdim=True)
                    probs_Lnb = scores_Lnb.sub_(peak_Ln1).exp_()
                    total_Ln1 = probs_Lnb.sum(dim=-1, keepdim=True)
                    out_LnD = torch.bmm(probs_Lnb, _rows(v_rows, step.key_Lb, dtype)).div_(total_Ln1)
                    slots = step.slot_Ln.flatten()
                    partial.index_copy_(0, slots, out_LnD.flatten(0, 1))
                    partial_lse.index_copy_(0, slots, total_Ln1.log_().add_(peak_Ln1).flatten())
                lse_rK = partial_lse[:-1].view(-1, top_k)
                lse_r1 = lse_rK.logsumexp(dim=-1, keepdim=True)
                weight_r1K = (lse_rK - lse_r1).exp_()[:, None]
                out[start:stop] = torch.bmm(weight_r1K, partial[:-1].view(-1, top_k, head_dim)).view(
                    out[start:stop].shape
                )
                lse_TH[start:stop] = lse_r1.view(-1, num_heads)
        lse_HT = lse_TH.T.contiguous()
        ctx.save_for_backward(q, k, v, out, lse_HT, selection_HTK)
        ctx.layout, ctx.scale = layout, scale
        ctx.mark_non_differentiable(lse_HT)
        return out, lse_HT

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, _dlse):  # pyright: ignore[reportIncompatibleMethodOverride]  # torch: *grad_outputs
        q, k, v, out, lse_HT, selection_HTK = ctx.saved_tensors
        num_queries, num_heads, head_dim = q.shape
        top_k, dtype = selection_HTK.shape[-1], lse_HT.dtype
        k_rows, v_rows = k.reshape(-1, head_dim), v.reshape(-1, head_dim)
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        dk_rows, dv_rows = torch.zeros_like(k_rows, dtype=dtype), torch.zeros_like(v_rows, dtype=dtype)
        with full_precision(q.device):
            for start, stop in _chunks(num_queries, num_heads * top_k * head_dim):
                num_slots = (stop - start) * num_heads * top_k
                q_rows, dout_rows = q[start:stop].reshape(-1, head_dim), dout[start:stop].reshape(-1, head_dim)
                delta_r = (dout[start:stop].to(dtype) * out[start:stop].to(dtype)).sum(dim=-1).flatten()
                # Padding has an infinite log-sum-exp, so its probabilities are 0.
                lse_r = torch.nn.functional.pad(lse_HT[:, start:stop].T.flatten(), (0, 1), value=float("inf"))
                partial = q.new_zeros(num_slots + 1, head_dim, dtype=dtype)
                for step in _steps(selection_HTK, ctx.layout, start, stop, k.shape[1]):
                    scores_Lnb, q_LnD, k_LbD = _scores(q_rows, k_rows, step, top_k, ctx.scale, dtype)
                    row_Ln = step.slot_Ln // top_k
                    probs_Lnb = scores_Lnb.sub_(lse_r[row_Ln][:, :, None]).exp_()
                    row_Ln = row_Ln.clamp(max=q_rows.shape[0] - 1)
                    dout_LnD = _rows(dout_rows, row_Ln, dtype)
                    keys = step.key_Lb.flatten()
                    dv_rows.index_add_(0, keys, torch.bmm(probs_Lnb.mT, dout_LnD).flatten(0, 1))
                    dprobs_Lnb = torch.bmm(dout_LnD, _rows(v_rows, step.key_Lb, dtype).mT)
                    dscores_Lnb = dprobs_Lnb.sub_(delta_r[row_Ln][:, :, None]).mul_(probs_Lnb)
                    # q_LnD holds the scale already.
                    dk_rows.index_add_(0, keys, torch.bmm(dscores_Lnb.mT, q_LnD).flatten(0, 1))
                    partial.index_copy_(0, step.slot_Ln.flatten(), torch.bmm(dscores_Lnb, k_LbD).flatten(0, 1))
                dq_rows = partial[:-1].view(-1, top_k, head_dim).sum(dim=1)
                dq[start:stop] = dq_rows.mul_(ctx.scale).view(dq[start:stop].shape)
        return dq, dk_rows.view(k.shape).to(k.dtype), dv_rows.view(v.shape).to(v.dtype), None, None, None


def _scores(q_rows, k_rows, step: _Step, top_k: int, scale: float, dtype: torch.dtype):
    """(masked scores [L, n, b], scaled queries [L, n, D], keys [L, b, D]) of a step, in `dtype`."""
    q_LnD = _rows(q_rows, (step.slot_Ln // top_k).clamp_(max=q_rows.shape[0] - 1), dtype).mul_(scale)
    k_LbD = _rows(k_rows, step.key_Lb, dtype)
    scores_Lnb = torch.bmm(q_LnD, k_LbD.mT)
    if step.future_Lnc is not None:
        scores_Lnb[:, :, -step.future_Lnc.shape[-1] :].masked_fill_(step.future_Lnc, float("-inf"))
    return scores_Lnb, q_LnD, k_LbD


def _rows(x: torch.Tensor, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Copies of the rows of x [rows, D] at index [...], [..., D] in `dtype`."""
    return x.index_select(0, index.flatten()).to(dtype).view(*index.shape, -1)


def _chunks(num_queries: int, elements: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of chunks of queries, each of which needs `elements` of partial results."""
    size = max(1, PARTIAL_ELEMENTS // elements)
    for start in range(0, num_queries, size):
        yield start, min(start + size, num_queries)


def _steps(selection_HTK, layout: BlockLayout, start: int, stop: int, num_kv_heads: int) -> Iterator[_Step]:
    """The work of the queries [start, stop): every pick in exactly one step."""
    num_heads, _, top_k = selection_HTK.shape
    sorted_slots, pieces = _lists(selection_HTK[:, start:stop], layout, start, num_kv_heads)
    offset_C = layout.query_position_T[start:stop] % layout.block_size
    for group in _groups(pieces):
        table = torch.tensor([piece[:5] for piece in group], device=sorted_slots.device)
        num_rows_L1, first_row_L1, first_key_L1, _, kv_head_L1 = table.T[:, :, None]
        num_keys = max(piece.num_keys for piece in group)
        row_n = torch.arange(group[0].num_rows, device=table.device)
        key_b = torch.arange(num_keys, device=table.device)
        slot_Ln = sorted_slots[(first_row_L1 + row_n).clamp_(max=sorted_slots.numel() - 1)]
        slot_Ln.masked_fill_(row_n >= num_rows_L1, (stop - start) * num_heads * top_k)
        key_Lb = (first_key_L1 + key_b).clamp_(max=layout.num_keys - 1) * num_kv_heads + kv_head_L1
        future_Lnc = None
        if group[0].first_offset is not None:
            query_Ln = (slot_Ln // (top_k * num_heads)).clamp_(max=stop - start - 1)
            key_c = key_b[min(piece.first_offset for piece in group if piece.first_offset is not None) + 1 :]
            future_Lnc = key_c > offset_C[query_Ln][:, :, None] if key_c.numel() else None
        yield _Step(slot_Ln, key_Lb, future_Lnc)


def _lists(selection_HCK, layout: BlockLayout, start: int, num_kv_heads: int) -> tuple[torch.Tensor, list[_Piece]]:
    """The chunk's slots sorted by (history or own block, key/value head, block), and the pieces that cover them."""
    num_heads, chunk, top_k = selection_HCK.shape
    num_blocks, device = layout.num_blocks, selection_HCK.device
    num_lists = num_kv_heads * num_blocks
    head_list_H1 = torch.arange(num_heads, device=device)[:, None] // (num_heads // num_kv_heads) * num_blocks
    kind_list_K = torch.where(torch.arange(top_k, device=device) == top_k - 1, num_lists, 0)
    first_block_C = layout.query_first_block_T[start : start + chunk]
    list_CHK = selection_HCK.transpose(0, 1) + (first_block_C + head_list_H1).T[:, :, None] + kind_list_K
    list_CHK = torch.where(selection_HCK.transpose(0, 1) >= 0, list_CHK, 2 * num_lists).to(torch.int32)
    sorted_list, sorted_slots = list_CHK.flatten().sort(stable=True)
    every_list = torch.arange(2 * num_lists + 1, dtype=torch.int32, device=device)
    bounds = torch.searchsorted(sorted_list, every_list).tolist()
    first_query_M = torch.searchsorted(layout.query_block_T, torch.arange(num_blocks, device=device)).clamp_(min=start)
    first_offset_M = layout.query_position_T[first_query_M.clamp_(max=start + chunk - 1)] % layout.block_size
    blocks = torch.stack([layout.start_M, first_offset_M]).T.tolist()
    pieces = []
    for index in range(2 * num_lists):
        if bounds[index] < bounds[index + 1]:
            own, (kv_head, block) = index >= num_lists, divmod(index % num_lists, num_blocks)
            first_key, first_offset = blocks[block]
            rows = range(bounds[index], bounds[index + 1])
            if own:
                pieces += _diagonal_pieces(rows, first_key, kv_head, first_offset, num_heads // num_kv_heads)
            else:
                pieces += _history_pieces(rows, first_key, layout.block_size, kv_head)
    return sorted_slots, pieces


def _history_pieces(rows: range, first_key: int, num_keys: int, kv_head: int) -> Iterator[_Piece]:
    """Cuts a list of queries that see all of a block."""
    size = max(1, STEP_ELEMENTS // num_keys)
    for row in range(rows.start, rows.stop, size):
        yield _Piece(min(size, rows.stop - row), row, first_key, num_keys, kv_head, None)


def _diagonal_pieces(rows: range, first_key: int, kv_head: int, first_offset: int, group: int) -> Iterator[_Piece]:
    """Cuts the list of a block's own queries, `group` rows each; a piece needs no keys after its last query."""
    size = group * DIAGONAL_QUERIES
    for row in range(rows.start, rows.stop, size):
        num_rows, offset = min(size, rows.stop - row), first_offset + (row - rows.start) // group
        yield _Piece(num_rows, row, first_key, offset + num_rows // group, kv_head, offset)


def _groups(pieces: list[_Piece]) -> Iterator[list[_Piece]]:
    """Groups pieces of similar size, the longest first, as many as make one step. No two of a step share keys."""
    group: list[_Piece] = []
    num_keys, seen = 0, set()
    for piece in sorted(pieces, key=lambda piece: (piece.first_offset is None, -piece.num_rows, piece.num_keys)):
        num_keys, place = max(num_keys, piece.num_keys), (piece.first_key, piece.kv_head)
        if group:
            same_kind = (piece.first_offset is None) == (group[0].first_offset is None)
            fits = (len(group) + 1) * group[0].num_rows * num_keys <= STEP_ELEMENTS
            if not (same_kind and fits and 2 * piece.num_rows >= group[0].num_rows and place not in seen):
                yield group
                group, num_keys, seen = [], piece.num_keys, set()
        group.append(piece)
        seen.add(place)
    if group:
        yield group
