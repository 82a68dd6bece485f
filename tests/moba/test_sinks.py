"""evals/sinks.py against dense softmax with plain masks, and as a setting of a sweep."""

import pytest
import torch
from hypothesis import given, settings
from packs import attention, documents_of, packs

from evals.sinks import SINKS, MobaWithSinks
from moba.gates import select
from moba.kinds import Moba


@settings(deadline=None, max_examples=20)
@given(packs(block_size=4))
def test_equals_softmax_over_blocks_and_first_tokens(pack):
    """Catches sink tokens that count twice beside a selected first block, are another document's, or lie in the future,
    and partial results that are merged with wrong weights."""
    q, k, v = pack.tensors()
    kind, cuts = MobaWithSinks(4, pack.top_k), (pack.options["cu_seqlens"], pack.options["cu_seqlens_k"])
    bounds = dict(zip(("cu_seqlens", "cu_seqlens_k"), cuts))
    out, lse = attention(q, k, v, kind, **bounds, return_lse=True)
    selection = select(kind.routing, q, k, documents=documents_of(q, k, *cuts))
    starts = cuts[0].tolist()
    starts_k = starts if cuts[1] is None else cuts[1].tolist()
    for a, b, c, d in zip(starts, starts[1:], starts_k, starts_k[1:]):
        past_TS = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))
        place_S = torch.arange(d - c)
        for h in range(q.shape[1]):
            g = h // (q.shape[1] // k.shape[1])
            seen_TS = (selection[h, a:b, :, None] == place_S // 4).any(dim=1) | (place_S < SINKS)
            scores_TS = (q[a:b, h] @ k[c:d, g].T * q.shape[2] ** -0.5).masked_fill(~(seen_TS & past_TS), -torch.inf)
            torch.testing.assert_close(out[a:b, h], scores_TS.softmax(-1) @ v[c:d, g])
            torch.testing.assert_close(lse[h, a:b], scores_TS.logsumexp(-1))


def test_sinks_change_what_is_seen_and_are_counted():
    """Catches a kind that is MoBA after all, a budget that leaves out the sinks, and blocks that are shorter."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(64, 2, 8) for _ in range(3))
    kind, plain = MobaWithSinks(8, 2), Moba(8, 2)
    assert (attention(q, k, v, kind) - attention(q, k, v, plain))[16:].abs().amax((1, 2)).gt(1e-3).float().mean() > 0.9
    assert kind.attended_pairs(64) == plain.attended_pairs(64) + SINKS * 48 and kind != plain
    with pytest.raises(ValueError, match="block_size=2: the 4 sink tokens"):
        MobaWithSinks(2, 2)
