"""Choosing a setting: the series of strengths, the limit on the side effect, the best, and how sure it is."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import austeer
from austeer import Pairs
from austeer.tasks import cross_entropy, log_odds
from austeer.tune import STRONGEST, WEAKEST, Scorer, Trial, _series, best, mean_interval, search, top_overlap

PAIRS = [
    ("The soup was", " good", " bad"),
    ("The bread was", " fresh", " stale"),
    ("My room had", " a fine view", " a dull view"),
    ("They said it is", " great", " awful"),
]
NEUTRAL = ["The river runs north of the old mill.", "Two boats left the harbour at noon."]


@pytest.fixture
def scored(tiny, demo):
    """(scorer, momentum) of a tiny model: settings that change little and settings that change much."""
    pairs = Pairs.of(PAIRS)
    momentum = austeer.measure(tiny, demo[1], pairs, ["attention", "ffn"])
    return Scorer(tiny, demo[1], pairs, NEUTRAL), momentum


TRIAL = Trial("ffn", "scale", 10, 1.0, 0.5, 0.6, 0.01)


# --- series of strengths ---------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.floats(0.01, 200))
def test_series_ends_right_below_the_limit(limit):
    tried = []

    def attempt(alpha):
        tried.append(alpha)
        return replace(TRIAL, alpha=alpha, effect=alpha) if alpha <= limit else None

    _series(attempt)
    passed = [alpha for alpha in tried if alpha <= limit]
    assert tried[0] == 1 and len(tried) == len(set(tried)) <= 9
    assert all(WEAKEST <= alpha <= STRONGEST for alpha in tried)
    if limit < WEAKEST:
        assert passed == []
    elif limit >= STRONGEST:
        assert max(passed) == STRONGEST
    else:  # the strongest that passed is within a factor of 2 of the limit
        assert limit / 2 <= max(passed) * (1 + 1e-12)


def test_series_ends_where_the_effect_falls():
    tried = []

    def attempt(alpha):
        tried.append(alpha)
        return replace(TRIAL, alpha=alpha, effect=-abs(alpha - 5))

    _series(attempt)
    assert tried == [1, 2, 4, 8]


# --- scoring ---------------------------------------------------------------------------------------------------------


def test_scorer_gives_changes_from_unsteered(scored, demo):
    scorer, momentum = scored
    plan = momentum.select("ffn", k=10, operation="shift")
    before = log_odds(scorer.model, demo[1], scorer.pairs), cross_entropy(scorer.model, demo[1], NEUTRAL)
    with austeer.steer(scorer.model, plan, 300):
        during = log_odds(scorer.model, demo[1], scorer.pairs), cross_entropy(scorer.model, demo[1], NEUTRAL)
    torch.testing.assert_close(scorer.change(plan, 300), during[0] - before[0], rtol=0, atol=1e-9)
    assert scorer.side_effect(plan, 300) == pytest.approx(during[1] - before[1], abs=1e-9)
    assert scorer.change(plan, 300).abs().max() > 1e-3, "the strength is large enough to see anything"
    assert not austeer.is_steered(scorer.model)


def test_strength_zero_changes_nothing(scored):
    scorer, momentum = scored
    plan = momentum.select("attention", k=10)
    assert scorer.change(plan, 0.0).abs().max() == 0 and scorer.side_effect(plan, 0.0) == 0


GRID = {"sites": ["attention", "ffn"], "operations": ["scale", "shift"]}


def test_search_tries_the_whole_grid(scored):
    series = []
    ks = (k for k in (3, 20))  # an iterator is read once, and used for every site and operation
    trials = search(*scored, **GRID, ks=ks, max_side_effect=math.inf, on_series=lambda: series.append(1))
    assert len(series) == 2 * 2 * 2
    grid = [t for t in trials if t.alpha in (1, 2, 4, 8, 16, 32)]
    rows = {(t.site, t.operation, t.k): [] for t in grid}
    assert list(rows) == [(s, o, k) for s in GRID["sites"] for o in GRID["operations"] for k in (3, 20)]
    for trial in grid:
        rows[trial.site, trial.operation, trial.k].append(trial)
    for row in rows.values():
        assert [t.alpha for t in row] == [2**i for i in range(len(row))]
        effects = [t.effect for t in row]
        assert effects[:-1] == sorted(effects[:-1])
        assert row[-1].alpha == STRONGEST or effects[-1] < effects[-2]
    # the best of each operation is tried once more, a little stronger
    tops = [best(grid, operation=operation) for operation in GRID["operations"]]
    refined = [(t.site, t.operation, t.k, t.alpha * 2**0.5) for t in tops if t.alpha < STRONGEST]
    assert [(t.site, t.operation, t.k, t.alpha) for t in trials[len(grid) :]] == refined


def test_search_keeps_to_the_limit_and_tells_the_truth(scored):
    scorer, momentum = scored
    limit = 1e-4
    trials = search(scorer, momentum, **GRID, ks=[3, 20], max_side_effect=limit)
    assert 0 < len(trials) < 8 * 6 + 2 and max(t.alpha for t in trials) <= STRONGEST, "the limit must stop some series"
    assert all(t.side_effect <= limit and t.alpha >= WEAKEST and 0 <= t.share <= 1 for t in trials)
    for trial in trials[::7]:
        plan = trial.plan(momentum)
        assert (plan.sites, plan.operation, len(plan)) == ((trial.site,), trial.operation, trial.k)
        change = scorer.change(plan, trial.alpha)
        assert trial.effect == pytest.approx(float(change.mean()))
        assert trial.share == float((change > 0).double().mean())


def test_no_setting_within_the_limit(scored):
    scorer, momentum = scored
    trials = search(scorer, momentum, sites=["ffn"], operations=["shift"], ks=[5], max_side_effect=-math.inf)
    assert trials == [] and best(trials) is None


def test_broken_model_is_never_within_the_limit(scored):
    scorer, momentum = scored
    scorer.base_cross_entropy = float("nan")
    assert search(scorer, momentum, sites=["ffn"], operations=["scale"], ks=[5], max_side_effect=math.inf) == []


# --- the best and its certainty --------------------------------------------------------------------------------------


def test_best_has_the_largest_effect_among_those_that_fit():
    trials = [TRIAL, replace(TRIAL, effect=0.9, operation="push"), replace(TRIAL, effect=0.7, site="attention")]
    assert best(trials) == trials[1]
    assert best(trials, operation="scale") == trials[2]
    assert best(trials, operation="scale", site="ffn") == TRIAL
    assert best(trials, k=11) is None


def test_overlap_of_rankings(demo_momentum, tiny, demo):
    assert top_overlap(demo_momentum, demo_momentum, "ffn", 50) == 1
    pairs = Pairs.of(PAIRS)
    a, b = (austeer.measure(tiny, demo[1], part, ["ffn"]) for part in (pairs[:2], pairs[2:]))
    first, second = (set(m.select("ffn", k=20).keys()) for m in (a, b))
    assert top_overlap(a, b, "ffn", 20) == len(first & second) / 20 == top_overlap(b, a, "ffn", 20)
    assert top_overlap(a, b, "ffn", 96) == 1, "all AUs of both"


def test_interval_covers_the_mean_as_often_as_it_says():
    """Also where the values of a group are alike, which an interval over single values would not survive."""
    generator = torch.Generator().manual_seed(0)
    groups = [f"topic {i // 8}" for i in range(80)]
    covered, naive = 0, 0
    for _ in range(200):
        topics = torch.randn(10, generator=generator, dtype=torch.float64).repeat_interleave(8)
        values = 3 + topics + 0.5 * torch.randn(80, generator=generator, dtype=torch.float64)
        low, high = mean_interval(values, groups)
        assert low < float(values.mean()) < high
        covered += low <= 3 <= high
        low, high = mean_interval(values, [str(i) for i in range(80)])
        naive += low <= 3 <= high
    assert 180 <= covered <= 198  # 190 expected
    assert naive < 160


def test_interval_is_students_t_where_each_value_is_its_own_group():
    values = torch.tensor([1.0, 2.0, 4.0, 7.0], dtype=torch.float64)
    expected = stats.t.interval(0.9, 3, loc=3.5, scale=stats.sem(values.numpy()))
    assert mean_interval(values, list("abcd"), 0.9) == pytest.approx(expected)
    assert mean_interval(torch.full((5,), 0.25), list("aabbc")) == (0.25, 0.25)
