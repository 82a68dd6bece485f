"""The sequence of draws: a function of seed and mix alone, in the shares asked for."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.mixture import BLOCK, Mixture, draw_weights, expected_epochs

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
    again.draws, again.counts = there.draws, dict(there.counts)
    assert [again.draw() for _ in range(50)] == whole[skip:]
    assert draws(seed + 1, len(whole), mix)[0] != whole


def test_each_epoch_takes_every_document_once_in_another_order():
    """Catches sampling with replacement, and epochs that repeat one permutation."""
    drawn, mixture = draws(3, 150, {"short": 1})
    epochs = [[w.document for w in drawn[i : i + 50]] for i in (0, 50, 100)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])
    assert mixture.epochs == {"short": 3.0, "long": 0.0, "other": 0.0}
    assert {(w.start, w.length) for w in drawn} == {(0, 10)}  # a document of 11 tokens has 10 inputs


def test_token_shares_converge():
    """Catches weights taken as shares of documents: the mean lengths differ tenfold here."""
    mix = {"short": 2.0, "long": 1.0, "other": 1.0}
    drawn, mixture = draws(0, 3 * BLOCK, mix)
    tokens = Counter()
    for window in drawn:
        tokens[window.source] += window.length
    total = sum(tokens.values())
    assert {name: tokens[name] / total for name in mix} == pytest.approx(
        {"short": 0.5, "long": 0.25, "other": 0.25}, rel=0.1
    )
    assert mixture.epochs == pytest.approx(expected_epochs(LENGTHS, mix, total), rel=0.1)


def test_a_change_of_mix_leaves_each_source_at_its_place():
    """Catches a change of stage that restarts a source: its documents go on through the epoch."""
    mixture = Mixture(LENGTHS, 5)
    mixture.set_mix({"short": 1, "long": 1})
    seen = [mixture.draw() for _ in range(30)]
    mixture.set_mix({"short": 1})
    seen += [mixture.draw() for _ in range(50 - sum(w.source == "short" for w in seen))]
    assert sum(w.source == "long" for w in seen) > 0
    assert sorted(w.document for w in seen if w.source == "short") == list(range(50))


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
        draw_weights(LENGTHS, mix)
