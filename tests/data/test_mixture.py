"""The sequence of draws: a function of seed and mix alone, in the shares asked for."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.schema import LongDocumentsConfig
from data.mixture import BLOCK, Mixture, long_share, make_pools, passes

PINNED = [("short", 45), ("short", 0), ("long", 26), ("short", 2), ("short", 32), ("short", 31)]
LENGTHS = {"short": np.full(50, 11), "long": np.arange(100, 140), "other": np.full(7, 31)}


def draws(seed, count, mix, lengths=LENGTHS):
    mixture = Mixture(lengths, seed)
    mixture.set_mix(mix)
    return [mixture.draw() for _ in range(count)], mixture


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**63), st.integers(0, 300))
def test_order_is_a_function_of_the_seed(seed, skip):
    """Catches hidden state: a mixture put at draw `skip` by its two numbers gives what the one that drew there
    gives."""
    mix = {"short": 1, "long": 3, "other": 0.5}
    whole, _ = draws(seed, skip + 50, mix)
    _, there = draws(seed, skip, mix)
    again = Mixture(LENGTHS, seed)
    again.set_mix(dict(reversed(mix.items())))  # the order of the mapping is no part of the mix
    again.seek(there.draws, there.counts)
    assert [again.draw() for _ in range(50)] == whole[skip:]
    assert draws(seed + 1, len(whole), mix)[0] != whole


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 2**63),
    st.sampled_from([10, 60, 120, 138, 200]),
    st.lists(st.integers(0, 400), min_size=1, max_size=12),
)
def test_skipping_is_drawing(seed, length, counts):
    """Catches documents ahead that are not the ones drawn, over epochs and blocks, and counts that slip."""
    mix = {"short": 1, "long": 3, "other": 0.5}
    _, skipping = draws(seed, 0, mix)
    _, drawing = draws(seed, 0, mix)
    for count in counts:
        inputs = skipping.ahead(length, {"other"})
        count = min(count, len(inputs))
        skipping.skip(count)
        drawn = [drawing.draw() for _ in range(count)]
        assert [window.length for window in drawn] == inputs[:count].tolist()
        assert all(window.source != "other" and window.length < length for window in drawn)
        numbers, window = skipping.ahead_of({"short": np.arange(50) * 7, "long": np.arange(40) * 11})
        given = [window(i) for i in range(len(numbers))]
        skipping.skip(len(numbers))
        assert given == [drawing.draw() for _ in numbers]
        assert numbers == [one.document * {"short": 7, "long": 11}[one.source] for one in given]
        for _ in range(97):
            assert skipping.draw() == drawing.draw()
        assert (skipping.draws, skipping.counts) == (drawing.draws, drawing.counts)


def test_each_epoch_takes_every_document_once_in_another_order():
    """Catches sampling with replacement, and epochs that repeat one permutation."""
    drawn, mixture = draws(3, 150, {"short": 1})
    epochs = [[w.document for w in drawn[i : i + 50]] for i in (0, 50, 100)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])
    assert mixture.counts == {"short": 150, "long": 0, "other": 0}
    assert {(w.start, w.length) for w in drawn} == {(0, 10)}  # a document of 11 tokens has 10 inputs


def test_token_shares_converge():
    """Catches weights taken as shares of documents: the mean lengths differ tenfold here."""
    mix = {"short": 2.0, "long": 1.0, "other": 1.0}
    drawn, mixture = draws(0, 12 * BLOCK, mix)
    tokens = Counter()
    for window in drawn:
        tokens[window.source] += window.length
    total = sum(tokens.values())
    assert {name: tokens[name] / total for name in mix} == pytest.approx(
        {"short": 0.5, "long": 0.25, "other": 0.25}, rel=0.1
    )
    epochs = {name: count / len(LENGTHS[name]) for name, count in mixture.counts.items()}
    assert epochs == pytest.approx(passes(make_pools(LENGTHS, mix), total), rel=0.1)


def test_a_change_of_mix_leaves_each_source_at_its_place():
    """Catches a change of stage that restarts a source: its documents go on through the epoch."""
    mixture = Mixture(LENGTHS, 5)
    mixture.set_mix({"short": 1, "long": 1})
    seen = [mixture.draw() for _ in range(30)]
    mixture.set_mix({"short": 1})
    seen += [mixture.draw() for _ in range(50 - sum(w.source == "short" for w in seen))]
    assert sum(w.source == "long" for w in seen) > 0
    assert sorted(w.document for w in seen if w.source == "short") == list(range(50))


MIXED = {"a": np.array([11] * 40 + [101] * 6), "b": np.array([31] * 20 + [61, 201]), "short": np.full(9, 21)}


@settings(deadline=None, max_examples=20)
@given(
    st.integers(0, 2**63),
    st.lists(
        st.tuples(
            st.one_of(st.none(), st.builds(LongDocumentsConfig, st.floats(0, 1), st.sampled_from([20, 50, 100, 150]))),
            st.integers(1, 60),
        ),
        min_size=1,
        max_size=4,
    ),
    st.data(),
)
def test_long_documents_are_drawn_by_seed_and_counts_alone(seed, stages, data):
    """Catches hidden state behind pools: over stages of any lengths and shares, a mixture put anywhere by its numbers
    draws on as the one that drew there; and every pool takes each of its documents once per pass."""
    mix = {"a": 1, "b": 2, "short": 0.5}
    whole, states = Mixture(MIXED, seed), []
    drawn = []
    for number, (long_documents, count) in enumerate(stages):
        whole.set_mix(mix, long_documents)
        for _ in range(count):
            states.append((number, whole.draws, dict(whole.counts)))
            drawn.append(whole.draw())
    number, draws_before, counts = data.draw(st.sampled_from(states))
    again = Mixture(MIXED, seed)
    again.seek(draws_before, counts)
    again.set_mix(mix, stages[number][0])
    left = sum(count for _, count in stages[: number + 1]) - draws_before
    assert [again.draw() for _ in range(left)] == drawn[draws_before : draws_before + left]
    assert sum(whole.counts.values()) == len(drawn)
    for name, pool in make_pools(MIXED, mix, LongDocumentsConfig(0.5, 50)).items():
        only = Mixture(MIXED, seed)
        only.set_mix({pool.source: 1}, LongDocumentsConfig(1.0 if ">=" in name else 0.0, 50))
        size = len(pool.documents)
        for _ in range(2):
            assert sorted(only.draw().document for _ in range(size)) == pool.documents.tolist()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1.0])
def test_the_share_of_long_documents_is_met(share):
    """Catches a share of documents instead of tokens, one that changes the shares of the sources, and a plan that tells
    another share than is drawn."""
    mix, long_documents = {"a": 1, "b": 1, "short": 2}, LongDocumentsConfig(share, 50)
    mixture = Mixture(MIXED, 7)
    mixture.set_mix(mix, long_documents)
    tokens, long_tokens = Counter(), Counter()
    for _ in range(16 * BLOCK):
        window = mixture.draw()
        tokens[window.source] += window.length
        long_tokens[window.source] += window.length if window.length >= 50 else 0
    total = sum(tokens.values())
    assert {name: tokens[name] / total for name in mix} == pytest.approx({"a": 0.25, "b": 0.25, "short": 0.5}, rel=0.1)
    for name in ("a", "b"):
        assert long_tokens[name] / tokens[name] == pytest.approx(share, rel=0.1)
    assert long_tokens["short"] == 0, "a source without long documents keeps its share"
    pools = make_pools(MIXED, mix, long_documents)
    assert long_share(pools, 50) == pytest.approx(share / 2) and long_share(pools, 150) < share / 2
    natural = (600 / 1000 + 260 / 860) / 4
    assert long_share(make_pools(MIXED, mix), 50) == pytest.approx(natural)
    counts = passes(pools, total)
    assert counts["a >= 50"] == pytest.approx(total * share / 4 / 600)
    assert mixture.counts["a >= 50"] / 6 == pytest.approx(counts["a >= 50"], rel=0.1)


def test_the_order_never_changes():
    """Catches anything that would give old checkpoints another order: these draws were written down."""
    drawn, _ = draws(0, 6, {"short": 1, "long": 4})
    assert [(w.source, w.document) for w in drawn] == PINNED


@pytest.mark.parametrize(
    ("mix", "named"),
    [
        ({"shrot": 1.0}, "no such source; there are long, other, short"),
        ({"short": -1.0}, "at least 0"),
        ({"short": 0.0}, "above 0"),
        ({}, "above 0"),
    ],
)
def test_impossible_mix(mix, named):
    """Catches a misspelt source that silently gets nothing."""
    with pytest.raises(ValueError, match=named):
        make_pools(LENGTHS, mix)
