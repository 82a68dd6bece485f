"""evals/statistics.py: intervals that hold as often as they say, against simulation and tables."""

import numpy as np
import pytest

from evals.statistics import clustered_mean, clusters_needed, half_width, student_quantile, wilson


@pytest.mark.parametrize("num_clusters", [8, 40])
def test_clustered_intervals_cover_at_their_rate(num_clusters):
    """Catches errors that take tokens or documents for independent: documents of one cluster share a level, clusters
    have 1 to 6 documents of 50 to 150 tokens. The interval should hold the true mean in 95 of 100 experiments."""
    rng = np.random.default_rng(0)
    covered = naive = 0
    experiments = 700
    for _ in range(experiments):
        clusters = np.repeat(np.arange(num_clusters), rng.integers(1, 7, num_clusters))
        counts = rng.integers(50, 151, len(clusters))
        level = rng.normal(3, 0.5, num_clusters)[clusters] + rng.normal(0, 0.3, len(clusters))
        sums = counts * level + rng.normal(0, 2.5, len(clusters)) * np.sqrt(counts)  # token noise, added up
        found = clustered_mean(sums, counts, clusters.tolist())
        covered += abs(found.mean - 3) < half_width(found.se, found.clusters)
        alone = clustered_mean(sums, counts, list(range(len(clusters))))
        naive += abs(found.mean - 3) < half_width(alone.se, alone.clusters)
    assert 0.92 < covered / experiments < 0.975
    assert naive / experiments < 0.88, "documents as clusters: the simulation would not show the difference"


def test_equal_clusters_give_the_textbook_error():
    """Catches a factor of n / (n - 1), and buckets or missing cells mixed up."""
    rng = np.random.default_rng(1)
    counts = np.full((6, 3), 10.0)
    counts[4:, 2] = 0
    means = rng.normal(2, 1, (6, 3))
    found = clustered_mean(means * counts, counts, list("abcdef"))
    np.testing.assert_allclose(found.se[:2], means[:, :2].std(axis=0, ddof=1) / np.sqrt(6))
    np.testing.assert_allclose(found.mean[2], means[:4, 2].mean())
    assert found.clusters.tolist() == [6, 6, 4] and found.count.tolist() == [60, 60, 40]
    one = clustered_mean(means * counts, counts, ["a"] * 6)
    assert np.isnan(one.se).all() and np.isnan(half_width(one.se, one.clusters)).all()


def test_quantiles_of_student():
    """Catches a normal quantile for few clusters (values of the usual table)."""
    table = {(0.975, 1): 12.7062, (0.975, 2): 4.3027, (0.975, 10): 2.2281, (0.95, 5): 2.0150, (0.995, 30): 2.7500}
    for (probability, freedom), value in table.items():
        assert student_quantile(probability, freedom) == pytest.approx(value, abs=2e-4)
    assert half_width(1.0, 10**6) == pytest.approx(1.95996, abs=1e-4)
    assert half_width(1.0, 11, comparisons=5) == pytest.approx(student_quantile(0.995, 10))


def test_numbers_of_documents_and_of_hits():
    """Catches planning numbers off their formulas ((1.96 sd / gap)^2), and a share of 0 with an interval of 0."""
    assert clusters_needed(0.1, 0.01, 0.5) == pytest.approx(387, abs=1)
    assert clusters_needed(0.1, 0.01) == pytest.approx(787, abs=1)
    assert clusters_needed(0.0, 0.01) == 2
    low, high = wilson(0.0, 20)
    assert low == 0 and high == pytest.approx(0.1611, abs=1e-3)
    assert wilson(0.5, 20) == pytest.approx((0.2993, 0.7007), abs=1e-3)
