"""Statistics of a causal check: equal to references, right where the truth is planted, and modest where it is not."""

import numpy as np
import pytest
from scipy import stats

from austeer.causal import statistics
from austeer.causal.statistics import (
    Difference,
    agreement,
    correlation,
    difference,
    findings,
    linearity,
    rank_correlation,
    slope,
    verdict,
    weights,
)


@pytest.fixture
def few_resamples(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 300)


def data(rho=0.0, size=40, items=6, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=size)
    return x, (rho * x + np.sqrt(1 - rho**2) * rng.normal(size=size))[:, None] + 0.1 * rng.normal(size=(size, items))


def findings_of(raised, beta, rng, seed=0, predicted=None):
    """The first 30 AUs are the top ones, the next 30 their matches, and the others the spread; all are mixed."""
    top, matched, spread = np.split(np.arange(len(beta)), [30, 60])
    given, groups = rng.normal(size=(len(beta), 3)), [str(i) for i in range(raised.shape[1])]
    places = {"top": top, "matched": matched, "spread": spread, "mixed": None}
    known = {"beta": beta, "delta": -beta}
    if predicted is not None:
        known["predicted"], places["mixed"] = predicted, np.arange(len(beta))
    return findings(raised=raised, sign=np.sign(beta), known=known, given=given, groups=groups, seed=seed, **places)


def test_difference_of_planted_effects():
    rng = np.random.default_rng(0)
    matched = rng.normal(size=(60, 8))
    found = difference(matched + 0.5 + 0.1 * rng.normal(size=(60, 8)), matched)
    assert found.difference == pytest.approx(found.top - found.matched) == pytest.approx(0.5, abs=0.05)
    assert 0.4 < found.low < 0.5 < found.high < 0.6 and found.p < 0.001


def test_interval_and_p_equal_the_t_test_on_many_aus():
    rng = np.random.default_rng(1)
    top, matched = rng.normal(0.2, 1, size=(300, 1)), rng.normal(0, 1, size=(300, 1))
    found = difference(top, matched)
    reference = stats.ttest_rel(top[:, 0], matched[:, 0])
    low, high = reference.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.02)
    assert found.p == pytest.approx(reference.pvalue, rel=0.5, abs=0.003)


def test_few_pairs_give_the_exact_p():
    # of 2^5 sign patterns two are as extreme as all differences positive
    found = difference(np.arange(1.0, 6)[:, None], np.zeros((5, 1)))
    assert found.p == pytest.approx(2 / 32)


def test_items_of_one_group_are_resampled_together():
    # two topics: one in which every AU does +1, one in which every AU does -1; four items each
    values = np.tile([1.0] * 4 + [-1.0] * 4, (50, 1))
    groups = ["a"] * 4 + ["b"] * 4
    found = difference(values, np.zeros_like(values), groups)
    assert (found.low, found.high) == (-1, 1)
    alone = difference(values, np.zeros_like(values), list("abcdefgh"))
    assert -1 < alone.low < -0.3 and 0.3 < alone.high < 1
    fixed = difference(values.mean(1, keepdims=True), np.zeros((50, 1)))
    assert (fixed.low, fixed.high) == (0, 0)
    for row in weights(8, groups, 5, np.random.default_rng(0)):
        assert row.sum() == pytest.approx(1) and len(set(row[:4])) == len(set(row[4:])) == 1


def test_rank_correlation_is_spearmans():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 9, size=(2, 50)).astype(float)  # with ties
    assert rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert np.isnan(rank_correlation(x, np.ones(50)))


def test_partial_correlation_is_the_textbooks():
    rng = np.random.default_rng(0)
    z = rng.normal(size=80)
    x, y = z + rng.normal(size=80), z + rng.normal(size=80)
    xy, xz, yz = (stats.spearmanr(a, b).statistic for a, b in ((x, y), (x, z), (y, z)))
    expected = (xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2))
    assert rank_correlation(x, y, z[:, None]) == pytest.approx(expected)
    # what goes with z alone leaves little, and what is z in other words leaves nothing to correlate
    y = np.exp(z + 0.1 * rng.normal(size=80))
    assert abs(rank_correlation(x, y, z[:, None])) < 0.3 < 0.5 < rank_correlation(x, y)
    assert np.isnan(rank_correlation(x, np.exp(z), z[:, None]))
    # columns that say nothing, or the same again, change nothing
    several = np.column_stack([z, np.ones(80), 2 * z])
    assert rank_correlation(x, y, several) == pytest.approx(rank_correlation(x, y, z[:, None]))
    rows = rank_correlation(np.stack([x, y]), np.stack([y, -y]), np.stack([several, several]))
    assert rows == pytest.approx([float(rank_correlation(x, y, several)), -1])


@pytest.mark.parametrize("rho", [-0.6, 0.0, 0.8])
def test_intervals_of_a_correlation_hold_the_truth(rho, few_resamples):
    truth = 6 / np.pi * np.arcsin(rho / 2)  # Spearman's of a normal pair
    inside = np.zeros(2)
    for seed in range(30):
        x, y = data(rho, seed=seed)
        alone = correlation(x, y.mean(1), seed=seed)
        both = agreement({"beta": x, "delta": x}, y, list("abcdef"), seed).beta
        inside += [found.low <= truth <= found.high for found in (alone, both)]
    assert inside.min() >= 25  # 28 expected of 30; the tiny item noise takes a little off rho


def test_agreement_of_what_is_known_before():
    rng = np.random.default_rng(0)
    predicted = rng.normal(size=60) ** 3
    y = 0.7 * predicted[:, None] + 0.02 * rng.normal(size=(60, 8))
    known = {"beta": rng.uniform(-1, 1, 60), "delta": -predicted, "predicted": predicted}
    found = agreement(known, y, list("aabbccdd"))
    assert found.count == 60
    for name, x in known.items():
        row = getattr(found, name)
        assert row.rho == pytest.approx(stats.spearmanr(x, y.mean(1)).statistic) and row.low < row.rho < row.high
    assert found.delta.high < -0.9 and found.predicted.low > 0.9 and found.beta.low < 0 < found.beta.high
    assert found.ahead[0] == pytest.approx(found.predicted.rho - found.beta.rho) and found.ahead[1] > 0.4
    assert found.slope == pytest.approx((0.7, 0.7, 0.7), abs=0.02) and found.slope[1] < found.slope[0] < found.slope[2]
    # the differences are of the same resamples: of what is known twice there is none
    same = agreement({"beta": predicted, "delta": predicted, "predicted": predicted}, y, list("aabbccdd"))
    assert same.ahead == (0, 0, 0)
    without = agreement({"beta": known["beta"], "delta": known["delta"]}, y, list("aabbccdd"))
    assert (without.predicted, without.ahead, without.slope) == (None, None, None)
    assert without.beta.rho == found.beta.rho


def test_how_linear_groups_are():
    x = np.linspace(-1, 3, 20)
    y = np.tile(0.5 * x, (4, 1)).T
    (rho, low, high), line = linearity(x, y, list("aabb"))
    assert (rho, low, high) == pytest.approx((1, 1, 1)) and line == pytest.approx((0.5, 0.5, 0.5))
    # items of which half do nothing: the slope of a resample is anything from 0 to 1, the correlation stays
    half = np.column_stack([x, x, 0 * x, 0 * x])
    (rho, *_), (middle, low, high) = linearity(x, half, list("aabb"))
    assert rho == pytest.approx(1) and (middle, low, high) == pytest.approx((0.5, 0, 1))
    saturated = np.tanh(2 * x)[:, None]
    (rho, low, high), (middle, *_) = linearity(x, saturated, ["a"])
    assert rho == pytest.approx(np.corrcoef(x, saturated[:, 0])[0, 1]) and low < rho < high
    assert middle == pytest.approx(x @ saturated[:, 0] / (x @ x)) and middle < 1
    # equal values differ by rounding, which is no correlation
    (rho, low, high), _ = linearity(x, np.full((20, 3), 0.1), list("abc"))
    assert np.isnan([rho, low, high]).all() and np.isnan(slope(0 * x, x))


def test_nothing_is_found_where_nothing_is(few_resamples):
    wrong = np.zeros(6)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        raised = 0.1 * rng.normal(size=(90, 12))
        beta = rng.choice([-1, 1], 90) * rng.uniform(0.5, 1, 90)
        found = findings_of(raised, beta, rng, seed, predicted=rng.normal(size=90))
        wrong += [not sentence.startswith("no ") for sentence in verdict(found)]
    assert wrong.max() <= 4  # 1 expected of 20 each; 5 or more come once in 400 times


def test_a_planted_cause_is_found(few_resamples):
    rng = np.random.default_rng(0)
    beta = np.concatenate([rng.choice([-1, 1], 30), rng.choice([-1, 1], 30) * 0.6, rng.uniform(-1, 1, 60)])
    raised = (0.1 * beta**3)[:, None] + 0.01 * rng.normal(size=(120, 10))
    found = findings_of(raised, beta, np.random.default_rng(1))
    assert verdict(found) == [
        "top AUs have a larger effect than matched random AUs",
        "top AUs act in the wanted direction more than matched random AUs",
        "the direction of the effect goes with the sign and size of beta",
        "the size of the effect rises with |beta|, layer and scale held constant",
    ]
    assert found.wanted.top == pytest.approx(0.1, abs=0.01) and found.larger[0] == 1
    known = findings_of(raised, beta, np.random.default_rng(1), predicted=beta)
    assert verdict(known)[4:] == [
        "the effect goes with the one that its gradient predicts",
        "no difference between the gradient and beta in ranking effects was found",
    ]
    opposed = findings_of(raised, beta, np.random.default_rng(1), predicted=-beta)
    assert verdict(opposed)[4:] == [
        "the effect goes against the one that its gradient predicts",
        "the gradient ranks effects worse than beta does",
    ]
    # and against momentum, where it acts the other way
    against = findings_of(-raised, beta, np.random.default_rng(1))
    assert verdict(against)[1:3] == [
        "top AUs act in the wanted direction less than matched random AUs",
        "the direction of the effect goes against beta",
    ]
    assert against.size == found.size


def test_means_are_those_of_the_groups():
    found = difference(np.array([[1.0, 3.0], [2.0, 2.0]]), np.array([[0.0, 2.0], [1.0, 3.0]]))
    assert isinstance(found, Difference)
    assert (found.top, found.matched, found.difference) == (2.0, 1.5, 0.5)
