"""first_blocks: the start of a document that is always attended to, in every place that selects blocks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packs import Pack, assert_same, attention, documents_of, drops_and_keeps, packs, with_gradients

from moba import moba_attention, route
from moba.gates import select
from moba.kinds import GATES, Full, Moba, Routing, from_entry
from moba.kv_cache import KVCache, SequenceCache, decode_moba
from moba.reference import reference_attention, reference_selection
from moba.stats import block_load, routing_stats


def by_hand(pack: Pack, rest) -> torch.Tensor:
    """The selection int32 [H, T, K] of the rule in words; rest(head, query, its document's keys, blocks that compete,
    how many) gives those that are picked behind the first."""
    ends = pack.options["cu_seqlens"].tolist()
    ends_k = ends if pack.extra is None else pack.options["cu_seqlens_k"].tolist()
    found = torch.full((pack.heads[0], ends[-1], pack.top_k), -1, dtype=torch.int32)
    for a, b, c, d in zip(ends, ends[1:], ends_k, ends_k[1:]):
        for t in range(a, b):
            own = (d - c - (b - t)) // pack.block_size
            first = list(range(min(pack.first_blocks, own)))
            others = range(len(first), own)
            room = min(pack.top_k - 1 - len(first), len(others))
            for h in range(pack.heads[0]):
                picks = [*first, *sorted(rest(h, t, slice(c, d), others, room)), own]
                found[h, t, pack.top_k - len(picks) :] = torch.tensor(picks)
    return found


@settings(deadline=None, max_examples=30)
@given(packs(first=True))
def test_selection_is_the_first_blocks_and_the_best_of_the_others(pack):
    """Catches a first block of the pack instead of the document, one that costs no budget or a budget that it wastes in
    short documents, other blocks than the best behind it, and another order; in the definition and in `route`."""
    q, k, _ = pack.tensors()

    def best(h, t, keys, others, room):
        blocks = k[keys, h // (pack.heads[0] // pack.heads[1])].split(pack.block_size)
        scores = {b: float(q[t, h] @ blocks[b].mean(0)) for b in others}
        return sorted(scores, key=scores.get, reverse=True)[:room]

    expected = by_hand(pack, best)
    assert torch.equal(reference_selection(q, k, **pack.options), expected)
    assert torch.equal(route(q, k, **pack.options), expected)


@settings(deadline=None, max_examples=15)
@given(packs(first=True, quantised=True))
def test_ties_still_go_to_the_earliest(pack):
    """Catches first blocks that push out the wrong one of equals."""
    q, k, _ = pack.tensors()
    assert torch.equal(route(q, k, **pack.options), reference_selection(q, k, **pack.options))


@settings(deadline=None, max_examples=15)
@given(packs(first=True))
def test_a_window_with_a_sink(pack):
    """Catches controls that leave out the first blocks, or take them twice: under "local" the latest ones follow. Every
    gate spends the same budget."""
    q, k, _ = pack.tensors()
    documents = documents_of(q, k, pack.options["cu_seqlens"], pack.options["cu_seqlens_k"])
    sizes = pack.block_size, pack.top_k
    expected = by_hand(pack, lambda h, t, keys, others, room: others[len(others) - room :])
    for gate in GATES:
        selection = select(Routing(*sizes, gate, pack.first_blocks), q, k, documents=documents)
        if gate == "local":
            assert torch.equal(selection, expected)
        assert torch.equal(selection >= 0, expected >= 0)
        first = torch.arange(pack.first_blocks)
        there = (selection[:, :, None, :] == first[:, None]).any(-1) | (first >= selection[:, :, -1:])
        assert there.all(), gate


@pytest.mark.parametrize("backend", ["torch", "flash"])
@settings(deadline=None, max_examples=20)
@given(pack=packs(first=True))
def test_backends_equal_the_definition(backend, pack):
    """Catches a backend that gets another selection than the one it is to have, forward or backward; the definition
    itself is held by its selection above."""
    tensors = pack.tensors(requires_grad=True)
    if len(tensors[0]) == 0:
        return

    def ours(q, k, v, *, cu_seqlens, cu_seqlens_k, block_size, top_k, first_blocks):
        kind, documents = (
            Moba(block_size, top_k, first_blocks=first_blocks),
            documents_of(q, k, cu_seqlens, cu_seqlens_k),
        )
        return kind.run(backend, q, k, v, documents, softmax_scale=None, deterministic=True, return_lse=True)

    def reference(q, k, v, **options):
        return reference_attention(q, k, v, return_lse=True, **options)

    assert_same(with_gradients(ours, *tensors, **pack.options), with_gradients(reference, *tensors, **pack.options))


PACK = Pack([70, 5, 0, 33], block_size=8, top_k=3, heads=(4, 2), first_blocks=1)


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_the_option_reaches_attention(backend):
    """Catches an argument that is dropped on the way, and tests on packs where it would change nothing."""
    q, k, v = PACK.tensors()
    assert all(drops_and_keeps(route(q, k, **PACK.options)))
    out = moba_attention(q, k, v, backend=backend, **PACK.options)
    torch.testing.assert_close(out, reference_attention(q, k, v, **PACK.options))
    plain = {name: value for name, value in PACK.options.items() if name != "first_blocks"}
    assert (out - moba_attention(q, k, v, **plain)).abs().max() > 0.1


@settings(deadline=None, max_examples=15)
@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=5), block_size=st.integers(1, 9), top_k=st.integers(2, 5)
)
def test_chunks_and_decoding_equal_one_pass(sizes, block_size, top_k):
    """Catches a cache whose chunks, or whose single new tokens, have other first blocks than the text in one piece."""
    length = sum(sizes) + 6
    q, k, v = Pack([length], block_size, top_k, heads=(4, 2)).tensors()
    for gate in ("mean", "local"):
        spec, cache, parts, start = Moba(block_size, top_k, gate=gate, first_blocks=top_k - 1), KVCache(1), [], 0
        for size in [*sizes, *[1] * 6]:
            new = [x[start : start + size] for x in (q, k, v)]
            parts.append(cache[0].attend(*new, spec, documents_of(*new[:2])))
            start += size
        torch.testing.assert_close(torch.cat(parts), attention(q, k, v, spec))


@pytest.mark.parametrize("length", [1, 8, 9, 17, 64, 65])
def test_the_newest_token_equals_the_definition(length):
    """Catches a decode step whose first block is not the document's."""
    q, k, v = Pack([length], 8, 3, heads=(4, 1)).tensors()
    sequence = SequenceCache()
    sequence.append(k, v)
    for first_blocks in (1, 2):
        got = decode_moba(q[-1:], [sequence], sequence.documents(1), block_size=8, top_k=3, first_blocks=first_blocks)
        want = reference_attention(q, k, v, block_size=8, top_k=3, first_blocks=first_blocks)
        torch.testing.assert_close(got, want[-1:])


def test_diagnostics_see_the_first_blocks():
    """Catches statistics of another selection than the one that is attended to, and blocks that nobody picked among the
    picks."""
    q, k, _ = Pack([400], 8, 3).tensors()
    documents = documents_of(q, k)
    selections = [select(Routing(8, 3, "mean", first), q, k, documents=documents) for first in (0, 1)]
    plain, forced = (routing_stats(selections[first], documents.layout(8), first) for first in (0, 1))
    assert 0 < plain["first_share"] < 0.2 and forced["first_share"] == 0
    # From the third block on one pick each, behind the first block, which all but the first block's queries attend to.
    assert block_load(selections[1], documents.layout(8), 1).picks_HM.sum(1).tolist() == [384.0] * q.shape[1]
    assert forced["history_blocks"] == plain["history_blocks"]
    # "local" picks the block before, and nothing else.
    window = select(Routing(8, 3, "local", 1), q, k, documents=documents)
    stats = routing_stats(window, documents.layout(8), 1)
    assert stats["previous_share"] == 1 and stats["distance"] == 1


def test_what_cannot_be_is_refused():
    """Catches a budget that the first blocks fill, so that the query's own block has no place; and wrong types."""
    q, k, v = PACK.tensors()
    for top_k, first_blocks in ((1, 1), (3, 3), (3, -1), (3, True), (3, None), (3, 1.0)):
        options = {**PACK.options, "top_k": top_k, "first_blocks": first_blocks}
        for call in (lambda: Moba(8, top_k, first_blocks=first_blocks), lambda: route(q, k, **options)):  # noqa: B023
            with pytest.raises(ValueError, match=f"first_blocks={first_blocks}: .*(top_k={top_k}|at least 0)"):
                call()
        with pytest.raises(ValueError, match=f"first_blocks={first_blocks}"):
            moba_attention(q, k, v, **options)


def test_text_and_entry():
    """Catches a plan that does not say it, an entry that does not come back, and an old one that is no longer read."""
    kinds = [Moba(8, 3, first_blocks=1), Moba(8, 3), Full()]
    assert [kind.entry() for kind in kinds] == [["moba", 8, 3, 1], ["moba", 8, 3], ["full", None, None]]
    assert [from_entry(kind.entry()) for kind in kinds] == kinds
    assert str(kinds[0]) == "moba 8x3 (first 1)" and str(kinds[1]) == "moba 8x3"
    assert str(Moba(8, 3, gate="local", first_blocks=1)) == "moba 8x3 (local gate, first 1)"
    assert kinds[0].attended_pairs(777) == kinds[1].attended_pairs(777)
    for entry in (["full", None, None, 1], ["moba", 8, 3, 1, 1], ["moba", 8, 3, 3], ["moba", 8, 1, 1], ["moba", 8]):
        with pytest.raises(ValueError, match=r"needs|first_blocks=|values to unpack"):
            from_entry(entry)


def test_options_make_the_kind():
    """Catches a configuration whose first_blocks does not arrive in the plan."""
    values = {"block_size": 8, "top_k": 3, "gate": "mean", "first_blocks": 2}
    assert Moba.from_options(values, "auto") == Moba(8, 3, first_blocks=2)
