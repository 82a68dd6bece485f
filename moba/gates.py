"""What else could pick the blocks: another gate, and controls that stand in its place, under the same rules and budget.

Each gives every query its own block and top_k - 1 complete blocks of its document's past (first_blocks of them always
the document's first, where that is asked for):
    variance    those whose keys, taken as normally distributed with the block's mean and variance in each dimension,
                have the largest expected exp(q k): MoBA's score plus softmax_scale / 2 times <q^2, variance>
    covariance  the same of all dimensions together, <q, covariance q> in place of <q^2, variance>
    bounds      those with the largest bound on q k, from the least and greatest of their keys in each dimension (Quest,
                arXiv 2406.10774)
    shared      MoBA's, but the query heads that read the same keys select alike, by the mean of their scores. Scores as
                they are: a head has a say as far as it tells blocks apart, and what it says of one does not depend on
                which others there are, as a softmax over blocks would
    local       the latest ones: no routing at all
    random      any, drawn anew for each query and head
    oracle      those with the largest share of full attention's probability: the best that the budget allows, at the
                cost of full attention
A model that is as good under "random" does not use its router; one that is far better under "oracle" than under MoBA's
own gate ("mean") loses to the router, not to sparsity.

Shapes: T queries, S keys, H query heads, G key/value heads, D head size, K = top_k, B block size; C queries of a chunk,
m blocks of the pack.
"""

from __future__ import annotations

import torch

from moba.backends.refusals import has_triton
from moba.checks import check_blocks
from moba.documents import Documents
from moba.kinds import GATES, Routing
from moba.routing import (
    SCORE_ELEMENTS,
    BlockLayout,
    full_precision,
    gate_scores,
    layout_means,
    score_dtype,
    select_blocks,
    select_by_score,
)

_MASK, _FACTOR = (1 << 32) - 1, 0x45D9F3B


@torch.no_grad()
def select(
    routing: Routing,
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    documents: Documents,
    softmax_scale: float | None = None,
) -> torch.Tensor:
    """What a kind's routing selects, int32 [H, T, K] as of `moba.route`; the gate "mean" is `route` itself.

    A pure function of its arguments, "random" too (of the bits of q and the positions): recomputing it in a backward
    pass, or after a resume, gives the same blocks. `softmax_scale` matters for "variance", "covariance" and "oracle".
    """
    block_size, top_k, gate, first_blocks = routing
    check_blocks(block_size, top_k)
    layout = documents.layout(block_size)
    num_heads = q.shape[1]
    if gate == "mean":
        return select_blocks(q, layout_means(k, layout), layout, top_k, first_blocks)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if gate == "shared":
        mean_TGD = q.to(score_dtype(k)).unflatten(1, (k.shape[1], -1)).mean(dim=2)
        selection_GTK = select_blocks(mean_TGD, layout_means(k, layout), layout, top_k, first_blocks)
        return selection_GTK.repeat_interleave(num_heads // k.shape[1], dim=0)
    if gate == "variance":
        means_MGD, variances_MGD = layout_moments(k, layout)
        variances_MGD *= scale / 2

        def score(queries: slice, blocks: slice) -> torch.Tensor:
            own = q[queries].to(means_MGD.dtype)
            return gate_scores(own, means_MGD[blocks]) + gate_scores(own**2, variances_MGD[blocks])
    elif gate == "covariance":
        means_MGD, covariances_MGDD = layout_covariances(k, layout)
        covariances_MGDD *= scale / 2

        def score(queries: slice, blocks: slice) -> torch.Tensor:
            own = q[queries].to(means_MGD.dtype)
            return gate_scores(own, means_MGD[blocks]) + _quadratic_scores(own, covariances_MGDD[blocks])
    elif gate == "bounds":
        low_MGD, high_MGD = keys_by_block(k, layout).aminmax(dim=1)

        def score(queries: slice, blocks: slice) -> torch.Tensor:
            above, below = q[queries].clamp(min=0), q[queries].clamp(max=0)
            return gate_scores(above, high_MGD[blocks]) + gate_scores(below, low_MGD[blocks])
    elif gate == "local":

        def score(queries: slice, blocks: slice) -> torch.Tensor:
            place_m = torch.arange(blocks.start, blocks.stop, device=q.device, dtype=torch.float32)
            return place_m.expand(num_heads, queries.stop - queries.start, -1).clone()
    elif gate == "random":

        def score(queries: slice, blocks: slice) -> torch.Tensor:
            column_m = torch.arange(blocks.start, blocks.stop, device=q.device)
            return _uniform(q[queries], layout.query_position_T[queries], column_m)
    elif gate == "oracle":
        k = k.contiguous()  # once, not for every chunk of queries

        def score(queries: slice, blocks: slice) -> torch.Tensor:
            return block_log_mass(q[queries], k, layout, queries, blocks, softmax_scale)
    else:
        raise ValueError(f"gate={gate!r}: choose one of {', '.join(GATES)}")
    width = layout.num_keys if gate == "oracle" and not _has_kernel(q) else layout.num_blocks
    step = max(1, SCORE_ELEMENTS // (num_heads * max(width, q.shape[2])))
    return select_by_score(score, num_heads, layout, top_k, first_blocks, step, q.device)


@torch.no_grad()
def layout_moments(k: torch.Tensor, layout: BlockLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, variance) of the keys of every block of the layout, per dimension, float32 [M, G, D] (float64 for float64
    keys). Variances are those of the block, not of a population, and 0 for one key."""
    means_MGD = layout_means(k, layout)
    squares_MGD = layout_means(k.to(means_MGD.dtype) ** 2, layout)
    return means_MGD, (squares_MGD - means_MGD**2).clamp_(min=0)


@torch.no_grad()
def layout_covariances(k: torch.Tensor, layout: BlockLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean [M, G, D], covariance [M, G, D, D]) of the keys of every complete block, dtypes and divisor as of
    `layout_moments`; of other blocks they mean nothing."""
    keys_MBGD = keys_by_block(k, layout)
    means_MGD = keys_MBGD.mean(dim=1)
    centred_MGBD = (keys_MBGD - means_MGD[:, None]).transpose(1, 2)
    with full_precision(k.device):
        return means_MGD, centred_MGBD.mT @ centred_MGBD / layout.block_size


def keys_by_block(k: torch.Tensor, layout: BlockLayout) -> torch.Tensor:
    """[M, B, G, D], in the dtype of scores: the keys of every block; of an incomplete one, what comes after too.

    A copy of all keys: 4 GiB at 1M tokens with 8 heads of 128; covariances [D, D] take D / B times as much.
    """
    index_MB = layout.start_M[:, None] + torch.arange(layout.block_size, device=k.device)
    return torch.nn.functional.pad(k, (0, 0, 0, 0, 0, layout.block_size))[index_MB].to(score_dtype(k))


@torch.no_grad()
def block_log_mass(
    q_CHD: torch.Tensor,
    k: torch.Tensor,
    layout: BlockLayout,
    rows: slice | torch.Tensor,
    blocks: slice,
    softmax_scale: float | None = None,
) -> torch.Tensor:
    """Log-sum-exp of the scaled products of queries with the keys that they see of each block of the pack: [H, C, m],
    float32 (float64 for float64 inputs); -inf for blocks of other documents or the future.

    Minus the log-sum-exp of the whole row it is the log of the block's share of full attention. `rows`: which queries
    of the pack these are, a slice or int64 [C].
    """
    num_queries, num_heads, head_dim = q_CHD.shape
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    first_C, own_C = layout.query_first_block_T[rows], layout.query_block_T[rows]
    last_key_C = layout.start_M[own_C] + layout.query_position_T[rows] % layout.block_size
    if _has_kernel(q_CHD):
        from moba.backends import triton_mass

        own = (layout.start_M, first_C, own_C, last_key_C)
        return triton_mass.block_log_mass(q_CHD, k, *own, blocks, layout.block_size, scale)
    num_kv_heads, dtype = k.shape[1], score_dtype(k)
    index_mB = layout.start_M[blocks, None] + torch.arange(layout.block_size, device=k.device)
    column_m1 = torch.arange(blocks.start, blocks.stop, device=k.device)[:, None]
    unseen_CmB = (index_mB > last_key_C[:, None, None]) | (column_m1 < first_C[:, None, None])
    keys_GDn = k[index_mB.clamp(max=layout.num_keys - 1).flatten()].to(dtype).permute(1, 2, 0)
    q_GrD = (q_CHD.to(dtype) * scale).unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)
    with full_precision(k.device):
        scores_Grn = torch.bmm(q_GrD.reshape(num_kv_heads, -1, head_dim), keys_GDn)
    scores_HCmB = scores_Grn.view(num_heads, num_queries, *index_mB.shape)
    return scores_HCmB.masked_fill_(unseen_CmB, float("-inf")).logsumexp(dim=-1)


def _quadratic_scores(q_CHD: torch.Tensor, forms_MGDD: torch.Tensor) -> torch.Tensor:
    """<q, form q> of each block's form, [H, C, m]. The products of every two dimensions, of a few queries at a time,
    make it one matrix product."""
    step = max(1, SCORE_ELEMENTS // (q_CHD.shape[1] * q_CHD.shape[2] ** 2))
    pairs = ((part[..., None] * part[..., None, :]).flatten(2) for part in q_CHD.split(step))
    return torch.cat([gate_scores(part, forms_MGDD.flatten(2)) for part in pairs], dim=1)


def _has_kernel(q: torch.Tensor) -> bool:
    """Whether a kernel computes `block_log_mass` of such queries."""
    if not (q.is_cuda and has_triton()):
        return False
    from moba.backends import triton_mass

    return triton_mass.takes(q)


def _uniform(q_CHD: torch.Tensor, position_C: torch.Tensor, column_m: torch.Tensor) -> torch.Tensor:
    """float32 [H, C, m] numbers that look evenly drawn from [-2^31, 2^31): a hash of the bits of each query, its
    position and the block. What is done for each of them is in 32 bits: it is most of the gate's time."""
    weight_D = torch.arange(1, q_CHD.shape[2] + 1, device=q_CHD.device) * 0x9E3779B1 | 1
    bits_CH = (q_CHD.float().view(torch.int32).long() * weight_D).sum(dim=-1)
    seed_HC, seed_m = _mix(bits_CH.T + position_C * 0x85EBCA6B), _mix(column_m * 0xC2B2AE35)
    x_HCm = (seed_HC[:, :, None] ^ seed_m).mul_(_FACTOR)
    return x_HCm.bitwise_xor_(x_HCm >> 16).mul_(_FACTOR).float()


def _mix(x: torch.Tensor) -> torch.Tensor:
    """int32, each int64's low 32 bits scrambled: multiplications and shifts that let every bit change half of the
    others."""
    x = x & _MASK
    for _ in range(2):
        x = ((x ^ (x >> 16)) * _FACTOR) & _MASK
    return ((x ^ (x >> 16)) - (1 << 31)).int()
