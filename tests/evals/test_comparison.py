"""evals/comparison.py: gaps are paired where they can be, and smoothing does not reach across a stage switch."""

import numpy as np
import pytest

from evals.comparison import column, smooth
from evals.paired import difference
from evals.position_loss import Evaluation
from train.record.position_loss import PositionCurve, Trailing

NUM_DOCUMENTS, NUM_BUCKETS = 12, 4


def scored(document_loss, keys, clusters=None):
    """An Evaluation whose curve is that of these documents."""
    mean, se = document_loss.mean(axis=0), document_loss.std(axis=0, ddof=1) / np.sqrt(len(document_loss))
    ones = np.ones(NUM_BUCKETS)
    edges = np.arange(NUM_BUCKETS + 1) * 8
    curve = PositionCurve(
        32, edges, mean, se, 8 * ones, len(keys) * ones, Trailing(mean[-1], se[-1], 8, 1), np.ones(32), np.ones(32)
    )
    return Evaluation(curve, keys, keys, clusters or keys, document_loss, 0)


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
    paired = difference(scored(run, keys), scored(reference[order], [keys[i] for i in order]))
    gap, se = paired.by_bucket.mean, paired.by_bucket.se
    assert paired.num_documents == NUM_DOCUMENTS
    np.testing.assert_allclose(gap, [np.mean([run[i, b] - reference[i, b] for i in range(12)]) for b in range(4)])
    np.testing.assert_allclose(se, (run - reference).std(axis=0, ddof=1) / np.sqrt(NUM_DOCUMENTS))
    assert np.all(gap > 0.03) and np.all(se < 0.01)
    unpaired = difference(scored(run, keys), scored(reference, [f"other{i}" for i in range(NUM_DOCUMENTS)]))
    assert not unpaired.paired and np.all(unpaired.by_bucket.se > 10 * se), "the runs' own errors are far wider"
    np.testing.assert_allclose(unpaired.by_bucket.mean, gap)


def test_gap_uses_only_documents_both_runs_scored():
    """Catches a mean over documents of which one run has other ones."""
    run, reference = two_runs()
    keys = [f"k{i}" for i in range(NUM_DOCUMENTS)]
    paired = difference(scored(run, keys), scored(reference[:5], keys[:5]))
    assert paired.num_documents == 5
    np.testing.assert_allclose(paired.by_bucket.mean, (run[:5] - reference[:5]).mean(axis=0))
    with pytest.raises(ValueError, match="one document only"):
        difference(scored(run, keys), scored(reference, keys[:1] + [f"x{i}" for i in range(11)]))


def test_gap_of_clustered_documents_and_of_buckets_some_do_not_fill():
    """Catches documents of one origin taken for independent, and a missing bucket taken for a difference of zero."""
    rng = np.random.default_rng(3)
    shift = np.repeat(rng.normal(0.1, 0.05, (4, 1)), 3, axis=0) * np.ones(NUM_BUCKETS)  # by cluster, not by document
    reference = rng.normal(3, 0.5, (12, NUM_BUCKETS))
    keys, clusters = [f"k{i}" for i in range(12)], [f"c{i // 3}" for i in range(12)]
    run = reference + shift
    run[:6, -1] = np.nan
    gap = difference(scored(run, keys, clusters), scored(reference, keys)).by_bucket
    means = shift.reshape(4, 3, NUM_BUCKETS).mean(axis=1)
    np.testing.assert_allclose(gap.se[0], means[:, 0].std(ddof=1) / 2)
    np.testing.assert_allclose(gap.mean[-1], means[2:, -1].mean())
    assert gap.clusters.tolist() == [4, 4, 4, 2]


def test_the_band_holds_all_buckets_and_more_documents_show_smaller_gaps():
    """Catches a band no wider than the single intervals, and numbers of documents that ignore the spread."""
    run, reference = two_runs()
    found = difference(*(scored(x, [f"k{i}" for i in range(NUM_DOCUMENTS)]) for x in (run, reference)))
    assert np.all(found.band() > 1.2 * found.interval())
    needed = found.summary(gap=0.002)
    for sd, narrow, power in zip(found.sd, needed["needed_for_interval"], needed["needed_for_80_percent_power"]):
        assert 0 <= narrow - (1.96 * sd / 0.002) ** 2 < 4 and power > 1.9 * narrow


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
