"""The power of the sign test: against scipy's own test, against simulated pairs, and where the saw goes down."""

from math import comb

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from austeer import SelectionError
from austeer.statistics import DetectableRate, critical_count, detectable_rate, pairs_needed, power, smallest_pairs

LEVELS = st.sampled_from([0.5, 0.1, 0.05, 0.01, 1e-3, 2.0**-9, 0.05 / 17280, 2.0**-20, 1e-9])


def passes(most, pairs, level):
    return stats.binomtest(int(most), int(pairs)).pvalue <= level * (1 + 1e-12)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 400), LEVELS)
def test_critical_count_is_the_first_that_scipys_test_rejects(pairs, level):
    count = int(critical_count(pairs, level))
    assert pairs / 2 < count <= pairs + 1
    if count <= pairs:
        assert passes(count, pairs, level)
    assert count - 1 <= pairs / 2 or not passes(count - 1, pairs, level * (1 - 1e-9))


def test_a_level_that_is_met_exactly_passes():
    # Ten pairs with one sign: p is 2 / 1024.
    assert critical_count(10, 2**-9) == 10 and critical_count(10, 2**-9 * 0.999) == 11


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.floats(0, 1), LEVELS)
@example(3, 1.1125369292536007e-308, 0.5)
@example(60, 5e-324, 0.5)
def test_power_is_the_sum_over_all_outcomes(pairs, rate, level):
    # Written out: scipy's pmf overflows at the smallest rates.
    expected = sum(
        comb(pairs, x) * rate**x * (1 - rate) ** (pairs - x)
        for x in range(pairs + 1)
        if max(x, pairs - x) >= critical_count(pairs, level)
    )
    assert power(pairs, rate, level) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.floats(0.53, 1.0), LEVELS.filter(lambda level: level < 0.5), st.sampled_from([0.5, 0.8, 0.95]))
def test_pairs_needed_is_the_end_of_the_saw(rate, level, wanted):
    needed = pairs_needed(rate, level, wanted)
    after = np.arange(needed, 4 * needed + 200)
    assert (power(after, rate, level) >= wanted).all(), "from there on it stays"
    assert needed == 1 or power(needed - 1, rate, level) < wanted, "and one pair fewer is too few"


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 500), LEVELS.filter(lambda level: level < 0.5))
def test_detectable_rate_is_the_least(pairs, level):
    rate = detectable_rate(pairs, level)
    if rate is None:
        assert 2.0 ** (1 - pairs) > level, "not even all of one sign"
        return
    assert power(pairs, rate + 1e-6, level) >= 0.8 - 1e-6
    assert rate <= 0.5 + 1e-6 or power(pairs, rate - 1e-3, level) < 0.8


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 10**6), st.sampled_from([0.5, 0.1, 0.05, 0.01, 0.001]))
def test_smallest_pairs_is_where_one_unanimous_au_passes(size, max_fdr):
    def passes(pairs):
        return min(1.0, 2.0 ** (1 - pairs)) * size <= max_fdr * (1 + 1e-9)

    pairs = smallest_pairs(size, max_fdr)
    assert passes(pairs) and not passes(pairs - 1)


def test_what_so_many_pairs_find():
    found = DetectableRate.of(200, 17280, found=0)
    assert found.level == 0.05 / 17280 and found.pairs == 200
    assert power(200, found.rate + 1e-6, found.level) >= 0.8
    assert list(found.needed) == [0.6, 0.7, 0.8, 0.9]
    assert found.needed[0.7] == pairs_needed(0.7, found.level)
    assert sorted(found.needed.values(), reverse=True) == list(found.needed.values())
    easier = DetectableRate.of(200, 17280, found=1000)
    assert easier.level == 1000 * 0.05 / 17280 and easier.rate < found.rate and easier.needed[0.6] < found.needed[0.6]
    assert DetectableRate.of(10, 17280).rate is None


@pytest.mark.parametrize("arguments", [(0.5, 0.05), (0.3, 0.05), (1.1, 0.05), (float("nan"), 0.05)])
def test_a_rate_that_no_number_of_pairs_finds(arguments):
    with pytest.raises(SelectionError, match=rf"rate: .*{arguments[0]}.*0\.505 to 1"):
        pairs_needed(*arguments)


@pytest.mark.parametrize("level, wanted", [(0, 0.8), (0.9, 0.8), (0.05, 1), (-1, 0.8)])
def test_a_level_and_a_power_that_do_not_fit(level, wanted):
    for call in (lambda: pairs_needed(0.7, level, wanted), lambda: detectable_rate(50, level, wanted)):
        with pytest.raises(SelectionError, match=rf"power: .*level {level}.*{wanted}"):
            call()
