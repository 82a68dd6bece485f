"""Which blocks each query attends to: block layout of a pack, block means, gate scores, and the choice of the best.

`route` is the selection that every fast backend uses. It is vectorised over the pack, works through the queries in
chunks so that the scores [H, T, blocks] never exist at once, reads no values of device tensors (no host
synchronisation), and gives the same bits whenever it is repeated, which activation checkpointing and resuming rely
on.

Shapes: T queries, S keys, H query heads, G key/value heads, R = H / G, D head size, N documents, M block slots of a
pack, B tokens of a block, C queries of a chunk, K = top_k.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch

from moba.checks import check_blocks, check_tensors
from moba.documents import Documents
from moba.kinds.moba import check_first_blocks

# Work sizes of one chunk. The elements, of scores or of float32 queries, bound memory (64 MiB). On the CPU the limit on
# queries keeps the range of blocks that a chunk can see narrow, so that causal and packed batches do not score every
# query against every block. On a GPU each chunk costs some thirty launches.
SCORE_ELEMENTS = 1 << 24
MEAN_ELEMENTS = 1 << 24
CHUNK_QUERIES = 4096
# Matrix products on a CPU sum the columns at the ragged edge of a tile in another order than the others, and equal
# blocks would get scores that differ in the last bit. With whole tiles they are equal, and the earlier block wins.
CPU_COLUMNS = 64


@dataclass(frozen=True)
class BlockLayout:
    """Where the blocks of a pack lie. They are cut from each document's start, so a document's last may be short.

    Blocks are numbered through the pack, document by document. The tensors have room for `num_blocks` = S // B + N of
    them, the most there can be: the true number is a value on the device. Unused slots, at the end, have start = end
    = S and document = N. Documents makes it once per pack; it holds for all layers with the same block size.
    """

    block_size: int
    num_queries: int
    num_keys: int
    num_blocks: int
    """Slots for blocks, M."""
    first_block_N: torch.Tensor
    """int64 [N+1]: number of blocks before each document; the last entry is the number of blocks of the pack."""
    start_M: torch.Tensor
    """int64 [M]: first key of the block, counted through the pack."""
    end_M: torch.Tensor
    """int64 [M]: one past its last key."""
    document_M: torch.Tensor
    """int64 [M]: document of the block."""
    query_document_T: torch.Tensor
    """int64 [T]: document of each query."""
    query_position_T: torch.Tensor
    """int64 [T]: the query's position among the keys of its document."""
    query_block_T: torch.Tensor
    """int64 [T]: block that holds the query, counted through the pack."""
    known: tuple[tuple[int, ...], ...] | None
    """On the host, of each document: one past its last query, that query's position, and the document's first block;
    None where lengths are not known there."""

    @classmethod
    def build(cls, block_size: int, documents: Documents) -> BlockLayout:
        """The layout of a pack, its tensors on the device of its documents."""
        device = documents.device
        num_queries, num_keys, num_documents = documents.num_queries, documents.num_keys, documents.number
        bounds_N = documents.cu_seqlens.long()
        bounds_k_N = bounds_N if documents.cu_seqlens_k is None else documents.cu_seqlens_k.long()
        num_blocks = num_keys // block_size + num_documents
        lengths_N = bounds_k_N.diff()
        first_block_N = torch.nn.functional.pad(((lengths_N + block_size - 1) // block_size).cumsum(0), (1, 0))

        slot_M = torch.arange(num_blocks, device=device)
        document_M = torch.searchsorted(first_block_N[1:], slot_M, right=True)
        document = document_M.clamp(max=num_documents - 1)
        used = document_M < num_documents
        start_M = (bounds_k_N[document] + (slot_M - first_block_N[document]) * block_size).where(used, num_keys)
        end_M = torch.minimum(start_M + block_size, bounds_k_N[document + 1]).where(used, num_keys)

        query_T = torch.arange(num_queries, device=device)
        query_document_T = torch.searchsorted(bounds_N[1:], query_T, right=True).clamp(max=num_documents - 1)
        first_position_N = documents.first_positions()
        query_position_T = query_T - bounds_N[query_document_T] + first_position_N[query_document_T]
        query_block_T = first_block_N[query_document_T] + query_position_T // block_size
        known, lengths, lengths_k = None, documents.lengths, documents.lengths_k
        if lengths is not None and lengths_k is not None:
            starts = documents.starts or [keys - own for keys, own in zip(lengths_k, lengths)]
            last = tuple(start + own - 1 for start, own in zip(starts, lengths))
            blocks = [-(-keys // block_size) for keys in lengths_k]
            known = tuple(accumulate(lengths)), last, tuple(accumulate(blocks, initial=0))
        return cls(
            block_size, num_queries, num_keys, num_blocks, first_block_N, start_M, end_M, document_M,
            query_document_T, query_position_T, query_block_T, known,
        )  # fmt: skip

    @property
    def query_first_block_T(self) -> torch.Tensor:
        """int64 [T]: first block of each query's document."""
        return self.first_block_N[self.query_document_T]

    def candidates(self, start: int, stop: int) -> tuple[int, int]:
        """Range [low, high) of blocks holding all history of queries [start, stop); tight where lengths are known."""
        if self.known is None:
            return 0, self.num_blocks
        end_N, last_N, first_N = self.known
        document, last_document = bisect_right(end_N, start), bisect_right(end_N, stop - 1)
        position = last_N[last_document] - (end_N[last_document] - stop)
        return first_N[document], first_N[last_document] + position // self.block_size


def route(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    block_size: int,
    top_k: int,
    first_blocks: int = 0,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    backend: str = "torch",
) -> torch.Tensor:
    """Returns the blocks each query attends to, int32 [H, T, K]: earlier blocks in ascending order, then the query's
    own block; -1s in front if there are fewer than K.

    Block indices count from the start of the query's document. q is [T, H, D], k is [S, G, D]; every query head selects
    its own blocks, using the means of its key head. Candidates are the blocks wholly before the query's own block.
    Their score is <q, mean>, unscaled, in float32 (float64 for float64 inputs); ties go to the earlier block (MoBA
    paper, section 2.2). The first `first_blocks` blocks of the document are always selected if they are candidates; 0
    as in the paper. No gradient. Rows with non-finite scores give a valid, causal, but unspecified selection.
    `backend`: "torch", or "triton" for what `moba_attention` selects there, which may differ where scores are equal but
    for rounding; to record a selection, use the backend that attends. Raises ValueError for bad arguments.
    """
    check_blocks(block_size, top_k)
    check_first_blocks(first_blocks, top_k)
    check_tensors(q, k)
    documents = Documents.from_bounds(cu_seqlens, cu_seqlens_k, q.shape[0], k.shape[0], q.device)
    if backend == "triton":
        from moba.backends.triton_attention import route_triton

        return route_triton(q, k, documents, block_size, top_k, first_blocks)
    if backend != "torch":
        raise ValueError(f"backend={backend!r}: choose torch or triton")
    layout = documents.layout(block_size)
    return select_blocks(q, layout_means(k, layout), layout, top_k, first_blocks)


def block_means(k: torch.Tensor, block_size: int) -> torch.Tensor:
    """Mean key of every block of one document, float32 [M, G, D] (float64 for float64 keys): S // B + 1 slots, as in
    BlockLayout."""
    return layout_means(k, BlockLayout.build(block_size, Documents.from_lengths([k.shape[0]], device=k.device)))


@torch.no_grad()
def layout_means(k: torch.Tensor, layout: BlockLayout) -> torch.Tensor:
    """Mean key of every block of the layout, float32 [M, G, D] (float64 for float64 keys); 0 in unused slots."""
    num_keys, num_kv_heads, head_dim = k.shape
    means_MGD = k.new_zeros(layout.num_blocks, num_kv_heads, head_dim, dtype=score_dtype(k))
    if num_keys == 0:
        return means_MGD
    offset_B = torch.arange(layout.block_size, device=k.device)
    step = max(1, MEAN_ELEMENTS // (layout.block_size * num_kv_heads * head_dim))
    for i in range(0, layout.num_blocks, step):
        start, end = layout.start_M[i : i + step, None], layout.end_M[i : i + step, None]
        index_mB = start + offset_B
        keys_mBGD = k[index_mB.clamp(max=num_keys - 1)].to(means_MGD.dtype)
        keys_mBGD = keys_mBGD.masked_fill_((index_mB >= end)[:, :, None, None], 0)
        means_MGD[i : i + step] = keys_mBGD.sum(dim=1) / (end - start).clamp(min=1)[:, :, None]
    return means_MGD


@torch.no_grad()
def select_blocks(
    q: torch.Tensor, means_MGD: torch.Tensor, layout: BlockLayout, top_k: int, first_blocks: int = 0
) -> torch.Tensor:
    """`route` from means that are at hand: int32 [H, T, K]. Means of incomplete blocks are never used."""
    num_heads, head_dim = q.shape[1:]

    def score(queries: slice, blocks: slice) -> torch.Tensor:
        return gate_scores(q[queries], means_MGD[blocks])

    step = max(1, SCORE_ELEMENTS // (num_heads * max(layout.num_blocks, head_dim)))
    return select_by_score(score, num_heads, layout, top_k, first_blocks, step, q.device)


def select_by_score(
    score: Callable[[slice, slice], torch.Tensor],
    num_heads: int,
    layout: BlockLayout,
    top_k: int,
    first_blocks: int,
    step: int,
    device: torch.device,
) -> torch.Tensor:
    """The selection int32 [H, T, K] of the own block and the top_k - 1 history blocks of greatest score, of equal ones
    the earlier; the document's `first_blocks` first come before any score. score(queries, blocks of the pack) gives
    [H, C, m], which is overwritten; it is asked for `step` queries at a time, at most."""
    num_queries = layout.num_queries
    selection_HTK = torch.full((num_heads, num_queries, top_k), -1, dtype=torch.int32, device=device)
    first_block_T = layout.query_first_block_T
    selection_HTK[:, :, -1] = layout.query_block_T - first_block_T
    if top_k == 1:
        return selection_HTK
    if device.type == "cpu":
        step = min(step, CHUNK_QUERIES)
    for start in range(0, num_queries, step):
        stop = min(start + step, num_queries)
        low, high = layout.candidates(start, stop)
        if low >= high:
            continue
        column_m = torch.arange(low, high, device=device)
        first_C1, own_C1 = first_block_T[start:stop, None], layout.query_block_T[start:stop, None]
        scores_HCm = score(slice(start, stop), slice(low, high))
        if first_blocks:
            scores_HCm.masked_fill_(column_m < first_C1 + first_blocks, float("inf"))
        scores_HCm.masked_fill_((column_m < first_C1) | (column_m >= own_C1), float("-inf"))
        best_HCk = _best_columns(scores_HCm, min(top_k - 1, high - low))
        picked_HCk = torch.where(best_HCk >= 0, best_HCk + low - first_C1, -1).sort(dim=-1).values
        selection_HTK[:, start:stop, top_k - 1 - picked_HCk.shape[-1] : -1] = picked_HCk
    return selection_HTK


def gate_scores(q: torch.Tensor, means_MGD: torch.Tensor) -> torch.Tensor:
    """<q, mean> without scaling, [H, T, M] in the dtype of the means; heads of a group share the means, uncopied."""
    num_queries, num_heads, head_dim = q.shape
    num_blocks, num_kv_heads, _ = means_MGD.shape
    q_GRTD = q.to(means_MGD.dtype).view(num_queries, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    if q.device.type == "cpu":
        means_MGD = torch.nn.functional.pad(means_MGD, (0, 0, 0, 0, 0, -num_blocks % CPU_COLUMNS))
    with full_precision(q.device):
        scores_GrM = torch.bmm(q_GRTD.reshape(num_kv_heads, -1, head_dim), means_MGD.permute(1, 2, 0))
    return scores_GrM.view(num_heads, num_queries, -1)[:, :, :num_blocks]


def _best_columns(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Columns of the `count` greatest scores of each row above -inf, -1 where there are fewer. Overwrites scores.

    By repeated maximum, because `max` promises the first of equal values and `topk` promises no order.
    """
    best = []
    for _ in range(count):
        value, column = scores.max(dim=-1)
        best.append(torch.where(value > float("-inf"), column, -1))
        scores.scatter_(-1, column[..., None], float("-inf"))
    return torch.stack(best, dim=-1)


def score_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of means and scores, and of accumulation in general: float32, or float64 for float64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@contextmanager
def full_precision(device: torch.device):
    """Context in which float32 matrix products are float32: no autocast, no TF32, whatever the user switched on."""
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            torch.backends.cuda.matmul.fp32_precision = before
