"""moba/gates.py: controls obey the rules of the gate they stand in for, pick what their names say, and repeat."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from packs import Pack, attention, documents_of, packs

from moba import gates, moba_attention
from moba.attention import BackendUnavailable
from moba.gates import layout_moments, select
from moba.kinds import GATES, Moba, Routing
from moba.kinds.moba import MEAN
from moba.kv_cache import KVCache
from moba.reference import reference_selection


def ranges_of(pack: Pack):
    """(queries, keys) of each document, as ranges."""
    bounds = pack.options["cu_seqlens"].tolist()
    bounds_k = bounds if pack.extra is None else pack.options["cu_seqlens_k"].tolist()
    return [(range(a, b), range(c, d)) for a, b, c, d in zip(bounds, bounds[1:], bounds_k, bounds_k[1:])]


def picks(gate, q, k, pack):
    """The selection of a gate."""
    documents = documents_of(q, k, pack.options["cu_seqlens"], pack.options["cu_seqlens_k"])
    return select(Routing(pack.block_size, pack.top_k, gate, pack.first_blocks), q, k, documents=documents)


def dense_mass(q, k, pack):
    """Full attention's probability of each (head, query, block of its document), by plain loops: nested dicts."""
    mass = {}
    for queries, keys in ranges_of(pack):
        for i, t in enumerate(queries):
            visible = keys[: len(keys) - len(queries) + i + 1]
            for h in range(q.shape[1]):
                g = h // (q.shape[1] // k.shape[1])
                p = torch.softmax(torch.stack([q[t, h] @ k[s, g] for s in visible]) * q.shape[2] ** -0.5, 0)
                mass[h, t] = [float(x.sum()) for x in p.split(pack.block_size)]
    return mass


@settings(deadline=None, max_examples=20)
@given(packs())
def test_oracle_takes_the_blocks_of_largest_mass_and_local_the_latest(pack):
    """Catches masses of keys that a query cannot see or of another head or document, and a budget off by one."""
    q, k, _ = pack.tensors()
    mass = dense_mass(q, k, pack)
    oracle, local = (picks(gate, q, k, pack) for gate in ("oracle", "local"))
    reference = reference_selection(q, k, **pack.options)
    assert ((oracle >= 0) == (reference >= 0)).all() and ((local >= 0) == (reference >= 0)).all()
    for (h, t), blocks in mass.items():
        own = len(blocks) - 1
        assert oracle[h, t, -1] == local[h, t, -1] == own
        best = sorted(blocks[:own], reverse=True)[: pack.top_k - 1]
        picked = [b for b in oracle[h, t, :-1].tolist() if b >= 0]
        assert sorted((blocks[b] for b in picked), reverse=True) == pytest.approx(best, rel=1e-9)
        assert len(set(picked)) == len(picked)
        assert [b for b in local[h, t, :-1].tolist() if b >= 0] == list(range(max(0, own - pack.top_k + 1), own))


def score_of(gate, q_RD, h, block_BD):
    """A gate's score of one block for query head h of those that share its keys, from its keys one by one."""
    if gate == "shared":
        return sum(float(q_D @ key_D) for q_D in q_RD for key_D in block_BD) / (len(q_RD) * len(block_BD))
    q_D = q_RD[h]
    if gate == "bounds":
        corners = [[float(q_D[d] * key_D[d]) for key_D in block_BD] for d in range(len(q_D))]
        return sum(map(max, corners))
    products = [float(q_D @ key_D) for key_D in block_BD]
    mean = sum(products) / len(products)
    if gate == "covariance":  # of q k itself
        spread = sum((x - mean) ** 2 for x in products) / len(products)
    else:
        spread = float(block_BD.var(0, correction=0) @ q_D**2)
    return mean + spread * len(q_D) ** -0.5 / 2


@pytest.mark.parametrize("gate", ["variance", "covariance", "bounds", "shared"])
@settings(deadline=None, max_examples=20)
@given(packs() | packs(first=True))
def test_a_gate_takes_the_blocks_of_largest_score(gate, pack):
    """Catches scores of keys that a query cannot see or of another head or document, variances of a population, a
    maximum where a query's sign asks for the minimum, a first or own block that is not selected, and a budget off by
    one."""
    q, k, _ = pack.tensors()
    selection, group = picks(gate, q, k, pack), q.shape[1] // k.shape[1]
    assert ((selection >= 0) == (reference_selection(q, k, **pack.options) >= 0)).all()
    for queries, keys in ranges_of(pack):
        for i, t in enumerate(queries):
            own = (len(keys) - len(queries) + i) // pack.block_size
            for h in range(q.shape[1]):
                g = h // group
                blocks = k[keys, g][: own * pack.block_size].split(pack.block_size)[:own]
                scores = [score_of(gate, q[t, g * group : (g + 1) * group], h % group, b) for b in blocks]
                scores[: pack.first_blocks] = [float("inf")] * min(pack.first_blocks, own)
                picked = [b for b in selection[h, t, :-1].tolist() if b >= 0]
                best = sorted(scores, reverse=True)[: pack.top_k - 1]
                assert selection[h, t, -1] == own and len(set(picked)) == len(picked)
                assert sorted((scores[b] for b in picked), reverse=True) == pytest.approx(best, rel=1e-9, abs=1e-9)


def test_shared_is_one_selection_a_group():
    """Catches heads of a group that select apart, groups that select alike, and a choice that is one head's own."""
    q, k, _ = Pack([64], block_size=4, top_k=3, heads=(6, 2)).tensors()
    selection, own = (picks(gate, q, k, Pack([64], block_size=4, top_k=3)) for gate in ("shared", "mean"))
    assert all(torch.equal(selection[h], selection[3 * (h // 3)]) for h in range(6))
    assert not torch.equal(selection[0], selection[3])
    assert not any(torch.equal(selection[h], own[h]) for h in range(6))


def test_scores_do_not_depend_on_chunks():
    """Catches queries that get the scores of others where a gate computes a few at a time."""
    pack = Pack([90, 41], block_size=4, top_k=4, heads=(4, 2))
    q, k, _ = pack.tensors()
    for gate in GATES:
        expected = picks(gate, q, k, pack)
        with mock.patch.object(gates, "SCORE_ELEMENTS", 700):
            assert torch.equal(picks(gate, q, k, pack), expected)


def test_variance_is_the_expected_weight_of_normal_keys():
    """Catches a wrong factor: for normal keys the log of the mean of exp(scale q k) is scale times the score."""
    torch.manual_seed(0)
    q, k = torch.randn(16, dtype=torch.float64), 0.6 * torch.randn(200_000, 16, dtype=torch.float64) + 0.3
    means, variances = layout_moments(k[:, None], documents_of(k[:, None], k[:, None]).layout(len(k)))
    score = q @ means[0, 0] + 16**-0.5 / 2 * (q**2 @ variances[0, 0])
    expected = (k @ q * 16**-0.5).exp().mean().log() / 16**-0.5
    assert score.item() == pytest.approx(expected.item(), abs=0.02) and abs(score - q @ means[0, 0]) > 0.2


@settings(deadline=None, max_examples=10)
@given(packs())
def test_a_control_is_attention_to_its_own_selection(pack):
    """Catches a gate whose selection is not what is attended to, forward or backward, and one that does not repeat."""
    q, k, v = pack.tensors(requires_grad=True)
    for gate in set(GATES) - {MEAN}:
        selection = picks(gate, q, k, pack)
        assert torch.equal(selection, picks(gate, q, k, pack))
        out = moba_attention(q, k, v, **pack.options, gate=gate, backend="torch")
        expected = torch.zeros_like(out) + 0 * q
        for queries, keys in ranges_of(pack):
            if len(queries):
                block_S = torch.arange(len(keys)) // pack.block_size
                past_TS = torch.ones(len(queries), len(keys), dtype=torch.bool).tril(len(keys) - len(queries))
                for h in range(q.shape[1]):
                    g = h // (q.shape[1] // k.shape[1])
                    seen_TS = (selection[h, queries][:, :, None] == block_S).any(dim=1) & past_TS
                    scores = (q[queries, h] @ k[keys, g].T) * q.shape[2] ** -0.5
                    expected[queries, h] = scores.masked_fill(~seen_TS, -torch.inf).softmax(-1) @ v[keys, g]
        torch.testing.assert_close(out, expected)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        for ours, theirs in zip(
            *(torch.autograd.grad((x * weight).sum(), (q, k, v), allow_unused=True) for x in (out, expected))
        ):
            torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs)


def test_random_picks_are_spread_and_differ():
    """Catches a hash that prefers some blocks, repeats itself over queries or heads, or depends on the block's past."""
    torch.manual_seed(0)
    q, k = torch.randn(2048, 4, 16), torch.randn(2048, 2, 16)
    selection = select(Routing(32, 3, "random"), q, k, documents=documents_of(q, k))
    late = selection[:, 1024:, :-1]  # 32 to 63 candidates
    counts = torch.bincount(late.flatten().long(), minlength=64)[:32].float()
    expected = sum(2 / (t // 32) for t in range(1024, 2048)) * 4
    assert ((counts - expected).abs() < 5 * expected**0.5).all()
    assert ((counts - expected) ** 2 / expected).mean() < 2, "chi-square a block"
    assert (late[:, 1:] == late[:, :-1]).float().mean() < 0.1 and (late[0] == late[1]).float().mean() < 0.1


def test_controls_reach_layers_and_caches_and_are_refused_elsewhere():
    """Catches a spec whose gate is ignored, in packs or while decoding, and a backend that would route its own way."""
    torch.manual_seed(0)
    q, k, v = torch.randn(40, 4, 8), torch.randn(40, 2, 8), torch.randn(40, 2, 8)
    outs = [attention(q, k, v, Moba(4, 3, gate=gate)) for gate in GATES]
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(outs) for b in outs[:i])
    for gate, whole in zip(GATES, outs):
        spec, cache = Moba(4, 3, gate=gate), KVCache(1)
        parts = []
        for a, b in ((0, 25), (25, 39), (39, 40)):
            new = q[a:b], k[a:b], v[a:b]
            parts.append(cache[0].attend(*new, spec, documents_of(*new[:2])))
        torch.testing.assert_close(torch.cat(parts), whole)
    with pytest.raises(BackendUnavailable, match="torch"):
        moba_attention(q, k, v, block_size=4, top_k=3, gate="local", backend="reference")
    unknown = Routing(4, 3, "best")
    for wrong in (lambda: Moba(4, 3, gate="best"), lambda: select(unknown, q, k, documents=documents_of(q, k))):
        with pytest.raises(ValueError, match="oracle"):
            wrong()
    assert str(Moba(4, 3, gate="local")) == "moba 4x3 (local gate)"
