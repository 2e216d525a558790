"""Statistics of momentum: sign tests against scipy and simulation; the stability of rankings, on made and real data."""

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy import stats

import austeer
from austeer import Counters, SelectionError
from austeer.statistics import (
    beta_histogram,
    chance_below,
    discoveries,
    expected_overlap,
    geometric,
    overlap,
    p_values,
    rate_interval,
    signed_rate,
    stability,
    ties_at_cut,
)
from made_momentum import momentum_of, signal
from places import SHARED_DATA as DATA


def counters_of(positive, negative):
    positive, negative = (torch.as_tensor(np.atleast_2d(t)) for t in (positive, negative))
    return Counters(positive, negative, *torch.zeros(2, *positive.shape).double())


def test_p_values_are_scipys_binomial_test():
    counts = [(p, n) for p in range(14) for n in range(14)] + [(500, 400), (0, 1000), (1000, 1000), (1, 1000)]
    found = p_values(counters_of(*zip(*counts)))[0]
    expected = [stats.binomtest(p, p + n).pvalue if p + n else 1.0 for p, n in counts]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("rate", [0, 1, -0.1, float("nan"), True, "0.05"])
def test_a_rate_that_is_none(rate):
    with pytest.raises(SelectionError, match=f"max_fdr.*{rate!r}"):
        discoveries(counters_of([1], [0]), rate)


def test_chance_below_is_what_coins_give():
    generator = np.random.default_rng(1)
    decided = generator.integers(0, 60, size=(20, 2000))
    positive = generator.binomial(decided, 0.5)
    counters = counters_of(positive, decided - positive)
    expected = chance_below(counters, 0.05)
    found = int((p_values(counters) <= 0.05).sum())
    assert expected < 0.05 * 40000, "counts are whole, so a test at 5 % errs less often"
    assert abs(found - expected) < 4 * expected**0.5


def test_interval_is_scipys():
    counts = np.array([0, 1, 7, 50, 99, 100])
    low, high = rate_interval(counts, 100)
    for count, *found in zip(counts, low, high):
        np.testing.assert_allclose(found, stats.binomtest(int(count), 100).proportion_ci(0.95, "exact"), rtol=1e-7)
    assert rate_interval(np.array([1]), 1)[1] == 1


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 200), st.booleans(), st.integers(0, 2**31))
def test_histogram_of_fair_coins_is_as_expected(pairs, zeros, seed):
    generator = np.random.default_rng(seed)
    decided = generator.integers(0, pairs + 1, size=(4, 500)) if zeros else np.full((4, 500), pairs)
    positive = generator.binomial(decided, 0.5)
    counters = counters_of(positive, decided - positive)
    edges = np.linspace(0, 1, 21)
    found, expected = beta_histogram(counters, pairs, edges)
    counts = np.maximum(positive, decided - positive)
    # In whole numbers: 0.15 of 20 pairs is 3, whatever 3 / 20 is in floating point.
    bins = np.minimum(counts * 20 // pairs, 19).flatten()
    assert found.tolist() == np.bincount(bins, minlength=20).tolist()
    assert expected.sum() == pytest.approx(2000) and (expected >= -1e-9).all()
    for count, mean in zip(found, expected):
        assert abs(count - mean) <= 6 * max(mean * (1 - mean / 2000), 1) ** 0.5 + 1e-6


def test_histogram_of_one_pair():
    found, expected = beta_histogram(counters_of([1, 0, 0], [0, 1, 0]), 1, np.linspace(0, 1, 21))
    assert found.tolist() == [1] + [0] * 18 + [2]
    assert expected.tolist() == [1.0] + [0.0] * 18 + [2.0], "an AU that does not differ stays as it is"


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12), st.integers(1, 60), st.integers(0, 2**31))
def test_ties_are_those_of_the_plan(pairs, k, seed):
    momentum = momentum_of(signal(pairs, 0.5, seed, layers=3, width=20))
    ties, plan = ties_at_cut(momentum, "ffn", k), momentum.select("ffn", k=k)
    beta = signed_rate(momentum.counters("ffn"), pairs).abs().flatten()
    assert ties.k == k and ties.beta == pytest.approx(plan.beta[-1].abs().item(), rel=1e-6)
    assert ties.tied == int(torch.isclose(beta, torch.tensor(ties.beta, dtype=beta.dtype)).sum())
    assert ties.inside == int(torch.isclose(plan.beta.abs(), torch.tensor(ties.beta).float()).sum())


def test_identical_halves_agree_on_everything():
    delta = signal(60, 0.3).repeat_interleave(2, 0)  # each pair in both halves
    found = stability(momentum_of(delta), "ffn")
    assert set(found.overlap) == {1.0} and found.pairs == (60, 60)
    # Where an AU's signs cancel it has none to agree on; not among the first.
    assert min(found.score) == 1.0 and min(found.expected) > 0.99


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(["effect", "public"]), st.sets(st.integers(1, 60), min_size=1))
def test_overlap_is_that_of_the_two_plans(seed, ties, ks):
    momentum = momentum_of(signal(30, 0.3, seed, layers=3, width=20))
    first, second = momentum.halves()
    found = stability(momentum, "ffn", tuple(ks), ties)
    assert found.k == tuple(sorted(ks)) and found.chance == tuple(k / 60 for k in found.k)
    for i, k in enumerate(found.k):
        one, other = (set(half.select("ffn", k=k, ties=ties).keys()) for half in (first, second))
        assert found.overlap[i] == overlap(first, second, "ffn", k, ties) == len(one & other) / k
        signs = [sign_of(first, unit) * sign_of(second, unit) for unit in one & other]
        assert found.score[i] == pytest.approx(sum(signs) / k)


def sign_of(momentum, unit):
    _, layer, index = unit
    counters = momentum.counters("ffn")
    return int(torch.sign(counters.positive[layer, index] - counters.negative[layer, index]))


def test_chance_has_no_score():
    """Also where AUs differ in how often they are active: then the same ones are chosen again, with any sign."""
    delta = signal(200, 0.0)
    delta[torch.rand(delta.shape, generator=torch.Generator().manual_seed(0)) < torch.linspace(0, 0.9, 400)] = 0
    found = stability(momentum_of(delta), "ffn", (100, 300, 1000))
    assert all(o > 2 * c for o, c in zip(found.overlap, found.chance)), "activity makes a ranking, and no signal"
    assert max(map(abs, found.score)) < 0.1
    plain = stability(momentum_of(signal(200, 0.0)), "ffn", (100, 300, 1000, 4000))
    assert plain.overlap == pytest.approx(plain.chance, abs=0.06)
    assert max(map(abs, plain.score)) < 0.1


@settings(max_examples=60, deadline=None)
@given(st.floats(0.0, 1.0), st.integers(1, 3000), st.floats(1.0, 8.0))
@example(0.99609375, 1, 1.0)
def test_more_pairs_agree_more(score, k, factor):
    same, more = expected_overlap(score, k, 4000, 1.0), expected_overlap(score, k, 4000, factor)
    assert k / 4000 - 1e-6 <= same <= more + 1e-9 <= 1 + 1e-8
    assert same >= score - 1e-3, "the overlap is the score and what has opposite signs"


@pytest.mark.parametrize("pairs, strength", [(40, 0.2), (100, 0.1), (100, 0.3)])
def test_what_is_expected_of_all_pairs_is_found_with_as_many_others(pairs, strength):
    ks = (100, 300, 1000)
    momenta = [momentum_of(signal(pairs, strength, seed)) for seed in range(6)]
    found = [stability(momentum, "ffn", ks) for momentum in momenta]
    expected, halves = (np.mean([getattr(one, what) for one in found], 0) for what in ("expected", "overlap"))
    actual = np.mean([[overlap(a, b, "ffn", k) for k in ks] for a, b in combinations(momenta, 2)], 0)
    assert np.abs(expected - actual).max() < 0.06
    assert (actual > halves + 0.01).all(), "all pairs agree on more than their halves"


def test_geometric_series():
    assert geometric(17280)[:4] == (10, 13, 16, 20) and 1000 in geometric(17280) and geometric(17280)[-1] == 1585
    assert geometric(100) == (10,) and geometric(99) == tuple(range(1, 50)) and geometric(1) == (1,)
    assert list(geometric(10**6)) == sorted(set(geometric(10**6)))


def test_complaints():
    momentum = momentum_of(signal(10, 0.1, layers=2, width=20))
    for call in (
        lambda: stability(momentum, "layer"),
        lambda: overlap(momentum, momentum, "layer", 3),
        lambda: ties_at_cut(momentum, "layer", 3),
    ):
        with pytest.raises(SelectionError, match=r"'layer'.*ffn"):
            call()
    for call in (
        lambda: stability(momentum, "ffn", (3, 41)),
        lambda: overlap(momentum, momentum, "ffn", 41),
        lambda: ties_at_cut(momentum, "ffn", 41),
    ):
        with pytest.raises(SelectionError, match=r"k.*41.*40.*'ffn'"):
            call()
    lone = momentum_of(signal(10, 0.1, layers=2, width=20), half=torch.arange(10))
    with pytest.raises(SelectionError, match=r"halves.*10 pairs"):
        stability(lone, "ffn")


def rows(name, count):
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"{path} is not here: a checkout does not have the real data")
    return [json.loads(line) for line, _ in zip(path.read_text(encoding="utf-8").splitlines(), range(count))]


@pytest.fixture(scope="module")
def differences(demo, tmp_path_factory):
    """Measures pairs at the site attention of 16 layers: their differences, [pairs, layers, width]."""

    def measured(pairs):
        folder = tmp_path_factory.mktemp("activations")
        austeer.measure(*demo, pairs, "attention", layers=range(16), save_activations=folder, progress=False)
        shards = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
        return torch.cat([shard["attention.positive"] - shard["attention.negative"] for shard in shards])

    return measured


def test_balanced_answers_have_no_stable_ranking(differences):
    """Yes against no, as coins fall, to questions whose passage is left out: nothing tells which is right."""
    questions = [row["question"] for row in rows("boolq_a.jsonl", 100)]
    coins = np.random.default_rng(0).permutation(len(questions)) % 2
    delta = differences(
        [(f"{q}? Answer:", *((" yes", " no") if c else (" no", " yes"))) for q, c in zip(questions, coins)]
    )
    found = stability(momentum_of(delta), "ffn", (30, 100, 300))
    assert max(found.overlap) < 0.1 and max(found.score) < 0.1, "no more than chance"


def test_persona_statements_have_a_stable_ranking_and_halves_of_one_answer_each_have_opposite_signs(differences):
    """Yes and No are right in turns: halves that take turns choose the same AUs, of answers and not of traits."""
    fields = ("question", "answer_matching_behavior", "answer_not_matching_behavior")
    delta = differences([tuple(row[field] for field in fields) for row in rows("persona_agreeableness.jsonl", 150)])
    mixed = torch.from_numpy(np.random.default_rng(0).permutation(150)[:75]).sort().values
    found = stability(momentum_of(delta, half=mixed), "ffn", (30, 100, 300))
    assert min(found.score) > 0.15 and found.overlap[-1] > 5 * found.chance[-1]
    turns = stability(momentum_of(delta), "ffn", (30, 100, 300))
    assert min(turns.overlap) > 0.3 and max(turns.score) < -0.3, "an overlap alone would call this stable"


def test_what_half_of_the_real_pairs_promise_the_whole_keeps(differences):
    """Sentiment pairs, one half against the other, and what the halves of each said would come of it."""
    file = Path(austeer.__file__).parent / "data" / "demo_pairs.jsonl"
    pairs = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()][:160]
    delta = differences([(row["prompt"], row["positive"], row["negative"]) for row in pairs])
    ks, expected, actual, halves = (100, 300, 1000), [], [], []
    for seed in range(3):
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(delta)))
        both = [momentum_of(delta[part]) for part in order.chunk(2)]
        found = [stability(momentum, "ffn", ks) for momentum in both]
        expected.append(np.mean([one.expected for one in found], 0))
        halves.append(np.mean([one.overlap for one in found], 0))
        actual.append([overlap(*both, "ffn", k) for k in ks])
    expected, actual, halves = (np.mean(t, 0) for t in (expected, actual, halves))
    assert np.abs(expected - actual).max() < 0.06
    assert (actual > halves + 0.06).all()
