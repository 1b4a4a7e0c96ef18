"""Intervals and summaries of scores; every formula names its paper.

Owns numbers only: what a score is computed over is decided by the scorers. Missing values (None, NaN) are counted, never
averaged.

- Rates: Wilson (1927), with the correction of Brown, Cai and DasGupta (2001, section 4.1.1) for one to three events, without
  which coverage falls to 0.84 just below a rate of 1.
- Balanced accuracy: MOVER (Newcombe 1998, method 10; Zou and Donner 2008): distances to the limits of two independent rates,
  squared and added.
- AUROC: Newcombe (2006, part 2), method 5: the score equation with a symmetrised Hanley-McNeil variance. Defined at 1.0.
- Examples that share a prompt or a document: the effective number of examples is n / design effect (Kish 1965). The effect is
  the variance of sums of influences by cluster over that of independent examples (Obuchowski 1997 for the AUROC); for two ways
  of clustering that cross, the sum of both less that of their intersections (Cameron, Gelbach and Miller 2011). Never below
  that of either way, nor below 1, nor above the size of the clusters.
- Correlation: Pearson's, never calibrated, so that its sign is the data's. Interval by the delete-one jackknife over clusters
  (documents) on Fisher's z scale (Efron and Tibshirani 1993, chapter 11): tokens of one text are not independent, so none is
  ever left out alone. A few documents carry the variance of sparse data, so the t quantile has the degrees of freedom of a
  variance of such kurtosis (Satterthwaite 1946). In simulation, 20 to 100 documents, it covered 0.92 to 0.96, percentiles of a
  bootstrap over documents 0.87 to 0.94. Where nothing is wrong, or all that is lies in one document, the others correlate by
  exactly 1 and the jackknife has no spread to go by: |r| is then a rate of right documents, by Wilson's interval, of Kish's
  effective number of them with their shares of the variance as weights. Where two sparse sides never meet, no cluster shows how
  often they might, and the upper limit allows for what zero events leave open (Poisson, 3.7 at 95%).
- Calibrated R^2: a least-squares line from predictions to the truth, fitted for each cluster to the other clusters and never
  turned around; no interval.
- Average precision: the step sum of precision over recall (Zhu 2004), ties counted as one step; the binomial interval of Boyd,
  Eng and Page (2013, section 3.1) with the number of positives, by Wilson's score equation, which also holds near 1.
- Rates of weighted examples: Wilson's interval with Kish's effective number, (sum of weights)^2 / sum of squared weights.
- Across latents: t interval of the mean, order statistics of the median (Conover 1999, section 3.2), and a weighted mean with
  the linearised variance of a ratio (Cochran 1977, section 6.5); all over one value per latent.
- Two methods: t interval of the paired differences, or Welch (1947) for different latents; p values of several comparisons are
  adjusted by Holm (1979).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import bdtr, gammaincinv, ndtri, stdtr, stdtrit

LEVEL = 0.95
"""Nominal coverage of every interval."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value with its confidence limits; limits are NaN where the data gives none."""

    value: float
    low: float
    high: float
    method: str

    @staticmethod
    def point(value: float) -> Interval:
        """Return a value of which nothing is known but itself."""
        return Interval(value=value, low=math.nan, high=math.nan, method="none")


def design_effect(
    influence: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable] | np.ndarray,
    crossed: Sequence[Hashable] | np.ndarray | None = None,
) -> float:
    """Return by how much clustering inflates the variance of a statistic; at least 1.

    `influence`: how much each example moves the statistic, up to a constant: of a rate, its values. `crossed`: a second way in
    which the same examples come in clusters. The estimate of both together is not taken for less than that of either. It is 1
    where nothing differs, and where all clusters are single or there is but one.
    """
    x = np.asarray(influence, np.float64)
    n = len(x)
    codes = [np.unique(np.asarray(way), return_inverse=True)[1] for way in (clusters, crossed) if way is not None]
    ways = [code for code in codes if n and 0 < code.max() < n - 1]
    if not ways or _is_constant(x):
        return 1.0
    x = x - x.mean()
    found = [_inflation(x, way) for way in ways]
    least = min(degrees for _, _, degrees in found)
    if len(ways) == 2:
        both, _, _ = _inflation(x, ways[0] * n + ways[1])
        found.append((found[0][0] + found[1][0] - both, 1.0, least))
    # No more than if all examples of a cluster were alike.
    most = max(size for _, size, _ in found)
    # An effect rests on few clusters. Its excess over 1 is widened by their t quantile over the normal one, to the fourth: by
    # simulation that covers shared errors as the square of it on the whole effect does, and leaves independent ones alone.
    z = float(ndtri(0.5 + LEVEL / 2))
    effects = [1 + (effect - 1) * (float(stdtrit(degrees, 0.5 + LEVEL / 2)) / z) ** 4 for effect, _, degrees in found]
    return min(max(1.0, *effects), most)


def _inflation(x: np.ndarray, clusters: np.ndarray) -> tuple[float, float, float]:
    """Return the variance of the sum of `x` (of mean 0) by clusters over that without, their size and degrees of freedom.

    Clusters of different size count as fewer: as n / m for n examples, with m the size of the mean example's cluster.
    """
    n = len(x)
    _, index, sizes = np.unique(clusters, return_inverse=True, return_counts=True)
    size = float(np.square(sizes).sum()) / n
    by_cluster = float(np.square(np.bincount(index, weights=x)).sum()) / (n - size)
    return by_cluster / (float(np.square(x).sum()) / (n - 1)), size, max(1.0, n / size - 1)


def wilson(successes: float, n: float, *, deff: float = 1.0, level: float = LEVEL) -> Interval:
    """Return the interval of a rate of `successes` out of `n`; `deff` shrinks both.

    Raises: ValueError when `n` is not positive.
    """
    if n <= 0:
        raise ValueError(f"a rate needs at least one example, {n} given")
    rate = successes / n
    n, successes = n / deff, successes / deff
    z = float(ndtri(0.5 + level / 2))
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    low = min(low, _rare_limit(successes, n, level)) if rate > 0 else 0.0
    high = max(high, 1.0 - _rare_limit(n - successes, n, level)) if rate < 1 else 1.0
    return Interval(value=rate, low=low, high=high, method="wilson")


def _rare_limit(events: float, n: float, level: float) -> float:
    """Return the lower limit of a rate of up to three events, by the Poisson distribution; 1 for more events."""
    return float(gammaincinv(events, 1 - level)) / n if 0 < events <= 3 else 1.0


def balanced_accuracy(positives: Interval, negatives: Interval) -> Interval:
    """Return the interval of the mean of two independent rates, by MOVER from their own intervals."""
    value = (positives.value + negatives.value) / 2
    down = math.hypot(positives.value - positives.low, negatives.value - negatives.low) / 2
    up = math.hypot(positives.high - positives.value, negatives.high - negatives.value) / 2
    return Interval(value=value, low=max(0.0, value - down), high=min(1.0, value + up), method="mover_wilson")


def clustered_accuracy(
    positives: Sequence[float] | np.ndarray,
    negatives: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable] | np.ndarray,
    crossed: Sequence[Hashable] | np.ndarray | None = None,
) -> Interval:
    """Return the interval of balanced accuracy of answers (1 right, 0 wrong) that come in clusters.

    The clusters are those of every positive and then of every negative, as :func:`design_effect` takes them; one may hold
    examples of both classes. The design effect is that of the mean of both rates.
    """
    classes = [np.asarray(right, np.float64) for right in (positives, negatives)]
    deff = design_effect(np.concatenate([(right - right.mean()) / len(right) for right in classes]), clusters, crossed)
    return balanced_accuracy(*(wilson(float(right.sum()), len(right), deff=deff) for right in classes))


def auroc(positives: Sequence[float] | np.ndarray, negatives: Sequence[float] | np.ndarray) -> float:
    """Return Pr(positive > negative) + Pr(equal) / 2.

    Raises: ValueError when a class is empty.
    """
    p, n = np.asarray(positives, np.float64), np.sort(np.asarray(negatives, np.float64))
    if len(p) == 0 or len(n) == 0:
        raise ValueError(f"AUROC needs both classes, {len(p)} positives and {len(n)} negatives given")
    below = np.searchsorted(n, p, side="left") + np.searchsorted(n, p, side="right")
    return float(below.sum()) / (2 * len(p) * len(n))


def auroc_influence(positives: Sequence[float] | np.ndarray, negatives: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return how much each example moves the AUROC, positives first, with sum 0 in each class: for its design effect.

    The structural components of DeLong, DeLong and Clarke-Pearson (1988), which Obuchowski (1997) sums by cluster.
    """
    p, n = np.asarray(positives, np.float64), np.asarray(negatives, np.float64)
    components = []
    for own, others, sign in ((p, np.sort(n), 1.0), (n, np.sort(p), -1.0)):
        below = np.searchsorted(others, own, side="left") + np.searchsorted(others, own, side="right")
        components.append(sign * (below - below.mean()) / (2 * len(own) * len(others)))
    return np.concatenate(components)


def auroc_design_effect(
    positives: Sequence[float] | np.ndarray,
    negatives: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable] | np.ndarray,
    crossed: Sequence[Hashable] | np.ndarray | None = None,
) -> float:
    """Return the design effect of an AUROC; clusters are those of every positive and then of every negative.

    It is not taken for less than that of either class alone: of a class from few documents the sum of both shows too little.
    """
    influence, num = auroc_influence(positives, negatives), len(positives)
    ways = [np.asarray(way) for way in (clusters, crossed) if way is not None]
    return max(
        design_effect(influence[part], *(way[part] for way in ways)) for part in (slice(None), slice(num), slice(num, None))
    )


def auroc_newcombe(
    value: float, num_positives: float, num_negatives: float, *, deff: float = 1.0, level: float = LEVEL
) -> Interval:
    """Return the interval of an AUROC of so many positives and negatives; `deff` shrinks both numbers."""
    m, n = num_positives / deff, num_negatives / deff
    z2 = float(ndtri(0.5 + level / 2)) ** 2
    extra = max((m + n) / 2 - 1, 0.0)

    def excess(theta: float) -> float:
        variance = theta * (1 - theta) * (1 + extra * ((1 - theta) / (2 - theta) + theta / (1 + theta))) / (m * n)
        return (value - theta) ** 2 - z2 * variance

    low = _root(excess, 0.0, value) if value > 0 else 0.0
    high = _root(excess, 1.0, value) if value < 1 else 1.0
    return Interval(value=value, low=low, high=high, method="newcombe_auroc")


def correlation(
    x: Sequence[float] | np.ndarray,
    y: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable] | np.ndarray,
    *,
    level: float = LEVEL,
) -> Interval | None:
    """Return Pearson's correlation with a jackknife interval over `clusters`; None when a side is constant or empty.

    Limits are NaN where they are undefined: with a single cluster, with all the variation of a side in one cluster, or where
    one cluster decides between a correlation of exactly 1 and a negative one. Where two sides that mostly lie at their least
    value never leave it together, no cluster tells how often they might: the upper limit is then not below the correlation of
    as many meetings as seeing none leaves open.
    """
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if not len(a) == len(b) == len(clusters):
        raise ValueError(f"{len(a)} and {len(b)} values in {len(clusters)} clusters were given; expected equally many")
    if len(a) == 0 or _is_constant(a) or _is_constant(b):
        return None
    # Centred and scaled first, so that sums of squares lose no digits.
    a, b = (a - a.mean()) / a.std(), (b - b.mean()) / b.std()
    unseen = _unseen_meetings(a, b, level)
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    parts = np.stack([np.bincount(index, weights=w) for w in (np.ones_like(a), a, b, a * a, b * b, a * b)])
    total = parts.sum(axis=1)
    value = float(_pearson(total[:, None])[0])
    k = parts.shape[1]
    left_out = _pearson(total[:, None] - parts) if k > 1 else np.array([math.nan])
    if not np.isfinite(left_out).all():
        return Interval(value=value, low=math.nan, high=math.nan, method="jackknife_document")
    extreme = float(left_out[np.abs(left_out).argmax()])
    if abs(extreme) >= 1 - 1e-12:
        if extreme * value <= 0:
            return Interval(value=value, low=math.nan, high=math.nan, method="jackknife_document")
        # Both sides have mean 0 and variance 1 here, so that these sums of squares are shares of the variance.
        share = parts[3] + parts[4]
        effective = float(share.sum()) ** 2 / float(np.square(share).sum())
        right = wilson(abs(value) * effective, effective, level=level)
        low, high = (right.low, right.high) if value > 0 else (-right.high, -right.low)
        return Interval(value=value, low=low, high=high, method="wilson_document")
    z = np.arctanh(left_out)
    squares = np.square(z - z.mean())
    error = math.sqrt((k - 1) / k * float(squares.sum()))
    half = float(stdtrit(_degrees(squares), 0.5 + level / 2)) * error
    low, high = math.tanh(math.atanh(value) - half), math.tanh(math.atanh(value) + half)
    return Interval(value=value, low=low, high=max(high, min(1.0, value + unseen)), method="jackknife_document")


def _unseen_meetings(a: np.ndarray, b: np.ndarray, level: float) -> float:
    """Return what a correlation may lack for the meetings that did not happen to be seen; 0 unless two sparse sides never meet.

    `a` and `b` have mean 0 and variance 1. Zero events allow for -log((1 - level) / 2) of them (Poisson).
    """
    active, truly = a > a.min(), b > b.min()
    if (active & truly).any() or active.mean() > 0.5 or truly.mean() > 0.5:
        return 0.0
    gain = float((a[active].mean() - a.min()) * (b[truly].mean() - b.min())) / len(a)
    return gain * min(-math.log((1 - level) / 2), float(active.sum()), float(truly.sum()))


def _degrees(squares: np.ndarray) -> float:
    """Return the degrees of freedom of a sum of squared deviations: k - 1 at most, fewer the more a few of them carry."""
    k, total = len(squares), float(squares.sum())
    kurtosis = k * float(np.square(squares).sum()) / total**2 if total > 0 else 1.0
    return min(k - 1.0, max(1.0, 2 * k / (kurtosis - 1))) if kurtosis > 1 else k - 1.0


def _is_constant(values: np.ndarray) -> bool:
    return float(np.ptp(values)) <= 1e-9 * max(1e-30, float(np.abs(values).max()))


def _pearson(sums: np.ndarray) -> np.ndarray:
    """Return the correlations of columns of (n, sum x, sum y, sum xx, sum yy, sum xy); NaN where a side is constant."""
    n, x, y, xx, yy, xy = sums
    with np.errstate(invalid="ignore", divide="ignore"):
        vx, vy = xx - x * x / n, yy - y * y / n
        found = (xy - x * y / n) / np.sqrt(vx * vy)
    return np.where((vx > 1e-9) & (vy > 1e-9), np.clip(found, -1, 1), math.nan)


def average_precision(positives: Sequence[float] | np.ndarray, negatives: Sequence[float] | np.ndarray) -> float:
    """Return the sum over thresholds of (gain in recall) * precision; equal scores are one threshold.

    By chance it is the share of positives. Raises: ValueError when there are no positives.
    """
    p, n = np.sort(np.asarray(positives, np.float64)), np.sort(np.asarray(negatives, np.float64))
    if len(p) == 0:
        raise ValueError("average precision needs at least one positive")
    levels, counts = np.unique(p, return_counts=True)
    above = len(p) - np.searchsorted(p, levels, side="left")
    false = len(n) - np.searchsorted(n, levels, side="left")
    return float(np.sum(counts / len(p) * above / (above + false)))


def average_precision_wilson(value: float, num_positives: float, *, deff: float = 1.0, level: float = LEVEL) -> Interval:
    """Return the interval of an average precision over so many positives; `deff` shrinks their number."""
    rate = wilson(value * num_positives, num_positives, deff=deff, level=level)
    return Interval(value=value, low=min(rate.low, value), high=max(rate.high, value), method="wilson_average_precision")


def weighted_rate(
    right: Sequence[float] | np.ndarray, weights: Sequence[float] | np.ndarray, *, deff: float = 1.0, level: float = LEVEL
) -> Interval:
    """Return the interval of the share of weight on right answers (1 right, 0 wrong); `deff` is for clustering alone.

    Raises: ValueError when no weight is positive.
    """
    x, w = np.asarray(right, np.float64), np.asarray(weights, np.float64)
    if not (w >= 0).all() or not w.sum() > 0:
        raise ValueError("a weighted rate needs weights of which none is negative and one is positive")
    value = float((w * x).sum() / w.sum())
    n = float(w.sum()) ** 2 / float(np.square(w).sum())
    interval = wilson(value * n, n, deff=deff, level=level)
    return Interval(value=value, low=interval.low, high=interval.high, method="wilson_weighted")


def cross_fitted_r2(
    x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray, clusters: Sequence[Hashable] | np.ndarray
) -> float | None:
    """Return 1 - SSE / SST of predicting `y` by a line in `x` that was fitted, for each cluster, to the other clusters.

    SST is of predicting the others' mean, so that an `x` that knows nothing has 0 or a little less. The slope is never below 0:
    a line that turns predictions around would reward whoever predicts the opposite. None with a single cluster or constant `y`.
    """
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    if len(a) == 0 or index.max() == 0 or _is_constant(b):
        return None
    # Centred first, so that sums of squares lose no digits.
    a, b = a - a.mean(), b - b.mean()
    parts = np.stack([np.bincount(index, weights=w) for w in (np.ones_like(a), a, b, a * a, a * b)])
    n, sum_a, sum_b, sum_aa, sum_ab = parts.sum(axis=1)[:, None] - parts
    spread = sum_aa - sum_a**2 / n
    # Predictions that are all but constant in the others name no line.
    is_known = spread > 1e-9 * max(float(np.square(a).sum()), 1e-30)
    slope = np.where(is_known, (sum_ab - sum_a * sum_b / n) / np.where(is_known, spread, 1.0), 0.0).clip(min=0.0)
    unfitted = b - (sum_b / n)[index]
    missed = unfitted - slope[index] * (a - (sum_a / n)[index])
    return 1 - float(np.square(missed).sum() / np.square(unfitted).sum())


def _root(excess: Callable[[float], float], outside: float, inside: float) -> float:
    """Bisect between a point at which `excess` is positive and one at which it is not."""
    for _ in range(60):
        middle = (outside + inside) / 2
        if excess(middle) > 0:
            outside = middle
        else:
            inside = middle
    return inside


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One metric over many latents."""

    num_latents: int
    """Latents with a value."""
    num_missing: int
    """Latents with none."""
    mean: Interval | None
    median: Interval | None
    weighted_mean: Interval | None
    """Weighted by what `weights` said, such as firing rates; None without weights."""


def summarise(
    values: Iterable[float | None],
    *,
    latents: Iterable[Hashable] | None = None,
    weights: Iterable[float] | None = None,
    level: float = LEVEL,
) -> Summary:
    """Return mean and median over latents, with intervals for a sample of latents from many.

    Several rows of one latent (`latents` names them) count as one value, their mean. A latent none of whose rows has a value
    is missing. `weights` has one number per row; a latent's weight is its rows' mean.
    """
    x = np.array([np.nan if value is None else value for value in values], np.float64)
    names = list(range(len(x))) if latents is None else list(latents)
    w = np.ones(len(x)) if weights is None else np.fromiter(weights, np.float64)
    if not len(x) == len(names) == len(w):
        raise ValueError(f"{len(x)} values, {len(names)} latents and {len(w)} weights were given; expected equally many")
    where: dict[Hashable, int] = {}
    index = np.array([where.setdefault(name, len(where)) for name in names], np.int64)
    known = np.isfinite(x)
    count = np.bincount(index[known], minlength=len(where))
    has = count > 0
    collapsed = np.bincount(index[known], weights=x[known], minlength=len(where))[has] / count[has]
    weight = np.bincount(index[known], weights=w[known], minlength=len(where))[has] / count[has]
    return Summary(
        num_latents=int(has.sum()),
        num_missing=int((~has).sum()),
        mean=mean_t(collapsed, level=level) if len(collapsed) else None,
        median=median_order(collapsed, level=level) if len(collapsed) else None,
        weighted_mean=mean_t(collapsed, weights=weight, level=level) if weights is not None and weight.sum() > 0 else None,
    )


def mean_t(values: Sequence[float] | np.ndarray, *, weights: np.ndarray | None = None, level: float = LEVEL) -> Interval:
    """Return the (weighted) mean of independent values with its t interval; limits are NaN for a single value."""
    x = np.asarray(values, np.float64)
    w = np.ones(len(x)) if weights is None else np.asarray(weights, np.float64)
    n = int(np.count_nonzero(w))
    mean = float((w * x).sum() / w.sum())
    method = "t" if weights is None else "t_weighted"
    if n < 2:
        return Interval(value=mean, low=math.nan, high=math.nan, method=method)
    error = math.sqrt(n / (n - 1) * float(np.square(w * (x - mean)).sum())) / float(w.sum())
    # A few heavy latents carry a weighted mean, so the degrees of freedom are theirs.
    effective = float(w.sum()) ** 2 / float(np.square(w).sum())
    half = float(stdtrit(max(effective - 1, 1.0), 0.5 + level / 2)) * error
    return Interval(value=mean, low=mean - half, high=mean + half, method=method)


def median_order(values: Sequence[float] | np.ndarray, *, level: float = LEVEL) -> Interval:
    """Return the median with the narrowest symmetric order-statistic interval of at least `level`.

    Limits are NaN when there are too few values (fewer than 6 at 0.95).
    """
    x = np.sort(np.asarray(values, np.float64))
    n, value = len(x), float(np.median(values))
    # The interval from the (k+1)-th smallest to the (k+1)-th largest misses with probability 2 Pr(Binomial(n, 1/2) <= k).
    k = -1
    while 2 * float(bdtr(k + 1, n, 0.5)) <= 1 - level:
        k += 1
    if k < 0:
        return Interval(value=value, low=math.nan, high=math.nan, method="order_statistic")
    return Interval(value=value, low=float(x[k]), high=float(x[n - 1 - k]), method="order_statistic")


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How two methods differ."""

    interval: Interval
    """Of mean(first) - mean(second); limits are NaN for fewer than two latents."""
    p: float
    """Two-sided, of no difference; NaN for fewer than two latents."""


def paired_difference(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> Difference:
    """Return the mean difference of two values per latent, with its t interval.

    Raises: ValueError when the lengths differ or are 0.
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if len(a) != len(b) or not len(a):
        raise ValueError(f"{len(a)} and {len(b)} values were given; expected a pair for each latent, and at least one")
    interval = mean_t(a - b)
    return Difference(
        interval=Interval(value=interval.value, low=interval.low, high=interval.high, method="t_paired"),
        p=_p_value(interval.value, (a - b).std(ddof=1) / math.sqrt(len(a)), len(a) - 1) if len(a) > 1 else math.nan,
    )


def welch_difference(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> Difference:
    """Return the difference of the means of values of different latents, with Welch's interval."""
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if not len(a) or not len(b):
        raise ValueError(f"{len(a)} and {len(b)} values were given; expected at least one of each")
    value = float(a.mean() - b.mean())
    if len(a) < 2 or len(b) < 2:
        return Difference(interval=Interval(value=value, low=math.nan, high=math.nan, method="welch"), p=math.nan)
    u, v = float(a.var(ddof=1)) / len(a), float(b.var(ddof=1)) / len(b)
    error = math.sqrt(u + v)
    df = (u + v) ** 2 / (u * u / (len(a) - 1) + v * v / (len(b) - 1)) if error > 0 else float(len(a) + len(b) - 2)
    half = float(stdtrit(df, 0.5 + LEVEL / 2)) * error
    return Difference(
        interval=Interval(value=value, low=value - half, high=value + half, method="welch"), p=_p_value(value, error, df)
    )


def _p_value(value: float, error: float, df: float) -> float:
    if error == 0:
        return 1.0 if value == 0 else 0.0
    return float(2 * stdtr(df, -abs(value) / error))


def holm(p: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return the p values of several comparisons adjusted for their number; NaN stays and does not count."""
    values = np.asarray(p, np.float64)
    known = np.flatnonzero(np.isfinite(values))
    order = known[np.argsort(values[known], kind="stable")]
    adjusted = np.full(len(values), np.nan)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(values[order] * np.arange(len(order), 0, -1)))
    return adjusted
