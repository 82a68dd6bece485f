"""Routing scalars on selections whose values are known by hand, and on a random one counted in plain Python; shares of
full attention against dense softmax."""

import math

import pytest
import torch
from hypothesis import given, settings
from packs import documents_of, packs

from moba import full_attention, moba_attention
from moba.documents import Documents
from moba.gates import select
from moba.kinds import Moba, Routing
from moba.layer import MoBAAttention
from moba.routing import route
from moba.stats import (
    block_load,
    block_mass,
    captured_share,
    mean_stats,
    oracle_share,
    random_share,
    record_routing,
    routed_queries,
    routing_stats,
)


def layout_of(num_tokens, block_size, cu_seqlens=None):
    return Documents.from_bounds(cu_seqlens, None, num_tokens, num_tokens, torch.device("cpu")).layout(block_size)


def test_counts_by_hand():
    """Catches own blocks or padding counted as picks. Blocks of 2; the last two queries pick 0 and 1 of blocks 0 to
    2."""
    none, own = -1, [0, 0, 1, 1, 2, 2, 3, 3]
    picks = [(none, none), (none, none), (none, 0), (none, 0), (0, 1), (0, 1), (0, 1), (0, 1)]
    selection = torch.tensor([[(*p, o) for p, o in zip(picks, own)]], dtype=torch.int32)
    stats = {name: value.item() for name, value in routing_stats(selection, layout_of(8, 2)).items()}
    assert stats["history_blocks"] == pytest.approx(10 / 8)
    assert stats["first_share"] == pytest.approx(6 / 10)
    assert stats["previous_share"] == pytest.approx(4 / 10)  # block 0 from 1, block 1 from 2
    assert stats["distance"] == pytest.approx((2 * 1 + 2 * (2 + 1) + 2 * (3 + 2)) / 10)
    # Evenly, block 0 would get 2 + 2 + 4 / 3 picks, block 1 2 + 4 / 3, block 2 4 / 3; the last can be picked by nobody.
    load = [6 / (4 + 4 / 3), 4 / (2 + 4 / 3), 0]
    share = [x / sum(load) for x in load[:2]]
    assert stats["max_load"] == pytest.approx(load[1]) and stats["dead_share"] == pytest.approx(1 / 3)
    assert stats["load_entropy"] == pytest.approx(-sum(x * math.log(x) for x in share) / math.log(3))


def test_random_selection_counted_in_python():
    """Catches errors that only several heads and documents show; an even router has load 1 in every block."""
    torch.manual_seed(0)
    q, k = torch.randn(90, 4, 8), torch.randn(90, 2, 8)
    cu_seqlens = torch.tensor([0, 50, 50, 90], dtype=torch.int32)
    selection = route(q, k, block_size=8, top_k=3, cu_seqlens=cu_seqlens)
    layout = layout_of(90, 8, cu_seqlens)
    stats, load = routing_stats(selection, layout), block_load(selection, layout)
    expected, picks, distances = [0.0] * 12, [[0] * 12 for _ in range(4)], []
    for t in range(90):
        first, own = (0, t // 8) if t < 50 else (7, (t - 50) // 8)
        for b in range(own):
            expected[first + b] += min(1, 2 / own)
        for h in range(4):
            for b in selection[h, t, :-1].tolist():
                if b >= 0:
                    picks[h][first + b] += 1
                    distances.append(own - b)
    assert len(distances) > 100
    torch.testing.assert_close(load.expected_M[:12], torch.tensor(expected))
    torch.testing.assert_close(load.picks_HM[:, :12], torch.tensor(picks, dtype=torch.float32))
    assert stats["distance"].item() == pytest.approx(sum(distances) / len(distances), rel=1e-5)
    assert stats["previous_share"].item() == pytest.approx(distances.count(1) / len(distances), rel=1e-5)
    assert stats["history_blocks"].item() == pytest.approx(len(distances) / (4 * 90), rel=1e-5)
    assert load.picks_HM.sum() == pytest.approx(4 * load.expected_M.sum().item())

    q = torch.randn(1024, 8, 16)
    even = routing_stats(select(Routing(32, 3, "random"), q, q, documents=documents_of(q, q)), layout_of(1024, 32))
    skewed = routing_stats(select(Routing(32, 3, "local"), q, q, documents=documents_of(q, q)), layout_of(1024, 32))
    assert even["load_entropy"] > 0.98 > skewed["load_entropy"] and even["max_load"] < 2 < skewed["max_load"]


@settings(deadline=None, max_examples=20)
@given(packs(extra=None, first=True))
def test_first_blocks_are_no_picks_and_cost_their_part_of_the_budget(pack):
    """Catches forced blocks counted as picks or as load, expected loads of an even router that may pick them, an oracle
    that spends their budget again, random blocks among them: all against loops over queries and blocks."""
    q, k, _ = pack.tensors()
    bounds, first, size = pack.options["cu_seqlens"], pack.first_blocks, pack.block_size
    if len(q) == 0:
        return
    layout = layout_of(len(q), size, bounds)
    selection = route(q, k, **{name: value for name, value in pack.options.items() if name != "cu_seqlens_k"})
    load = block_load(selection, layout, first)
    rows = torch.arange(len(q))
    mass = block_mass(q, k, layout, rows)
    oracle, drawn = (share(mass, pack.top_k, first) for share in (oracle_share, random_share))
    room, group = pack.top_k - 1 - first, pack.heads[0] // pack.heads[1]
    picks, expected = torch.zeros_like(load.picks_HM), torch.zeros_like(load.expected_M)
    start_block = 0
    for a, b in zip(bounds.tolist(), bounds.tolist()[1:]):
        for t in range(a, b):
            own = (t - a) // size
            others = list(range(first, own))
            for block in others:
                expected[start_block + block] += min(1, room / len(others))
            for h in range(pack.heads[0]):
                for block in selection[h, t, :-1].tolist():
                    if block >= first:
                        picks[h, start_block + block] += 1
                p = torch.softmax(k[a : t + 1, h // group] @ q[t, h] * q.shape[2] ** -0.5, 0)
                of_block = [p[i * size : (i + 1) * size].sum() for i in range(own + 1)]
                always = of_block[own] + sum(of_block[: min(first, own)])
                best = sorted((of_block[i] for i in others), reverse=True)[:room]
                torch.testing.assert_close(oracle[h, t], always + sum(best))
                rate = min(1, room / max(1, len(others)))
                torch.testing.assert_close(drawn[h, t], always + rate * sum(of_block[i] for i in others))
        start_block += -(-(b - a) // size)
    assert torch.equal(load.picks_HM, picks)
    torch.testing.assert_close(load.expected_M, expected)
    assert load.picks_HM.sum().item() == pytest.approx(pack.heads[0] * load.expected_M.sum().item(), rel=1e-5)


def test_no_history_is_nan_and_not_an_error():
    """Catches a crash where no query can pick: documents within a block, or top_k=1."""
    q = torch.randn(6, 2, 8)
    for top_k in (1, 3):
        stats = routing_stats(route(q, q, block_size=8, top_k=top_k), layout_of(6, 8))
        assert stats["history_blocks"] == 0
        assert all(value.isnan() for name, value in stats.items() if name != "history_blocks"), stats


def test_a_pack_where_no_query_drops_a_block_has_no_shares():
    """Catches a crash of an evaluation at a length at which MoBA is full attention."""
    layer = MoBAAttention(32, 4, 2, 8, spec=Moba(8, 3), rope=False)
    with torch.no_grad(), record_routing(layer) as recorded:
        layer(torch.randn(20, 32), torch.empty(0), torch.empty(0), Documents.from_lengths([12, 8]))
    (stats,) = recorded
    assert stats["history_blocks"] == pytest.approx(4 / 20)
    assert stats["captured"].isnan() and "captured" not in mean_stats(recorded)


@settings(deadline=None, max_examples=20)
@given(packs(extra=None))
def test_shares_equal_dense_softmax_and_two_log_sum_exps(pack):
    """Catches shares of keys that a query cannot see, of another document or head; a captured share that is not
    exp(lse of the sparse attention - lse of the full one), and an oracle that is not the best."""
    q, k, v = pack.tensors()
    bounds, num_tokens = pack.options["cu_seqlens"], len(q)
    if num_tokens == 0:
        return
    rows = torch.arange(num_tokens)
    layout = layout_of(num_tokens, pack.block_size, bounds)
    mass = block_mass(q, k, layout, rows)
    selection = route(q, k, block_size=pack.block_size, top_k=pack.top_k, cu_seqlens=bounds)
    captured = captured_share(mass, selection, layout, rows)
    _, lse_moba = moba_attention(q, k, v, **pack.options, return_lse=True, backend="reference")
    _, lse_full = full_attention(q, k, v, cu_seqlens=bounds, return_lse=True, backend="reference")
    torch.testing.assert_close(captured, (lse_moba - lse_full).exp())
    torch.testing.assert_close(mass.history_HCM.sum(-1) + mass.own_HC, torch.ones_like(captured))
    oracle = oracle_share(mass, pack.top_k)
    _, lse_best = moba_attention(q, k, v, **pack.options, return_lse=True, gate="oracle", backend="torch")
    torch.testing.assert_close(oracle, (lse_best - lse_full).exp())
    assert (oracle - captured).min() > -1e-12
    few = routed_queries(layout, pack.top_k, num_tokens)
    assert torch.equal(few, (captured.shape[1] and (mass.candidates_CM.sum(1) >= pack.top_k)).nonzero().flatten())


def test_oracle_holds_more_than_moba_and_moba_more_than_random():
    """Catches an oracle, a gate or a baseline in the wrong order: keys come in blocks of one direction each, so that
    the mean of a block says what is in it."""
    torch.manual_seed(1)
    num_tokens, size, top_k = 1024, 32, 4
    topic = torch.randn(num_tokens // size, 1, 2, 16).repeat_interleave(size, 0).squeeze(1)
    k = topic + 1.5 * torch.randn(num_tokens, 2, 16)
    q = 2 * topic[torch.randperm(num_tokens)].repeat_interleave(2, 1) + 0.7 * torch.randn(num_tokens, 4, 16)
    layout = layout_of(num_tokens, size)
    rows = routed_queries(layout, top_k, 200)
    mass = block_mass(q, k, layout, rows)
    shares = {
        gate: captured_share(
            mass, select(Routing(size, top_k, gate), q, k, documents=documents_of(q, k))[:, rows], layout, rows
        )
        for gate in ("mean", "local", "random", "oracle")
    }
    means = {gate: share.mean().item() for gate, share in shares.items()}
    assert means["oracle"] > means["mean"] + 0.01 and means["mean"] > means["random"] + 0.2, means
    torch.testing.assert_close(shares["oracle"], oracle_share(mass, top_k))
    assert random_share(mass, top_k).mean().item() == pytest.approx(means["random"], abs=0.01)
