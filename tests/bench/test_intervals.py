"""Ratios: the interval covers the truth as often as it says, drift drops out, and noise allows no verdict."""

import numpy as np
import pytest

from bench.intervals import FASTER, NOISE, NOISY, SAME, SLOWER, UNCLEAR, Ratio, ratio, verdict


def made_up(truth, groups, pairs, rng, between=0.02, within=0.02):
    """Seconds of two series whose ratio has the median ``truth``: groups differ, and so do pairs, and both drift."""
    drift = np.exp(np.cumsum(rng.normal(0, 0.1, groups)))[:, None] * np.linspace(1, 2, groups)[:, None]
    reference = drift * np.exp(rng.normal(0, 0.05, (groups, pairs)))
    errors = rng.normal(0, between, (groups, 1)) + rng.normal(0, within, (groups, pairs))
    return reference * truth * np.exp(errors), reference


@pytest.mark.parametrize("truth", [1.0, 1.07])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(truth):
    rng, covered, wider = np.random.default_rng(1), 0, []
    for _ in range(100):
        found = ratio(*made_up(truth, 20, 6, rng))
        covered += found.low <= truth <= found.high
        wider.append(found.width)
    assert covered >= 86  # of 95 to be expected; the percentile bootstrap of 20 groups covers a little less
    assert 0.008 < np.median(wider) < 0.04


def test_pairs_of_one_group_are_not_taken_for_many():
    """Eight copies of each pair tell nothing new."""
    rng = np.random.default_rng(2)
    values, reference = made_up(1.0, 20, 1, rng)
    once = ratio(values, reference)
    copied = ratio(np.repeat(values, 8, 1), np.repeat(reference, 8, 1))
    assert copied.width == pytest.approx(once.width, rel=0.15)
    assert (once.count, copied.count) == (20, 160)


def test_what_drifts_drops_out():
    drift = np.geomspace(1, 50, 40).reshape(10, 4)
    found = ratio(1.25 * drift, drift)
    assert found == Ratio(*[pytest.approx(1.25)] * 3, 0.95, 40)
    assert found.width == pytest.approx(0) and found.noise == pytest.approx(0.25)


def test_the_same_numbers_give_the_same_interval_and_outliers_little():
    rng = np.random.default_rng(3)
    values, reference = made_up(1.02, 12, 5, rng)
    found = ratio(values, reference)
    assert found == ratio(values, reference)
    assert found.low < found.median < found.high
    assert ratio(values, reference, level=0.5).width < found.width
    spoilt = values.copy()
    spoilt[3, 2] *= 100
    assert ratio(spoilt, reference).median == pytest.approx(found.median, abs=0.005)
    assert ratio(spoilt, reference).high < 1.1


def test_a_single_group_has_no_interval():
    with pytest.raises(ValueError, match="found 1 groups"):
        ratio([[1.0, 2.0]], [[1.0, 2.0]])


def of(low, median, high):
    return Ratio(median, low, high, 0.95, 100)


QUIET = of(0.995, 1.0, 1.004)


@pytest.mark.parametrize(
    "found, again, said",
    [
        (of(1.02, 1.03, 1.04), QUIET, SLOWER),
        (of(0.95, 0.96, 0.98), QUIET, FASTER),
        (of(0.995, 1.0, 1.005), QUIET, SAME),
        (of(1.0, 1.005, 1.019), QUIET, SAME),  # 1 is its end
        (of(0.98, 1.0, 1.005), QUIET, UNCLEAR),  # too wide
        (of(0.9, 1.1, 1.2), QUIET, UNCLEAR),
        (of(1.001, 1.003, 1.006), QUIET, UNCLEAR),  # the unsteered model is as far from itself
        (of(0.99, 0.996, 0.999), QUIET, UNCLEAR),
        (of(1.001, 1.005, 1.006), QUIET, SLOWER),
        (of(1.5, 1.6, 1.7), of(1.0, 1.01, 1.03), NOISY),
        (of(0.999, 1.0, 1.001), of(0.97, 1.0, 1.0), NOISY),
        (of(1.5, 1.6, 1.7), of(1 - NOISE * 0.99, 1.0, 1 + NOISE * 0.99), SLOWER),
    ],
)
def test_verdicts(found, again, said):
    assert verdict(found, again) == said
