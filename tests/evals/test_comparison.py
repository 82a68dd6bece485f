"""evals/comparison.py: gaps are paired where they can be, and smoothing does not reach across a stage switch."""

import numpy as np
import pytest

from evals.comparison import ScoredCurve, column, position_gap, smooth
from train.position_loss import PositionCurve, Trailing

NUM_DOCUMENTS, NUM_BUCKETS = 12, 4


def scored(document_loss, keys):
    """A ScoredCurve whose curve is that of these documents."""
    mean, se = document_loss.mean(axis=0), document_loss.std(axis=0, ddof=1) / np.sqrt(len(document_loss))
    ones = np.ones(NUM_BUCKETS)
    edges = np.arange(NUM_BUCKETS + 1) * 8
    curve = PositionCurve(
        32, edges, mean, se, 8 * ones, ones, Trailing(mean[-1], se[-1], 8, 1), np.ones(32), np.ones(32)
    )
    return ScoredCurve(curve, keys, document_loss)


def two_runs():
    rng = np.random.default_rng(0)
    documents = rng.normal(3.0, 0.5, (NUM_DOCUMENTS, 1))  # documents differ far more than the runs do
    reference = documents + rng.normal(0, 0.01, (NUM_DOCUMENTS, NUM_BUCKETS))
    run = documents + 0.05 + rng.normal(0, 0.01, (NUM_DOCUMENTS, NUM_BUCKETS))
    return run, reference


def test_gap_pairs_equal_documents_in_whatever_order_they_come():
    """Catches rows paired by place instead of by document, a wrong sign, and an interval that ignores the pairing."""
    run, reference = two_runs()
    keys = [f"k{i}" for i in range(NUM_DOCUMENTS)]
    order = np.random.default_rng(1).permutation(NUM_DOCUMENTS)
    gap, se, paired = position_gap(scored(run, keys), scored(reference[order], [keys[i] for i in order]))
    assert paired
    np.testing.assert_allclose(gap, [np.mean([run[i, b] - reference[i, b] for i in range(12)]) for b in range(4)])
    assert np.all(gap > 0.03) and np.all(se < 0.01)
    unpaired = position_gap(scored(run, keys), scored(reference, [f"other{i}" for i in range(NUM_DOCUMENTS)]))
    assert not unpaired[2] and np.all(unpaired[1] > 10 * se), "the runs' own errors are far wider"
    np.testing.assert_allclose(unpaired[0], gap)


def test_gap_uses_only_documents_both_runs_scored():
    """Catches a mean over documents of which one run has other ones."""
    run, reference = two_runs()
    keys = [f"k{i}" for i in range(NUM_DOCUMENTS)]
    gap, _, paired = position_gap(scored(run, keys), scored(reference[:5], keys[:5]))
    assert paired
    np.testing.assert_allclose(gap, (run[:5] - reference[:5]).mean(axis=0))


def test_smoothing_keeps_the_mean_and_stops_at_a_switch():
    """Catches a smoothed curve that lags behind, and an average that hides the jump where the attention is switched."""
    tokens = np.arange(1, 401) * 10.0
    values = np.where(tokens <= 3000, 2.0, 1.0)
    np.testing.assert_array_equal(smooth(tokens, values, [(0, "sparse"), (3000, "full")]), values)
    crossing = smooth(tokens, values)
    assert np.any((crossing > 1.1) & (crossing < 1.9)), "without the boundary it would be blurred"
    line = smooth(tokens, tokens)
    np.testing.assert_allclose(line[10:-10], tokens[10:-10], err_msg="a straight line stays where it is")
    assert len(smooth(tokens[:3], values[:3], [(0, "a")])) == 3


def test_missing_values_become_nan():
    """Catches a null that is taken for zero."""
    np.testing.assert_array_equal(column([{"a": 1}, {"a": None}, {}], "a"), [1.0, np.nan, np.nan])


@pytest.mark.parametrize("num_documents", [0, 1])
def test_too_few_shared_documents_are_not_paired(num_documents):
    """Catches an interval made from one difference."""
    run, reference = two_runs()
    keys = [f"k{i}" for i in range(NUM_DOCUMENTS)]
    other = keys[:num_documents] + [f"x{i}" for i in range(NUM_DOCUMENTS - num_documents)]
    assert not position_gap(scored(run, keys), scored(reference, other))[2]
