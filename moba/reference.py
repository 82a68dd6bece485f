"""The definition of MoBA and of sliding windows, as loops and dense masks: slow and meant to be obviously right.

Everything else in this package is tested against these functions, so they share no code with it: the selection
below does not call `moba.routing`, and the attention is a masked softmax over whole documents. Differentiable by
autograd; any dtype.

Shapes: T queries, S keys, H query heads, G key/value heads, D head size, K = top_k, N documents.
"""

from __future__ import annotations

import torch


def reference_selection(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    block_size: int,
    top_k: int,
    first_blocks: int = 0,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
) -> torch.Tensor:
    """The blocks each query attends to, int32 [H, T, K].

    Indices count blocks from the start of the query's own document. Leading -1s where there are fewer than K blocks,
    then the chosen history in ascending order, the query's own block last. q is [T, H, D], k is [S, G, D]; the
    arguments are those of `moba.moba_attention`. Rules (MoBA paper, section 2.2): a block competes if it lies wholly
    before the block of the query; its score is <q, mean of its keys>, unscaled, in float32 (float64 for float64
    inputs); the top_k - 1 best are taken, of equals the earlier; the query's own block is always taken. Blocks numbered
    below `first_blocks` are better than all others; the paper has none of them. No gradient.
    """
    q, k = _compute_dtype(q.detach()), _compute_dtype(k.detach())
    num_heads, group = q.shape[1], q.shape[1] // k.shape[1]
    selection = torch.full((num_heads, q.shape[0], top_k), -1, dtype=torch.int32, device=q.device)
    for queries, keys in _documents(q, k, cu_seqlens, cu_seqlens_k):
        num_queries, num_keys = queries.stop - queries.start, keys.stop - keys.start
        for head in range(num_heads):
            key_DS = k[keys, head // group]
            complete = range(num_keys // block_size)
            means = [key_DS[b * block_size : (b + 1) * block_size].mean(dim=0) for b in complete]
            scores = [(q[queries, head] @ mean).tolist() for mean in means]  # [block][query]
            for i in range(num_queries):
                own = (num_keys - num_queries + i) // block_size
                best_first = sorted(range(own), key=lambda b: (b >= first_blocks, -scores[b][i], b))
                chosen = [*sorted(best_first[: top_k - 1]), own]
                selection[head, queries.start + i, top_k - len(chosen) :] = torch.tensor(chosen, dtype=torch.int32)
    return selection


def reference_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    block_size: int,
    top_k: int,
    first_blocks: int = 0,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """MoBA attention by dense masks: [T, H, D] in q's dtype; with `return_lse` also the natural log-sum-exp [H, T].

    q is [T, H, D], k and v are [S, G, D], H a multiple of G. Documents are [cu_seqlens[i], cu_seqlens[i+1]);
    `cu_seqlens_k` says the same of keys where they differ, and then the queries are the last of their document's
    keys. Half precisions are computed in float32; the log-sum-exp is float32, or float64 for float64 inputs.
    """
    selection = reference_selection(
        q,
        k,
        block_size=block_size,
        top_k=top_k,
        first_blocks=first_blocks,
        cu_seqlens=cu_seqlens,
        cu_seqlens_k=cu_seqlens_k,
    )

    def allowed(head: int, queries: slice, num_keys: int) -> torch.Tensor:
        return _mask(selection[head, queries], num_keys, block_size)

    out, lse = _masked_attention(q, k, v, allowed, cu_seqlens, cu_seqlens_k, softmax_scale)
    return (out, lse) if return_lse else out


def reference_sliding(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    window: int,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Sliding-window attention by dense masks; arguments and results as for `reference_attention`.

    A query attends to the last `window` tokens of its document, itself included.
    """

    def allowed(_: int, queries: slice, num_keys: int) -> torch.Tensor:
        key = torch.arange(num_keys, device=q.device)
        query = torch.arange(num_keys - (queries.stop - queries.start), num_keys, device=q.device)[:, None]
        return (key <= query) & (key > query - window)

    out, lse = _masked_attention(q, k, v, allowed, cu_seqlens, cu_seqlens_k, softmax_scale)
    return (out, lse) if return_lse else out


def _masked_attention(q, k, v, allowed, cu_seqlens, cu_seqlens_k, softmax_scale):
    """(out, log-sum-exp) under the masks allowed(head, queries, keys of their document): bool [queries, keys]."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    dtype = q.dtype
    q, k, v = _compute_dtype(q), _compute_dtype(k), _compute_dtype(v)
    num_heads, group = q.shape[1], q.shape[1] // k.shape[1]
    heads_out, heads_lse = [], []
    for head in range(num_heads):
        outputs, lses = [q[:0, head]], [q[:0, head, 0]]
        for queries, keys in _documents(q, k, cu_seqlens, cu_seqlens_k):
            mask = allowed(head, queries, keys.stop - keys.start)
            scores = scale * (q[queries, head] @ k[keys, head // group].T)
            scores = scores.masked_fill(~mask, float("-inf"))
            outputs.append(scores.softmax(dim=-1) @ v[keys, head // group])
            lses.append(scores.logsumexp(dim=-1))
        heads_out.append(torch.cat(outputs))
        heads_lse.append(torch.cat(lses))
    return torch.stack(heads_out, dim=1).to(dtype), torch.stack(heads_lse)


def _mask(selection: torch.Tensor, num_keys: int, block_size: int) -> torch.Tensor:
    """Keys that the last queries of a document may see, bool [queries, num_keys], from their selection [queries, K]."""
    num_queries = selection.shape[0]
    key = torch.arange(num_keys, device=selection.device)
    query = torch.arange(num_keys - num_queries, num_keys, device=selection.device)
    in_selected_block = (selection[:, :, None] == key // block_size).any(dim=1)
    return in_selected_block & (key <= query[:, None])


def _documents(q, k, cu_seqlens, cu_seqlens_k):
    """(slice of queries, slice of keys) of every document that has queries."""
    if cu_seqlens is None:
        cu_seqlens = torch.tensor([0, q.shape[0]])
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens
    bounds, bounds_k = cu_seqlens.tolist(), cu_seqlens_k.tolist()
    for i in range(len(bounds) - 1):
        if bounds[i + 1] > bounds[i]:
            yield slice(bounds[i], bounds[i + 1]), slice(bounds_k[i], bounds_k[i + 1])


def _compute_dtype(x: torch.Tensor) -> torch.Tensor:
    """Half precisions as float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
