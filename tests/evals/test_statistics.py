"""evals/statistics.py: intervals that hold as often as they say, against simulation and tables."""

import numpy as np
import pytest

from evals.bands import no_band, relative_t, simultaneous_factor
from evals.statistics import clustered_mean, clusters_needed, half_width, student_quantile, wilson


@pytest.mark.parametrize("num_clusters", [8, 40])
def test_clustered_intervals_cover_at_their_rate(num_clusters):
    """Catches errors that take tokens or documents for independent: documents of one cluster share a level, clusters
    have 1 to 6 documents of 50 to 150 tokens. The interval should hold the true mean in 95 of 100 experiments."""
    rng = np.random.default_rng(0)
    covered = naive = 0
    experiments = 500
    for _ in range(experiments):
        clusters = np.repeat(np.arange(num_clusters), rng.integers(1, 7, num_clusters))
        counts = rng.integers(50, 151, len(clusters))
        level = rng.normal(3, 0.5, num_clusters)[clusters] + rng.normal(0, 0.3, len(clusters))
        sums = counts * level + rng.normal(0, 2.5, len(clusters)) * np.sqrt(counts)  # token noise, added up
        found = clustered_mean(sums, counts, clusters.tolist())
        covered += abs(found.mean - 3) < half_width(found.se, found.freedom)
        alone = clustered_mean(sums, counts, list(range(len(clusters))))
        naive += abs(found.mean - 3) < half_width(alone.se, alone.freedom)
    assert 0.92 < covered / experiments < 0.975
    assert naive / experiments < 0.88, "documents as clusters: the simulation would not show the difference"


SIZES = {
    "one large": [15, 4, 3, 2, 2, *[1] * 6],
    "three large": [8, 8, 8, 3, 2, 1],
    "a ladder": [6, 5, 4, 3, 2, 1],
    "a few": [3, 3, 2, 1],
    "equal": [5] * 6,
}


@pytest.mark.parametrize("alike", [0.0, 0.5])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_unequal_clusters_cover_at_their_rate(sizes, alike):
    """Catches intervals that are too narrow where clusters are of very unequal size (the jackknife with one degree of
    freedom less than clusters holds in 90 to 92 of 100 here), and others that are far too wide. `alike`: the part of
    the variance that a cluster's documents share."""
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(len(sizes)), sizes)
    experiments = 4000
    level = rng.standard_normal((len(sizes), experiments))[clusters] * np.sqrt(alike)
    values = level + rng.standard_normal((len(clusters), experiments)) * np.sqrt(1 - alike)
    found = clustered_mean(values, np.ones_like(values), clusters.tolist())
    covered = np.abs(found.mean) < found.se * (half_width(1.0, found.freedom[0]))
    assert 0.93 < covered.mean() < 0.97


def test_no_interval_where_one_cluster_is_nearly_all():
    """Catches an interval of clusters of 40, 1, 1, 1, 1 and 1 documents, which held in 86 to 99 of 100 experiments."""
    clusters = np.repeat(np.arange(6), [40, 1, 1, 1, 1, 1])
    values = np.random.default_rng(0).standard_normal(45)
    found = clustered_mean(values, np.ones(45), clusters.tolist())
    assert found.se > 0 and np.isnan(found.freedom) and np.isnan(half_width(found.se, found.freedom))


BANDS = {
    "four": [1] * 4,
    "equal": [3] * 8,
    "twelve alone": [1] * 12,
    "fifteen": [4] * 15,
    "a ladder": [4, 4, 3, 3, 2, 2, 1, 1],
    "one large": [5, 2, 2, 2, 2, 2, 2],
    "one large of many": [12, *[2] * 15],
    "sixty": [1] * 60,
    "many": [2] * 70,
    "many unequal": [9, 6, 5, *[1] * 70],
}


def coverage_of_band(sizes, together, alike, buckets=8, missing=False, experiments=4000) -> tuple[float, np.ndarray]:
    """(share of experiments whose band holds the truth everywhere, factor of each), of those that have a band.
    `together`: the part of the variance that buckets share; `alike`: the part that a cluster's documents share;
    `missing`: documents end after half of the buckets or later. All columns of several experiments go through the
    functions at once."""
    rng = np.random.default_rng(1)
    clusters = np.repeat(np.arange(len(sizes)), sizes)
    covered, factors, batch = 0, [], 25
    for _ in range(experiments // batch):
        parts = [
            rng.standard_normal((rows, batch, 1)) * np.sqrt(together)
            + rng.standard_normal((rows, batch, buckets)) * np.sqrt(1 - together)
            for rows in (len(clusters), len(sizes))
        ]
        values = (parts[0] * np.sqrt(1 - alike) + parts[1][clusters] * np.sqrt(alike)).reshape(len(clusters), -1)
        known = np.ones((len(clusters), batch, buckets))
        if missing:
            known *= np.arange(buckets) < rng.integers(buckets // 2, buckets + 1, (len(clusters), batch, 1))
        known = known.reshape(values.shape)
        found = clustered_mean(values * known, known, clusters.tolist())
        shapes = (x.reshape(batch, buckets) for x in (found.clusters, found.largest_share))
        drawn = np.array([no_band(*shape) is None for shape in zip(*shapes)])
        assert missing or drawn.all()
        largest = relative_t(values * known, known, clusters).reshape(-1, batch, buckets).max(axis=2)
        student = half_width(1.0, found.freedom).reshape(batch, buckets).max(axis=1)
        factors.append((np.quantile(largest, 0.95, axis=0) * student)[drawn])
        within = np.abs(found.mean / found.se).reshape(batch, buckets).max(axis=1)[drawn] < factors[-1]
        covered += within.sum()
    one = slice(int(drawn.argmax()) * buckets, (int(drawn.argmax()) + 1) * buckets)
    first = clustered_mean(values[:, one] * known[:, one], known[:, one], clusters.tolist())
    alone = simultaneous_factor(values[:, one] * known[:, one], known[:, one], clusters.tolist(), first)
    np.testing.assert_allclose(alone, factors[-1][0])
    total = np.concatenate(factors)
    assert len(total) > experiments / 8
    return covered / len(total), total


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("alike", [0.0, 0.5])
@pytest.mark.parametrize("together", [0.0, 0.8])
@pytest.mark.parametrize(
    "name", [name if name == "a ladder" else pytest.param(name, marks=pytest.mark.long) for name in BANDS]
)
def test_bands_cover_at_their_rate(name, together, alike):
    """Catches a band of all buckets at once that is Bonferroni's (far too wide for few clusters or buckets that go
    together) or one bucket's (too narrow); and with 15 clusters of one size, one that is wider than Bonferroni's by
    more than a fifth."""
    sizes = BANDS[name]
    quick = name == "a ladder"
    covered, factors = coverage_of_band(sizes, together, alike, experiments=1000 if quick else 4000)
    print(f"{name}, {together}, {alike}: {covered:.4f}")
    assert (0.92 if quick else 0.93) < covered < (0.98 if quick else 0.97)
    if len(set(sizes)) == 1 and len(sizes) >= 15:
        bonferroni = student_quantile(1 - 0.05 / 2 / 8, len(sizes) - 1)
        assert factors.max() < 1.2 * bonferroni and factors.mean() < 1.02 * bonferroni


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("buckets", "missing"), [(2, False), (32, False), (8, True)])
def test_bands_of_other_shapes_cover_at_their_rate(buckets, missing):
    """The same for few and many buckets, and where documents end early."""
    for name in ("twelve alone", "equal"):
        covered, _ = coverage_of_band(BANDS[name], 0.5, 0.3, buckets, missing)
        print(f"{name}, {buckets}, {missing}: {covered:.4f}")
        assert 0.93 < covered < 0.97


def test_many_clusters_are_drawn_out_of_fewer_numbers(monkeypatch):
    """Catches buckets that no longer go together, or in another way, where there are more clusters than are drawn one
    by one."""
    rng = np.random.default_rng(2)
    values = rng.standard_normal((250, 1)) * 0.9 + rng.standard_normal((250, 8)) * 0.4
    ones = np.ones_like(values)
    short = relative_t(values, ones, range(250)).max(axis=1)
    monkeypatch.setattr("evals.bands.FEW", 250)
    whole = relative_t(values, ones, range(250)).max(axis=1)
    assert not np.array_equal(short, whole)
    np.testing.assert_allclose(np.quantile(short, [0.5, 0.9]), np.quantile(whole, [0.5, 0.9]), rtol=0.12)


def test_a_band_is_refused_with_its_reason():
    """Catches a band over clusters of 15, 4, 3, 2, 2 and six of one document: 91 to 98 of 100 by how alike those of a
    cluster are; and over 20, 10, 10 and 77 of one: 92."""
    sizes = np.array([15, 4, 3, 2, 2, *[1] * 6])
    assert "one cluster has 47% of the documents" in no_band(np.array([11.0]), np.array([sizes.max() / sizes.sum()]))
    sizes = np.array([20, 10, 10, *[1] * 77])
    assert "one cluster of 80 has 17%" in no_band(np.array([80]), np.array([sizes.max() / sizes.sum()]))
    assert "4 clusters" in no_band(np.array([3.0, 9.0]), np.array([0.2, 0.2]))


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
    assert np.isnan(one.se).all() and np.isnan(half_width(one.se, one.freedom)).all()


def test_quantiles_of_student():
    """Catches a normal quantile for few clusters (values of the usual table)."""
    table = {(0.975, 1): 12.7062, (0.975, 2): 4.3027, (0.975, 10): 2.2281, (0.95, 5): 2.0150, (0.995, 30): 2.7500}
    for (probability, freedom), value in table.items():
        assert student_quantile(probability, freedom) == pytest.approx(value, abs=2e-4)
    assert half_width(1.0, 10**6) == pytest.approx(1.95996, abs=1e-4)


def test_numbers_of_documents_and_of_hits():
    """Catches planning numbers off their formulas ((1.96 sd / gap)^2), and a share of 0 with an interval of 0."""
    assert clusters_needed(0.1, 0.01, 0.5) == pytest.approx(387, abs=1)
    assert clusters_needed(0.1, 0.01) == pytest.approx(787, abs=1)
    assert clusters_needed(0.0, 0.01) == 2
    low, high = wilson(0.0, 20)
    assert low == 0 and high == pytest.approx(0.1611, abs=1e-3)
    assert wilson(0.5, 20) == pytest.approx((0.2993, 0.7007), abs=1e-3)
