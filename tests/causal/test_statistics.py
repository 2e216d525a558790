"""Statistics of a causal check: equal to references, right where the truth is planted, and modest where it is not."""

import numpy as np
import pytest
from scipy import stats

from austeer.causal import statistics
from austeer.causal.statistics import (
    Difference,
    correlation,
    difference,
    findings,
    rank_correlation,
    resampled,
    verdict,
)


@pytest.fixture
def few_resamples(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 300)


def data(rho=0.0, size=40, items=6, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=size)
    return x, (rho * x + np.sqrt(1 - rho**2) * rng.normal(size=size))[:, None] + 0.1 * rng.normal(size=(size, items))


def findings_of(raised, beta, rng, seed=0):
    """The first 30 AUs are the top ones, the next 30 their matches, and the others the spread."""
    top, matched, spread = np.split(np.arange(len(beta)), [30, 60])
    given, groups = rng.normal(size=(len(beta), 3)), [str(i) for i in range(raised.shape[1])]
    places = {"top": top, "matched": matched, "spread": spread}
    return findings(raised=raised, sign=np.sign(beta), beta=beta, given=given, groups=groups, seed=seed, **places)


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
    weights = resampled(8, groups)(np.random.default_rng(0))
    assert weights.sum() == pytest.approx(1) and len(set(weights[:4])) == len(set(weights[4:])) == 1


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


@pytest.mark.parametrize("rho", [-0.6, 0.0, 0.8])
def test_intervals_of_a_correlation_hold_the_truth(rho, few_resamples):
    truth = 6 / np.pi * np.arcsin(rho / 2)  # Spearman's of a normal pair
    inside = 0
    for seed in range(30):
        x, y = data(rho, seed=seed)
        found = correlation(x, y, groups=list("abcdef"), seed=seed)
        inside += found.low <= truth <= found.high
    assert inside >= 25  # 28 expected of 30; the tiny item noise takes a little off rho


def test_nothing_is_found_where_nothing_is(few_resamples):
    wrong = np.zeros(4)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        raised = 0.1 * rng.normal(size=(90, 12))
        beta = rng.choice([-1, 1], 90) * rng.uniform(0.5, 1, 90)
        found = findings_of(raised, beta, rng, seed)
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
