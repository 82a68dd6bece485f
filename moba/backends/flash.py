"""The paper's algorithm on varlen flash attention (MoBA paper, algorithm 1): two flash calls merged by log-sum-exp.

The self part runs every block as a causal sequence of its own. The routed part runs, for every block and key/value
head, the queries that picked the block as one non-causal sequence over its keys. Forward, the two are merged with
the weights of the joint softmax. Backward, each part's flash backward gets the output and the log-sum-exp of the
*joint* softmax, which makes its probabilities and row sums the joint ones, so that the two parts' gradients simply
add up.

Under GQA the queries of all heads of a group stand in one list per (key/value head, block): a one-head problem in
which keys and values appear once. Lists without queries are left out, so no key is copied that nobody attends to,
and its routed gradient is zero by construction. Nothing is scattered with atomics: rows are gathered back to their
queries one pick at a time.

Heads do not depend on each other, so where all routed rows at once would take too much memory, the heads go through in
chunks. The host waits for the device once per chunk: the number of routed rows, of non-empty lists and the longest list
size the flash call.

Shapes: T queries, S keys, H query heads, G key/value heads, D head size, B block size, K = top_k, M block slots of
the pack, P routed (query head, query, block) picks = rows of the routed part, L non-empty lists.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moba.backends.refusals import FLASH_LISTS
from moba.backends.varlen import Primitive, default_primitive
from moba.documents import Documents
from moba.routing import BlockLayout, layout_means, score_dtype, select_blocks

# Elements of the gathered queries of a chunk of heads: 512 MiB of bfloat16 a copy; the backward pass has five.
ROW_ELEMENTS = 1 << 28


class _Picks(NamedTuple):
    """The routed part, list by list: which queries, over which keys. Tensors first, for autograd to save."""

    pick_P: Tensor
    """int64: position of the row's pick in [H, T, K-1], flattened."""
    cu_rows: Tensor
    """int32 [L+1]: bounds of the lists in the rows."""
    first_key_L: Tensor
    """int64: first key of each list's block."""
    key_head_L: Tensor
    """int64: their key/value head."""
    max_rows: int
    """Rows of the longest list."""
    block_size: int
    shape: tuple[int, int, int]
    """(H, T, K-1)"""

    def call(self, scale: float) -> tuple[Tensor, Tensor, int, int, bool, float]:
        """The varlen arguments after the tensors. Routed blocks are complete, so all lists have B keys."""
        cu_keys = torch.arange(self.cu_rows.numel(), dtype=torch.int32, device=self.cu_rows.device) * self.block_size
        return self.cu_rows, cu_keys, self.max_rows, self.block_size, False, scale

    def token_head(self) -> tuple[Tensor, Tensor]:
        """int64 [P], [P]: the query and the query head of each row."""
        _, num_tokens, num_picks = self.shape
        return self.pick_P // num_picks % num_tokens, self.pick_P // (num_picks * num_tokens)

    def key_index(self) -> tuple[Tensor, Tensor]:
        """int64 [L, B], [L, 1]: the keys and the key/value head of each list."""
        offset_B = torch.arange(self.block_size, device=self.first_key_L.device)
        return self.first_key_L[:, None] + offset_B, self.key_head_L[:, None]

    def row_of_pick(self) -> Tensor:
        """int64 [H, T, K-1]: the row that each pick became, -1 for none."""
        row = torch.full(self.shape, -1, dtype=torch.int64, device=self.pick_P.device)
        row.view(-1)[self.pick_P] = torch.arange(self.pick_P.numel(), device=row.device)
        return row


def _gather(x: Tensor, index: tuple[Tensor, Tensor]) -> Tensor:
    """x [tokens, heads, D] at index, flattened to one head: [rows, 1, D]."""
    return x[index].view(-1, 1, x.shape[-1])


def _collect_picks(selection_HTK: Tensor, layout: BlockLayout, num_kv_heads: int) -> _Picks | None:
    """Sorts the history picks by (key/value head, block); None if there is none. Waits for the device once."""
    history_HTk = selection_HTK[:, :, :-1]
    if history_HTk.numel() == 0:
        return None
    (num_heads, num_tokens, num_picks), device = history_HTk.shape, history_HTk.device
    num_lists = num_kv_heads * layout.num_blocks
    first_list_H = torch.arange(num_heads, device=device) // (num_heads // num_kv_heads) * layout.num_blocks
    list_HTk = history_HTk + layout.query_first_block_T[:, None] + first_list_H[:, None, None]
    sorted_list, pick = torch.where(history_HTk >= 0, list_HTk, num_lists).flatten().sort(stable=True)
    bounds = torch.searchsorted(sorted_list, torch.arange(num_lists + 1, device=device))
    rows_in_list = bounds.diff()
    sizes = torch.stack([bounds[-1], (rows_in_list > 0).sum(), rows_in_list.max()])
    num_rows, num_used, max_rows = sizes.tolist()  # the one synchronisation
    if num_rows == 0:
        return None
    used_L = (rows_in_list == 0).to(torch.uint8).argsort(stable=True)[:num_used]  # the non-empty lists, in order
    return _Picks(
        pick_P=pick[:num_rows].clone(),  # not the view: it would keep the unused picks alive until the backward pass
        cu_rows=torch.nn.functional.pad(rows_in_list[used_L].cumsum(0), (1, 0)).to(torch.int32),
        first_key_L=layout.start_M[used_L % layout.num_blocks],
        key_head_L=used_L // layout.num_blocks,
        max_rows=max_rows,
        block_size=layout.block_size,
        shape=(num_heads, num_tokens, num_picks),
    )


class _MixedAttention(torch.autograd.Function):
    """Self part and routed part as one softmax. Returns (out [T, H, D], lse [H, T]); lse carries no gradient."""

    @staticmethod
    def forward(ctx, q, k, v, selection_HTK, layout, scale, deterministic, varlen: Primitive):
        picks = _collect_picks(selection_HTK, layout, k.shape[1])
        cu_q, cu_k, longest = _own_blocks(layout)
        out, lse = varlen.forward(q, k, v, cu_q, cu_k, longest, longest, True, scale)
        if picks is not None:
            queries, keys = picks.token_head(), picks.key_index()
            rows = varlen.forward(_gather(q, queries), _gather(k, keys), _gather(v, keys), *picks.call(scale))
            out, lse = _merge(out, lse, *rows, picks.row_of_pick())
        # Everything large goes through save_for_backward, so that activation checkpointing can drop and recompute it.
        tensors, ctx.pick_sizes = (picks[:4], picks[4:]) if picks is not None else ((), None)
        ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k, *tensors)
        ctx.longest, ctx.scale, ctx.deterministic, ctx.varlen = longest, scale, deterministic, varlen
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, _dlse):  # pyright: ignore[reportIncompatibleMethodOverride]  # torch: *grad_outputs
        q, k, v, out, lse, cu_q, cu_k, *tensors = ctx.saved_tensors
        backward, scale, longest = ctx.varlen.backward, ctx.scale, ctx.longest
        dout = dout.contiguous()
        dq, dk, dv = backward(dout, q, k, v, out, lse, cu_q, cu_k, longest, longest, True, scale, ctx.deterministic)
        if tensors:
            picks = _Picks(*tensors, *ctx.pick_sizes)
            queries, keys = picks.token_head(), picks.key_index()
            token, head = queries
            dq_rows, dk_rows, dv_rows = backward(
                _gather(dout, queries),
                _gather(q, queries),
                _gather(k, keys),
                _gather(v, keys),
                _gather(out, queries),
                lse[head, token][None],
                *picks.call(scale),
                ctx.deterministic,
            )
            dq = _add_rows(dq, dq_rows, picks.row_of_pick())
            for grad, rows in ((dk, dk_rows), (dv, dv_rows)):
                grad[keys] = grad[keys] + rows.view(*keys[0].shape, -1)  # no key occurs twice
        return dq, dk, dv, None, None, None, None, None


def _own_blocks(layout: BlockLayout) -> tuple[Tensor, Tensor, int]:
    """int32 cu_q, cu_k [M+1] and the greatest length of the self part. Queries are the last tokens of their block."""
    slot = torch.arange(layout.num_blocks + 1, device=layout.start_M.device)
    cu_q = torch.searchsorted(layout.query_block_T, slot).to(torch.int32)
    cu_k = torch.nn.functional.pad(layout.start_M, (0, 1), value=layout.num_keys).to(torch.int32)
    return cu_q, cu_k, min(layout.block_size, layout.num_keys)


def _merge(out_THD, lse_HT, rows_P1D, row_lse_1P, row_HTk) -> tuple[Tensor, Tensor]:
    """The joint softmax of the self part and the picks: (out, lse), accumulated in lse's dtype."""
    pick_lse_HTk = torch.where(row_HTk >= 0, row_lse_1P[0, row_HTk.clamp(min=0)], float("-inf"))
    joint_HT = torch.cat([pick_lse_HTk, lse_HT[:, :, None]], dim=-1).logsumexp(-1)
    joint = out_THD.to(lse_HT.dtype) * (lse_HT - joint_HT).exp().T[:, :, None]
    for slot in range(row_HTk.shape[-1]):
        weight_HT = (pick_lse_HTk[:, :, slot] - joint_HT).exp()
        joint += rows_P1D[row_HTk[:, :, slot].clamp(min=0).T, 0] * weight_HT.T[:, :, None]
    return joint.to(out_THD.dtype), joint_HT


def _add_rows(x_THD: Tensor, rows_P1D: Tensor, row_HTk: Tensor) -> Tensor:
    """x plus every query's rows, summed in float32 in a fixed order (float64 for float64)."""
    total = x_THD.to(score_dtype(x_THD))
    for slot in range(row_HTk.shape[-1]):
        row_TH = row_HTk[:, :, slot].T
        total = total + rows_P1D[row_TH.clamp(min=0), 0].masked_fill((row_TH < 0)[:, :, None], 0)
    return total.to(x_THD.dtype)


def moba_flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    *,
    block_size: int,
    top_k: int,
    softmax_scale: float | None = None,
    deterministic: bool = False,
    varlen: Primitive | None = None,
    selection: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """MoBA attention: (out [T, H, D] in q's dtype, lse [H, T] float32, natural log); sizes as moba_attention's.

    `varlen` is the flash attention to build on; by default flash-attn or torch's own on CUDA, and a plain loop
    elsewhere. `deterministic` asks it for bitwise repeatable gradients. `selection`: int32 [H, T, K] of another gate
    (moba/gates.py); None = route. What it cannot do is said by moba/backends/refusals.py.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if q.shape[0] == 0:
        return q.clone(), q.new_empty(q.shape[1], 0, dtype=score_dtype(q))
    varlen = varlen or default_primitive(q)
    layout = documents.layout(block_size)
    chunks = _head_chunks(q.shape, k.shape[1], layout.num_blocks, top_k)
    selection_HTK = select_blocks(q, layout_means(k, layout), layout, top_k) if selection is None else selection
    parts = [
        _MixedAttention.apply(*qkv, selection_hTK, layout, scale, deterministic, varlen)
        for *qkv, selection_hTK in _split_heads(q, k, v, selection_HTK, chunks)
    ]
    outs, lses = zip(*parts)
    return (outs[0], lses[0]) if len(parts) == 1 else (torch.cat(outs, dim=1), torch.cat(lses))


def _head_chunks(q_shape, num_kv_heads: int, num_blocks: int, top_k: int) -> tuple[int, int]:
    """(key/value heads, query heads of each) that go through at a time, within ROW_ELEMENTS and FLASH_LISTS."""
    num_tokens, num_heads, head_dim = q_shape
    group = num_heads // num_kv_heads
    head_elements = num_tokens * (top_k - 1) * head_dim
    heads = max(1, ROW_ELEMENTS // max(1, head_elements))
    if heads < group:
        return 1, heads
    return min(num_kv_heads, heads // group, max(1, FLASH_LISTS // num_blocks)), group


def _split_heads(q: Tensor, k: Tensor, v: Tensor, selection_HTK: Tensor, chunks: tuple[int, int]):
    """Yields (q, k, v, selection) of every chunk of heads, as views."""
    num_kv_heads, group_heads = chunks
    group = q.shape[1] // k.shape[1]
    q_groups, selection_groups = q.split(num_kv_heads * group, dim=1), selection_HTK.split(num_kv_heads * group)
    k_groups, v_groups = k.split(num_kv_heads, dim=1), v.split(num_kv_heads, dim=1)
    for q_group, k_group, v_group, selection_group in zip(q_groups, k_groups, v_groups, selection_groups):
        step = q_group.shape[1] if group_heads == group else group_heads
        for q_part, selection_part in zip(q_group.split(step, dim=1), selection_group.split(step)):
            yield q_part, k_group, v_group, selection_part
