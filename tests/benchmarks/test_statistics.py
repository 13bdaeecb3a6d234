"""Intervals of medians: the exact ones against tables, the bootstrap's by its coverage, and what must not matter."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from solostep.benchmarks import statistics
from solostep.benchmarks.statistics import Interval, fewest, median_interval, overlaps, sign_test, spread
from solostep.engine.errors import UsageError


def drawn(prompts: int, seeds: int, generator: np.random.Generator) -> tuple[list[float], list[str]]:
    """Values whose median is 1 and that are skewed and alike within a prompt (correlation of their logarithms 0.64)."""
    x = 0.8 * generator.normal(size=(prompts, 1)) + 0.6 * generator.normal(size=(prompts, seeds))
    return np.exp(x).ravel().tolist(), [f"prompt {i}" for i in range(prompts) for _ in range(seeds)]


# --- exact --------------------------------------------------------------------------------------------------------


# Ranks of the 95 % interval of a median, as printed in tables of the sign test (Conover, Practical Nonparametric
# Statistics, quantiles of the binomial distribution with p = 1/2).
@pytest.mark.parametrize(
    ("n", "low", "high"), [(6, 1, 6), (8, 1, 8), (9, 2, 8), (10, 2, 9), (20, 6, 15), (100, 40, 61)]
)
def test_the_ranks_are_those_of_the_tables(n: int, low: int, high: int) -> None:
    assert median_interval(range(1, n + 1)) == Interval((n + 1) / 2, low, high, n)


def test_coverage_is_what_the_binomial_says() -> None:
    g, runs = np.random.default_rng(5), 3000
    for n in (6, 11, 30):
        ordered = np.sort(np.exp(g.normal(size=(runs, n))), axis=1)
        rank = int(median_interval(range(1, n + 1)).low or 0)
        promised = 1 - 2 * sum(math.comb(n, i) for i in range(rank)) / 2**n
        assert 0.95 <= promised < 1
        inside = (ordered[:, rank - 1] <= 1) & (ordered[:, n - rank] >= 1)
        assert inside.mean() == pytest.approx(promised, abs=3 * math.sqrt(promised * (1 - promised) / runs))
        some = [median_interval(row) for row in ordered[:20].tolist()]
        assert [(i.low, i.high) for i in some] == [(row[rank - 1], row[n - rank]) for row in ordered[:20]]


def test_thousands_of_values() -> None:
    found = median_interval(range(5000))
    half = 1.96 * math.sqrt(5000) / 2  # the normal approximation, in ranks
    assert found.low == pytest.approx(2499.5 - half, abs=2) and found.high == pytest.approx(2499.5 + half, abs=2)


def test_too_few_values_have_no_bounds() -> None:
    assert [fewest(c) for c in (0.5, 0.75, 0.9, 0.9375, 0.95, 0.99)] == [2, 3, 5, 5, 6, 8]
    assert median_interval([3.0]) == Interval(3.0, None, None, 1)
    assert median_interval([3.0, 1.0, 4.0, 1.0, 5.0]) == Interval(3.0, None, None, 5)
    assert median_interval([3.0, 1.0, 4.0, 1.0, 5.0], confidence=0.9) == Interval(3.0, 1.0, 5.0, 5)
    # Twenty videos of five prompts are five.
    assert median_interval(range(20), clusters=[i % 5 for i in range(20)]) == Interval(9.5, None, None, 5)


def test_infinite_values() -> None:
    assert median_interval([math.inf] * 7) == Interval(math.inf, math.inf, math.inf, 7)
    assert median_interval([30.0, 31.0, 32.0, 33.0, 34.0, math.inf]) == Interval(32.5, 30.0, math.inf, 6)
    values = [30.0] * 8 + [math.inf] * 8
    found = median_interval(values, clusters=[i // 2 for i in range(16)])
    assert found == Interval(math.inf, 30.0, math.inf, 8)


# --- the bootstrap ------------------------------------------------------------------------------------------------


def test_coverage_with_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 400)
    g, runs = np.random.default_rng(2), 300
    for prompts, seeds in ((6, 4), (12, 3)):
        inside = alone = 0
        for _ in range(runs):
            values, names = drawn(prompts, seeds, g)
            found, naive = median_interval(values, clusters=names), median_interval(values)
            assert found.low is not None and found.high is not None and naive.low is not None and naive.high is not None
            inside += found.low <= 1 <= found.high
            alone += naive.low <= 1 <= naive.high
        assert 0.94 <= inside / runs <= 0.99
        assert alone / runs < 0.9  # what clusters are for


@pytest.mark.parametrize(("prompts", "alike"), [(6, 0.0), (6, 0.5), (8, 0.0), (12, 0.0)])
def test_coverage_with_few_clusters(prompts: int, alike: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seeds a prompt, and values of a prompt that are little alike: a bootstrap alone holds the median in 87 to
    93 % of runs."""
    monkeypatch.setattr(statistics, "RESAMPLES", 400)
    g, runs, inside = np.random.default_rng(6), 400, 0
    for _ in range(runs):
        own = alike**0.5 * g.standard_normal((prompts, 1)) + (1 - alike) ** 0.5 * g.standard_normal((prompts, 2))
        found = median_interval(own.ravel().tolist(), clusters=np.arange(prompts).repeat(2).tolist())
        assert found.low is not None and found.high is not None
        inside += found.low <= 0 <= found.high
    assert 0.94 <= inside / runs


def test_widening_is_students() -> None:
    for dof, t in ((1, 12.7062), (2, 4.30265), (5, 2.57058), (10, 2.22814), (30, 2.04227)):  # printed tables, 95 %
        assert statistics._student(t, dof) == pytest.approx(0.95, abs=1e-6)
    tails = [statistics._tail(k, 0.95) for k in (6, 10, 100, 10_000)]
    assert tails == sorted(tails) and tails[0] < 0.01 and tails[-1] == pytest.approx(0.025, abs=1e-4)


def test_one_value_per_cluster_is_no_bootstrap() -> None:
    values = np.random.default_rng(0).normal(size=15).tolist()
    assert median_interval(values, clusters=range(15)) == median_interval(values)


def test_the_seed_decides() -> None:
    values, names = drawn(20, 3, np.random.default_rng(4))
    first = median_interval(values, clusters=names)
    assert first == median_interval(values, clusters=names, seed=0)
    others = {median_interval(values, clusters=names, seed=s).low for s in range(1, 9)}
    assert len(others) > 1 and first.low == pytest.approx(np.median(list(others)), rel=0.2)


# --- what must not matter -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("clustered", [False, True])
def test_order_and_names_do_not_matter(clustered: bool) -> None:
    g = np.random.default_rng(1)
    values, names = drawn(9, 3, g)
    before = median_interval(values, clusters=names if clustered else None)
    shuffled = g.permutation(len(values))
    renamed = [hash(names[i]) for i in shuffled]
    assert before == median_interval([values[i] for i in shuffled], clusters=renamed if clustered else None)


@pytest.mark.parametrize("clustered", [False, True])
@pytest.mark.parametrize("change", [lambda x: 4 * x, lambda x: x + 8, lambda x: -x])
def test_intervals_move_with_the_values(clustered: bool, change: Callable[[float], float]) -> None:
    values, names = drawn(9, 3, np.random.default_rng(3))
    clusters = names if clustered else None
    before = median_interval(values, clusters=clusters)
    after = median_interval([change(x) for x in values], clusters=clusters)
    assert before.low is not None and before.high is not None and after.low is not None and after.high is not None
    # The draws of the clusters are others when the order of the values is turned round.
    rel = 0.15 if clustered and change(1) < 0 else 1e-12
    assert [after.median, after.low, after.high] == pytest.approx(
        [change(before.median), *sorted([change(before.low), change(before.high)])], rel=rel
    )


# --- what is refused, and overlaps --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "options", "words"),
    [
        ([], {}, "at least one"),
        ([[1.0, 2.0]], {}, "list of"),
        ([1.0, math.nan], {}, "NaN"),
        ([-math.inf, math.inf], {}, "one sign"),
        ([1.0, 2.0], {"clusters": ["a"]}, "one cluster per value"),
        ([1.0], {"confidence": 1.0}, "between 0 and 1"),
        ([1.0], {"confidence": 0.0}, "between 0 and 1"),
    ],
)
def test_bad_input_is_refused(values: list[float], options: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        median_interval(values, **options)  # type: ignore[arg-type]


def test_overlaps() -> None:
    a = Interval(2.0, 1.0, 3.0, 9)
    assert overlaps(a, a) and overlaps(a, Interval(4.0, 3.0, 5.0, 9)) and overlaps(Interval(2.0, 0.0, 9.0, 9), a)
    assert overlaps(a, Interval(4.0, 3.1, 5.0, 9)) is False and overlaps(Interval(4.0, 3.1, 5.0, 9), a) is False
    assert overlaps(a, Interval(2.0, None, None, 2)) is None and overlaps(Interval(2.0, None, None, 2), a) is None
    assert overlaps(Interval(math.inf, 40.0, math.inf, 9), Interval(math.inf, math.inf, math.inf, 9))


# --- changes ------------------------------------------------------------------------------------------------------


def test_sign_test() -> None:
    """Tables of the binomial with p = 1/2: 5 of 5 are no proof at 5 %, 6 of 6 are, and 8 of 9."""
    found = [sign_test(0, 0), sign_test(5, 0), sign_test(0, 6), sign_test(8, 1), sign_test(7, 2), sign_test(3, 3)]
    assert found == pytest.approx([1, 0.0625, 0.03125, 0.0390625, 0.1796875, 1])


def test_spread_is_that_of_a_normal_and_robust() -> None:
    values = np.random.default_rng(0).normal(5, 0.3, 4001).tolist()
    assert spread(values) == pytest.approx(0.3, rel=0.05)
    assert spread([*values, *[1000.0] * 200]) == pytest.approx(0.3, rel=0.1)
    assert spread([2.0] * 9) == 0
