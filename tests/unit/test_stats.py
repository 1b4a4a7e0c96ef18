import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autointerp import stats


def slow_auroc(positives, negatives):
    return sum((p > n) + 0.5 * (p == n) for p in positives for n in negatives) / (len(positives) * len(negatives))


def test_wilson_by_hand():
    # Newcombe 1998, table I: 81 of 263 gives 0.2553 to 0.3662.
    interval = stats.wilson(81, 263)
    assert (interval.low, interval.high) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    # 10 of 10: the limit is n / (n + z^2) = 10 / 13.8415.
    interval = stats.wilson(10, 10)
    assert interval.high == 1.0
    assert interval.low == pytest.approx(10 / 13.8415, abs=1e-4)


def test_wilson_near_one_is_wider_by_the_rare_event_limit():
    # One failure in 50: Wilson's limit would be 1 - 0.1765 / 50; the Poisson limit is -ln(0.95) / 50.
    assert 1 - stats.wilson(49, 50).high == pytest.approx(-math.log(0.95) / 50)


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(1, 5))
@settings(max_examples=100, deadline=None)
def test_wilson_is_symmetric_and_holds_its_value(pair, deff):
    x, n = pair
    a, b = stats.wilson(x, n, deff=deff), stats.wilson(n - x, n, deff=deff)
    assert 0 <= a.low <= a.value <= a.high <= 1
    assert (a.low, a.high) == pytest.approx((1 - b.high, 1 - b.low))
    plain = stats.wilson(x, n)
    assert a.high - a.low >= plain.high - plain.low - 1e-9


def test_wilson_refuses_no_examples():
    with pytest.raises(ValueError, match="at least one"):
        stats.wilson(0, 0)


def test_balanced_accuracy_adds_squared_distances():
    tpr, tnr = stats.wilson(40, 50), stats.wilson(45, 50)
    interval = stats.balanced_accuracy(tpr, tnr)
    assert interval.value == pytest.approx(0.85)  # (0.8 + 0.9) / 2
    assert interval.low == pytest.approx(0.85 - math.sqrt((0.8 - tpr.low) ** 2 + (0.9 - tnr.low) ** 2) / 2)
    assert interval.high == pytest.approx(0.85 + math.sqrt((tpr.high - 0.8) ** 2 + (tnr.high - 0.9) ** 2) / 2)


def test_balanced_accuracy_of_perfect_rates_has_a_width():
    interval = stats.balanced_accuracy(stats.wilson(50, 50), stats.wilson(50, 50))
    assert (interval.value, interval.high) == (1.0, 1.0)
    assert 0.94 < interval.low < 0.96


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.lists(st.integers(0, 4), min_size=1, max_size=12))
@settings(max_examples=100, deadline=None)
def test_auroc_equals_its_definition(positives, negatives):
    assert stats.auroc(positives, negatives) == pytest.approx(slow_auroc(positives, negatives))


def test_auroc_needs_both_classes():
    with pytest.raises(ValueError, match="0 negatives"):
        stats.auroc([1.0], [])


def test_auroc_limits_solve_the_score_equation():
    value, m, n, z2 = 0.8, 50, 40, 1.959964**2
    interval = stats.auroc_newcombe(value, m, n)
    for limit in (interval.low, interval.high):
        extra = (m + n) / 2 - 1
        variance = limit * (1 - limit) * (1 + extra * ((1 - limit) / (2 - limit) + limit / (1 + limit))) / (m * n)
        assert (value - limit) ** 2 == pytest.approx(z2 * variance, rel=1e-5)
    mirrored = stats.auroc_newcombe(1 - value, n, m)
    assert (mirrored.low, mirrored.high) == pytest.approx((1 - interval.high, 1 - interval.low))


def test_auroc_of_one_has_a_width():
    interval = stats.auroc_newcombe(1.0, 50, 50)
    assert interval.high == 1.0
    assert 0.94 < interval.low < 0.98


def test_design_effect_by_hand():
    # Clusters (1, 1, 0, 0), (1, 1, 1, 1), (0, 0, 0, 0): sums of x - 1/2 are 0, 2 and -2; (0 + 4 + 4) / (12 - 4) = 1 by clusters,
    # 12 / 4 / 11 = 3/11 without. Three clusters: t(0.975, 2) = 4.30265 over 1.95996 widens the excess; capped at the size, 4.
    x, clusters = [1, 1, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0], np.arange(12) // 4
    assert stats.design_effect(x, clusters) == 4
    # Twelve of two, six alike, two by two of one kind and the other, the rest mixed.
    x = [1, 1, 0, 0] * 3 + [1, 0] * 6
    # Sums of x - 1/2: +-1 six times: 6 / (24 - 2) by clusters, 24 / 4 / 23 without; t(0.975, 11) = 2.20099.
    expected = 1 + ((6 / 22) / (6 / 23) - 1) * (2.20099 / 1.959964) ** 4
    assert stats.design_effect(x, np.arange(24) // 2) == pytest.approx(expected, rel=1e-4)
    # (1, 0), (1, 0): all that differs, differs within.
    assert stats.design_effect([1, 0, 1, 0], [0, 0, 1, 1]) == 1
    for clusters in ([0, 1, 2, 3], [5, 5, 5, 5]):
        assert stats.design_effect([1, 0, 1, 1], clusters) == stats.design_effect([1, 0, 1, 1], clusters, clusters) == 1
    assert stats.design_effect([1, 1, 1, 1], [0, 0, 1, 1]) == 1
    assert stats.design_effect([], []) == 1


def test_a_design_effect_of_two_ways_to_cluster_by_hand():
    # A grid of 10 prompts and 10 documents; wrong is half of prompt 0 and half of document 0, 9 of 100.
    x = np.ones((10, 10))
    x[0, :5] = x[:5, 0] = 0
    prompts, documents = (way.ravel() for way in np.indices(x.shape))
    # Sums of x - 0.91 in either way: -4.1 once, -0.1 four times, 0.9 five times, so that it is 20.9 / 90 over 8.19 / 99. No two
    # are of one pair.
    excess = (20.9 / 90) / (8.19 / 99) - 1
    factor = (2.262157 / 1.959964) ** 4
    assert stats.design_effect(x.ravel(), prompts) == pytest.approx(1 + excess * factor, rel=1e-5)
    assert stats.design_effect(x.ravel(), prompts, documents) == pytest.approx(1 + 2 * excess * factor, rel=1e-5)
    assert stats.design_effect(x.ravel(), prompts, range(100)) == pytest.approx(1 + excess * factor, rel=1e-5)
    # The same clusters twice are clusters once.
    assert stats.design_effect(x.ravel(), prompts, prompts + 7) == pytest.approx(1 + excess * factor, rel=1e-5)
    # What lies in documents alone is not less for crossing prompts that vary too little.
    right = np.ones((10, 10))
    right[0] = 0
    alone = stats.design_effect(right.ravel(), prompts)
    assert alone == 10 and stats.design_effect(right.ravel(), prompts, documents) == 10


def test_a_design_effect_is_bounded_by_the_size_of_clusters():
    """Two prompts of five, 2 right in one and 3, 4 or 5 in the other: two clusters say little, and no more than their size."""
    prompts = [0] * 5 + [1] * 5
    effects = [stats.design_effect([1, 1, 0, 0, 0] + [1] * right + [0] * (5 - right), prompts) for right in (3, 4, 5)]
    assert effects == [1, 5, 5]
    low = stats.wilson(6, 10, deff=effects[1])
    assert 0 < low.low < 0.1 and 0.9 < low.high < 1


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_a_design_effect_changes_little_with_what_changes_little(data):
    values = data.draw(st.lists(st.floats(0, 1), min_size=12, max_size=12))
    ways = [data.draw(st.lists(st.integers(0, 3), min_size=12, max_size=12)) for _ in range(2)]
    x = np.array(values)
    effect = stats.design_effect(x, *ways)
    most = max(float(np.square(np.bincount(way)).sum()) / 12 for way in ways)
    assert 1 <= effect <= max(most, 1)
    assert stats.design_effect(3 * x + 5, *ways) == pytest.approx(effect, rel=1e-6)
    assert stats.design_effect(x, *ways[::-1]) == pytest.approx(effect, rel=1e-9)
    if np.ptp(x) > 1e-3:
        assert stats.design_effect(x + 1e-9 * np.arange(12), *ways) == pytest.approx(effect, rel=1e-3)


def test_clustered_accuracy_without_clusters_is_the_plain_one():
    right = [1.0] * 40 + [0.0] * 10
    plain = stats.balanced_accuracy(stats.wilson(40, 50), stats.wilson(40, 50))
    assert stats.clustered_accuracy(right, right, range(100)) == plain
    # Both classes wrong in the same prompts: neither class alone shows it.
    shared = stats.clustered_accuracy(right, right, [*range(50), *range(50)])
    assert shared.high - shared.low > 1.2 * (plain.high - plain.low)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=9), st.lists(st.integers(0, 4), min_size=1, max_size=9))
@settings(max_examples=50, deadline=None)
def test_influence_on_the_auroc_is_the_mean_over_its_pairs(positives, negatives):
    wins = np.array([[(p > n) + 0.5 * (p == n) for n in negatives] for p in positives])
    expected = [(wins.mean(axis=1) - wins.mean()) / len(positives), (wins.mean(axis=0) - wins.mean()) / len(negatives)]
    assert stats.auroc_influence(positives, negatives) == pytest.approx(np.concatenate(expected), abs=1e-12)


def test_summary_counts_missing_and_collapses_latents():
    summary = stats.summarise([0.5, 0.7, None, float("nan"), 0.9], latents=["a", "a", "b", "c", "d"])
    assert (summary.num_latents, summary.num_missing) == (2, 2)
    assert summary.mean.value == pytest.approx((0.6 + 0.9) / 2)
    assert summary.weighted_mean is None


def test_summary_of_nothing():
    summary = stats.summarise([None, None])
    assert (summary.num_latents, summary.num_missing, summary.mean, summary.median) == (0, 2, None, None)


def test_weighted_mean_by_hand():
    summary = stats.summarise([0.5, 1.0, 0.0], weights=[1, 3, 0])
    assert summary.weighted_mean.value == pytest.approx(3.5 / 4)
    equal = stats.summarise([0.5, 1.0, 0.6, 0.7], weights=[2, 2, 2, 2])
    assert (equal.weighted_mean.low, equal.weighted_mean.high) == pytest.approx((equal.mean.low, equal.mean.high))


def test_summary_refuses_unequal_lengths():
    with pytest.raises(ValueError, match="equally many"):
        stats.summarise([1.0, 2.0], weights=[1.0])


def test_median_interval_by_order_statistics():
    # n = 10: Pr(Binomial(10, 1/2) <= 1) = 11/1024, so the 2nd smallest to the 2nd largest covers 1 - 22/1024 = 0.979.
    interval = stats.median_order(np.arange(10))
    assert (interval.value, interval.low, interval.high) == (4.5, 1, 8)
    assert math.isnan(stats.median_order([1, 2, 3, 4, 5]).low)


def test_mean_of_one_value_has_no_limits():
    interval = stats.mean_t([0.3])
    assert interval.value == 0.3
    assert math.isnan(interval.low)


@pytest.mark.parametrize("rate", [0.8, 1.0])
def test_coverage_of_rates_spot_check(rate):
    random = np.random.default_rng(1)
    cover = [i.low <= rate <= i.high for i in (stats.wilson(x, 50) for x in random.binomial(50, rate, 300))]
    assert np.mean(cover) >= 0.9


def test_correlation_equals_its_definition():
    rng = np.random.default_rng(0)
    x = rng.normal(size=200) + 1e6
    y = 0.4 * x + rng.normal(size=200) - 3e5
    found = stats.correlation(x, y, np.repeat(np.arange(20), 10))
    assert found.value == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-9)
    assert found.low < found.value < found.high
    assert found.method == "jackknife_document"


def test_correlation_jackknife_by_hand():
    rng = np.random.default_rng(3)
    x, y, doc = rng.normal(size=30), rng.normal(size=30), np.arange(30) % 6
    z = np.array([np.arctanh(np.corrcoef(x[doc != d], y[doc != d])[0, 1]) for d in range(6)])
    error = np.sqrt(5 / 6 * ((z - z.mean()) ** 2).sum())
    r = np.corrcoef(x, y)[0, 1]
    found = stats.correlation(x, y, doc)
    d = z - z.mean()
    kurtosis = (d**4).mean() / (d**2).mean() ** 2
    assert 2 * 6 / (kurtosis - 1) > 5
    # So the degrees of freedom are those of 6 documents: t(0.975, 5) = 2.57058.
    assert (found.low, found.high) == pytest.approx(
        (np.tanh(np.arctanh(r) - 2.57058 * error), np.tanh(np.arctanh(r) + 2.57058 * error)), abs=1e-5
    )


def test_a_document_that_carries_the_variance_leaves_few_degrees_of_freedom():
    # Squares 1, 1, 1, 1, 16: kurtosis 5 * 260 / 400 = 3.25, so 2 * 5 / 2.25 = 4.44, and not more than 4.
    assert stats._degrees(np.array([1.0, 1, 1, 1, 16])) == 4
    # Twenty of which one has nearly all: kurtosis near 20.
    assert stats._degrees(np.array([1e-6] * 19 + [1.0])) == pytest.approx(40 / 19, abs=1e-3)
    assert stats._degrees(np.ones(5)) == 4


def test_correlation_keeps_its_sign_and_is_undefined_for_constants():
    x = np.array([0.0, 0, 1, 5, 0, 2])
    assert stats.correlation(x, -2 * x + 3, range(6)).value == pytest.approx(-1)
    assert stats.correlation(x, np.full(6, 0.7), range(6)) is None
    assert stats.correlation(np.full(6, 0.1) + 1e-17, x, range(6)) is None
    assert stats.correlation([], [], []) is None
    with pytest.raises(ValueError, match="equally many"):
        stats.correlation([1, 2], [1], [0, 0])


def test_a_correlation_of_one_has_the_limits_of_as_many_right_documents():
    # Four documents that carry as much of the variance each: 4 / (4 + 1.95996^2) = 0.5101. A silent one does not count.
    x = np.array([0.0, 1, 0, 1, 0, 1, 0, 1])
    doc = np.repeat(np.arange(4), 2)
    for sign in (1, -1):
        found = stats.correlation(x, 3 * sign * x + 2, doc)
        assert found.method == "wilson_document" and found.value == pytest.approx(sign)
        assert sorted([abs(found.low), abs(found.high)]) == pytest.approx([0.5101, 1], abs=1e-4)
        assert found.low <= found.value <= found.high
    many = np.tile([0.0, 1], 400)
    assert stats.correlation(many, many, np.repeat(np.arange(400), 2)).low == pytest.approx(400 / 403.8415, abs=1e-5)


def test_errors_in_one_document_leave_limits_on_both_sides():
    x = np.tile([0.0, 0, 0, 1], 10)
    y = x.copy()
    y[:4] = [1, 0, 0, 0]
    doc = np.repeat(np.arange(10), 4)
    found = stats.correlation(x, y, doc)
    right = stats.wilson(found.value * 10, 10)
    assert found.method == "wilson_document"
    assert (found.low, found.high) == pytest.approx((right.low, right.high), abs=1e-9)
    assert found.low < 0.7 < found.value < found.high < 1
    # One document against all others: nothing can be said.
    x[0], y[0] = 9, -9
    found = stats.correlation(x, y, doc)
    assert found.value < 0 and math.isnan(found.low)


def test_sides_that_never_meet_may_yet_be_uncorrelated():
    """Rare events that are independent mostly miss each other: a little below 0, and 0 must stay possible."""
    rng = np.random.default_rng(5)
    held, num_missed = [], 0
    for _ in range(200):
        x, y = ((rng.random(1600) < share) * rng.uniform(1, 10, 1600) for share in (0.005, 0.02))
        found = stats.correlation(x, y, np.arange(1600) // 32)
        if found is None:
            continue
        num_missed += not (x * y).any()
        held.append(found.low <= 0 <= found.high)
    assert num_missed > 120 and np.mean(held) > 0.93


def test_what_was_not_seen_to_meet_is_what_so_many_meetings_would_add():
    x, y = np.zeros(1000), np.zeros(1000)
    x[:10], y[500:520] = 2, 5
    documents = np.arange(1000) % 100
    found, low = (stats.correlation(x, y, documents, level=level) for level in (0.95, 0.5))
    # Moving events of x to where y has some: the correlation is linear in how many meet.
    met = x.copy()
    met[:4], met[500:504] = 0, 2
    slope = (np.corrcoef(met, y)[0, 1] - np.corrcoef(x, y)[0, 1]) / 4
    assert found.high == pytest.approx(found.value - math.log(0.025) * slope)
    assert low.high == pytest.approx(found.value - math.log(0.25) * slope)
    x[2:] = 0  # no more can meet than there are
    all_met = np.zeros(1000)
    all_met[500:502] = 1
    assert stats.correlation(x, y, documents).high == pytest.approx(np.corrcoef(all_met, y)[0, 1])


def test_correlation_is_resampled_by_document_and_never_by_token():
    """Copies of every token in its own document say nothing new: the interval must not shrink."""
    rng = np.random.default_rng(5)
    x, y, doc = rng.normal(size=80), rng.normal(size=80), np.repeat(np.arange(8), 10)
    y = x + y
    once = stats.correlation(x, y, doc)
    copied = stats.correlation(np.tile(x, 9), np.tile(y, 9), np.tile(doc, 9))
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high))
    by_token = stats.correlation(np.tile(x, 9), np.tile(y, 9), np.arange(720))
    assert by_token.high - by_token.low < 0.7 * (once.high - once.low)
    one = stats.correlation(x, y, np.zeros(80))
    assert math.isnan(one.low) and one.value == pytest.approx(once.value)


def slow_cross_fitted(x, y, clusters):
    missed = base = 0.0
    for one in set(clusters):
        inside = np.array([c == one for c in clusters])
        slope, intercept = np.polyfit(x[~inside], y[~inside], 1)
        if slope < 0:
            slope, intercept = 0.0, y[~inside].mean()
        missed += np.square(y[inside] - intercept - slope * x[inside]).sum()
        base += np.square(y[inside] - y[~inside].mean()).sum()
    return 1 - missed / base


@pytest.mark.parametrize("slope", [2.0, 0.05, -2.0])
def test_calibrated_r2_equals_a_fit_for_each_cluster_without_it(slope):
    random = np.random.default_rng(5)
    x = random.normal(100, 3, 40)
    y = 7 + slope * x + random.normal(0, 4, 40)
    clusters = (np.arange(40) // 5).tolist()
    found = stats.cross_fitted_r2(x, y, clusters)
    assert found == pytest.approx(slow_cross_fitted(x, y, clusters))
    # Who predicts the opposite has what who predicts nothing has.
    assert (found == pytest.approx(0.0, abs=1e-9)) if slope < 0 else (found < np.corrcoef(x, y)[0, 1] ** 2)


def test_calibrated_r2_of_what_cannot_be_fitted():
    y = np.array([0.0, 0, 1, 0])
    assert stats.cross_fitted_r2(np.full(4, 3.0), y, [0, 0, 1, 1]) == pytest.approx(0.0)
    assert stats.cross_fitted_r2(y, y, [1, 1, 1, 1]) is None
    assert stats.cross_fitted_r2(y, np.ones(4), [0, 0, 1, 1]) is None
    assert stats.cross_fitted_r2([], [], []) is None


def slow_average_precision(positives, negatives):
    total, last = 0.0, 0.0
    for level in sorted({*positives, *negatives}, reverse=True):
        hits, alarms = sum(p >= level for p in positives), sum(n >= level for n in negatives)
        total += (hits / len(positives) - last) * hits / (hits + alarms)
        last = hits / len(positives)
    return total


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.lists(st.integers(0, 4), max_size=12))
@settings(max_examples=100, deadline=None)
def test_average_precision_equals_its_definition(positives, negatives):
    assert stats.average_precision(positives, negatives) == pytest.approx(slow_average_precision(positives, negatives))


def test_average_precision_by_hand():
    # Ranked + - + +: (1 + 2/3 + 3/4) / 3.
    assert stats.average_precision([4, 2, 1], [3]) == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    with pytest.raises(ValueError, match="at least one positive"):
        stats.average_precision([], [1.0])


@pytest.mark.parametrize("shift", [0.3, 1.2, 2.5])
def test_average_precision_interval_covers(shift):
    random = np.random.default_rng(0)
    truth = stats.average_precision(random.normal(shift, 1, 200_000), random.normal(0, 1, 200_000))
    held = 0
    for _ in range(400):
        found = stats.average_precision(random.normal(shift, 1, 50), random.normal(0, 1, 50))
        interval = stats.average_precision_wilson(found, 50)
        held += interval.low <= truth <= interval.high
    assert held / 400 >= 0.90


def test_average_precision_interval_at_and_near_one():
    perfect, nearly = (stats.average_precision_wilson(value, 50) for value in (1.0, 1 - 1e-12))
    assert (perfect.high, perfect.low) == (1.0, stats.wilson(50, 50).low)
    assert nearly.low == pytest.approx(perfect.low, abs=0.05) and nearly.high == pytest.approx(1)
    wide, narrow = stats.average_precision_wilson(0.8, 50, deff=4), stats.average_precision_wilson(0.8, 50)
    assert wide.low < narrow.low < 0.8 < narrow.high < wide.high


def test_weighted_rate_is_a_rate_where_weights_are_equal():
    found, expected = stats.weighted_rate([1, 1, 0, 1], [2, 2, 2, 2]), stats.wilson(3, 4)
    assert (found.value, found.low, found.high) == pytest.approx((expected.value, expected.low, expected.high))
    assert stats.weighted_rate([1, 0], [3, 1]).value == 0.75
    one = stats.weighted_rate([1, 0, 0], [1e9, 1e-9, 1e-9])
    assert one.high - one.low > 0.7, "a single window carries it all"
    with pytest.raises(ValueError, match="one is positive"):
        stats.weighted_rate([1, 0], [0, 0])


def test_coverage_of_correlations_spot_check():
    """Sparse, skewed activations by document, predicted well in most: the truth is inside about as often as it should be."""
    rng = np.random.default_rng(7)

    def draw(num):
        y = np.zeros((num, 32))
        fires = rng.random(num) < 0.5
        y[np.flatnonzero(fires), rng.integers(0, 32, fires.sum())] = rng.gamma(2, 1, fires.sum())
        x = np.minimum(y, 4) * (rng.random(num) < 0.8)[:, None] + 0.5 * rng.gamma(0.5, 1, (num, 32))
        return x.ravel(), y.ravel(), np.repeat(np.arange(num), 32)

    truth = np.corrcoef(*draw(40_000)[:2])[0, 1]
    found = [stats.correlation(*draw(60)) for _ in range(200)]
    assert np.mean([i.low <= truth <= i.high for i in found]) >= 0.87
