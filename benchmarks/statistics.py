"""Medians of a benchmark's numbers with the interval they are known to.

Seeds of one prompt are more alike than videos of two prompts, so they must not count as independent: give the prompt of
every value as its cluster. Without clusters the interval is exact and free of assumptions on the distribution, from
order statistics (Thompson 1936; the sign test turned around). With clusters it is a bootstrap over whole clusters,
with percentiles widened for few clusters ("expanded percentile", Hesterberg 2015, section 3.3). Of up to twelve
clusters that is still too narrow (six to eight of two values: 87 to 91 % of such intervals hold the median, where 95 %
should), so there it is at least the exact interval of the clusters' own medians.

For shares (hits of n) there is `solostep.engine.demo.rules.wilson`. Cost: some three milliseconds for the bootstrap of
a hundred values, and ten for the first of so many clusters.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from solostep.engine.errors import UsageError

RESAMPLES = 4000
FEW = 12
"""Clusters, up to which a bootstrap alone is too narrow."""


@dataclass(frozen=True)
class Interval:
    """A median, and the bounds of its confidence interval: both None where `n` is too small for any (`fewest`).

    n counts what is independent: values, or clusters where they were given.
    """

    median: float
    low: float | None
    high: float | None
    n: int


def fewest(confidence: float = 0.95) -> int:
    """The fewest independent values that bound a median: 6 at 95 %.

    All n of them lie on one side of the median with probability 2 / 2**n; beyond the extremes nothing is known, so an
    interval exists only where that is at most 1 - confidence.
    """
    _check_confidence(confidence)
    n = 1
    while _outside(n, confidence) < 2:
        n += 1
    return n


def median_interval(
    values: Sequence[float],
    confidence: float = 0.95,
    clusters: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> Interval:
    """The median of `values` with its confidence interval; the order in which they are given does not matter.

    values: at least one; they may be infinite of one sign, as the PSNR of equal frames is. clusters: one name per value
    (its prompt), or None if all are independent. seed: of the bootstrap, which is drawn only where a cluster has
    several values; with one value each the interval is that without clusters.

    Raises:
        UsageError: no values, NaN, infinities of both signs, another number of clusters, or no confidence in (0, 1).
    """
    _check_confidence(confidence)
    data = np.asarray(list(values), dtype=np.float64)
    if data.ndim != 1 or len(data) == 0:
        raise UsageError("A median needs a list of at least one number.")
    if np.isnan(data).any() or (np.isposinf(data).any() and np.isneginf(data).any()):
        raise UsageError("A median needs numbers that are not NaN, and infinities of one sign only.")
    if clusters is not None and len(clusters) != len(data):
        raise UsageError(f"There are {len(data)} values and {len(clusters)} clusters; give one cluster per value.")
    groups = [[float(value)] for value in data] if clusters is None else _grouped(data, clusters)
    median, n = _middle(np.sort(data)), len(groups)
    if n < fewest(confidence):
        return Interval(median, None, None, n)
    if n == len(data):
        low, high = _exact(np.sort(data), confidence)
    else:
        low, high = _bootstrap(groups, confidence, seed)
        if n <= FEW:
            least, most = _exact(np.sort([_middle(np.array(group)) for group in groups]), confidence)
            low, high = min(low, least), max(high, most)
    return Interval(median, low, high, n)


def overlaps(a: Interval, b: Interval) -> bool | None:
    """Whether two intervals have a point in common; None where one has no bounds, because then nothing can be said."""
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return None
    return a.low <= b.high and b.low <= a.high


def sign_test(up: int, down: int) -> float:
    """How probable it is that so many of up + down pairs, or more, go one way when both are as likely (two-sided)."""
    n = up + down
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(up, down) + 1)) / 2**n)


def spread(values: Sequence[float]) -> float:
    """The standard deviation that a normal of the same median absolute deviation has; some outliers do not move it."""
    middle = median_interval(values).median
    return 1.4826 * median_interval([abs(value - middle) for value in values]).median


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise UsageError(f"The confidence must be between 0 and 1, not {confidence}.")


def _outside(n: int, confidence: float) -> int:
    """(1 - confidence) * 2**n, rounded down; in whole numbers, because 2**n soon is more than a float holds."""
    outside = Fraction(1 - confidence)
    return outside.numerator * 2**n // outside.denominator


def _grouped(data: np.ndarray, clusters: Sequence[Hashable]) -> list[list[float]]:
    """The values of each cluster, sorted; the clusters in an order that is the values' own, for the same draws."""
    groups: dict[Hashable, list[float]] = {}
    for value, cluster in zip(data, clusters, strict=True):
        groups.setdefault(cluster, []).append(float(value))
    return sorted(sorted(group) for group in groups.values())


def _middle(ordered: np.ndarray) -> float:
    low, high = float(ordered[(len(ordered) - 1) // 2]), float(ordered[len(ordered) // 2])
    return low if low == high else low / 2 + high / 2


def _exact(ordered: np.ndarray, confidence: float) -> tuple[float, float]:
    """The innermost pair of order statistics, as far from either end, that covers with at least `confidence`."""
    n, rank = len(ordered), 0
    below = ways = 1  # of the 2**n ways to lie on the sides of the median: at most, and just, `rank` values under it
    while 2 * below <= _outside(n, confidence):
        rank += 1
        ways = ways * (n - rank + 1) // rank
        below += ways
    return float(ordered[rank - 1]), float(ordered[n - rank])


def _bootstrap(groups: list[list[float]], confidence: float, seed: int) -> tuple[float, float]:
    k = len(groups)
    values = np.concatenate(groups)
    order = np.argsort(values, kind="stable")
    ordered, owner = values[order], np.repeat(np.arange(k), [len(group) for group in groups])[order]
    medians = []
    small = k * max(len(group) for group in groups) < 2**15  # sums of two bytes are added three times as fast
    for counts in _resamples(k, max(1, 2_000_000 // len(values)), seed):
        counts = counts.astype(np.int16 if small else np.int64)
        reached = np.cumsum(counts[owner], axis=0, dtype=counts.dtype)
        total = reached[-1].astype(np.int64)
        low = ordered[np.argmax(reached > (total - 1) // 2, axis=0)]
        high = ordered[np.argmax(reached > total // 2, axis=0)]
        medians.append(np.where(low == high, low, low / 2 + high / 2))
    drawn = np.sort(np.concatenate(medians))
    rank = math.floor(_tail(k, confidence) * RESAMPLES)  # no interpolation: it has no meaning next to an infinity
    return float(drawn[rank]), float(drawn[RESAMPLES - 1 - rank])


@functools.lru_cache(maxsize=4)
def _resamples(k: int, chunk: int, seed: int) -> tuple[np.ndarray, ...]:
    """How often each of k clusters is drawn in each resample, ``[k, resamples]``: the same for all measures of a
    table, and drawing takes longer than all the rest."""
    generator, even = np.random.default_rng(seed), np.full(k, 1 / k)
    sizes = [min(chunk, RESAMPLES - start) for start in range(0, RESAMPLES, chunk)]
    return tuple(np.ascontiguousarray(generator.multinomial(k, even, size=size).T) for size in sizes)


@functools.cache
def _tail(k: int, confidence: float) -> float:
    """The share of resamples to leave out at either end: that of a normal beyond sqrt(k / (k - 1)) * t(k - 1).

    A plain percentile interval is too narrow in two ways for k clusters: it takes the spread with k instead of k - 1,
    and the normal's quantile instead of Student's.
    """
    low, high = 0.0, 1e6
    while high - low > 1e-9 * high:  # bisection for t
        t = (low + high) / 2
        low, high = (t, high) if _student(t, k - 1) < confidence else (low, t)
    return math.erfc(math.sqrt(k / (k - 1)) * low / math.sqrt(2)) / 2


def _student(t: float, dof: int) -> float:
    """P(|T| < t) of Student's t (Abramowitz and Stegun 26.7.3 and 26.7.4, for whole degrees of freedom)."""
    theta = math.atan2(t, math.sqrt(dof))
    odd, cosine2 = dof % 2, math.cos(theta) ** 2
    term = math.cos(theta) if odd else 1.0
    total = term if dof > 1 else 0.0
    for i in range(2 + odd, dof - 1, 2):
        term *= cosine2 * (i - 1) / i
        total += term
    inner = math.sin(theta) * total
    return 2 / math.pi * (theta + inner) if odd else inner
