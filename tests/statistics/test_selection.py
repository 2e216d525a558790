"""Selection: scores, the public code's order, significance, and plans."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from austeer import Counters, SelectionError
from austeer.statistics import effect_size, pairs_needed, power, ranking, signed_rate, stability
from made_momentum import momentum_of

LAYERS, WIDTH = 4, 37


def random_momentum(pairs, seed=0, layers=LAYERS, width=WIDTH, bias=0.0):
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randn(pairs, layers, width, generator=generator) + bias
    delta[torch.rand(delta.shape, generator=generator) < 0.1] = 0  # pairs that differ in nothing here
    return momentum_of(delta)


def positions(plan):
    return [(unit.layer, unit.index) for unit in plan]


def public_rule(momentum, site, k):
    """The public code's choice, in its own terms: one list a layer, a tie counts as +, Python's stable sort."""
    counters, pairs = momentum.counters(site), momentum.pairs
    everything = []
    for layer in range(counters.positive.shape[0]):
        for index in range(counters.positive.shape[1]):
            r_pos = int(counters.positive[layer, index]) / pairs
            r_neg = int(counters.negative[layer, index]) / pairs
            everything.append(SimpleNamespace(layer=layer, index=index, beta=r_pos if r_pos >= r_neg else -r_neg))
    return sorted(everything, key=lambda unit: abs(unit.beta), reverse=True)[:k]


def test_signed_rate_by_hand():
    counters = Counters(torch.tensor([[3, 1, 2, 0]]), torch.tensor([[1, 3, 2, 0]]), *torch.zeros(2, 1, 4).double())
    assert signed_rate(counters, 4).tolist() == [[0.75, -0.75, 0.5, 0.0]], "2 against 2 counts as +"


def test_effect_size_is_numpys():
    delta = torch.randn(50, LAYERS, WIDTH, generator=torch.Generator().manual_seed(1)).double()
    found = effect_size(momentum_of(delta).counters("ffn"), 50)
    np.testing.assert_allclose(found, np.abs(delta.numpy().mean(0)) / delta.numpy().std(0, ddof=1), rtol=1e-10)


def test_effect_size_at_its_limits():
    delta = torch.tensor([[[0.0, 1.0, 1.0]], [[0.0, 1.0, -1.0]]])  # never differs, always alike, cancels
    assert effect_size(momentum_of(delta).counters("ffn"), 2).tolist() == [[0.0, float("inf"), 0.0]]
    assert effect_size(momentum_of(delta[:1]).counters("ffn"), 1).tolist() == [[0.0, float("inf"), float("inf")]]


@pytest.mark.parametrize("site", ["attention", "ffn"])
def test_public_ties_on_a_real_model_equal_the_public_rule(demo_momentum, site):
    # At 64 pairs hundreds of AUs share a |beta|, so the tie rule decides most of this.
    expected = public_rule(demo_momentum, site, 1000)
    plan = demo_momentum.select(site, k=1000, ties="public")
    assert plan.keys() == [(site, unit.layer, unit.index) for unit in expected]
    torch.testing.assert_close(plan.beta, torch.tensor([unit.beta for unit in expected]), rtol=0, atol=0)
    assert len({abs(unit.beta) for unit in expected}) < 50


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(0, 2**31))
def test_public_ties_equal_the_public_rule(pairs, seed):
    momentum = random_momentum(pairs, seed)
    size = LAYERS * WIDTH
    plan = momentum.select("ffn", k=size, ties="public")
    expected = public_rule(momentum, "ffn", size)
    assert positions(plan) == [(unit.layer, unit.index) for unit in expected]
    assert plan.beta.tolist() == torch.tensor([unit.beta for unit in expected]).tolist()


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 9), st.integers(0, 2**31))
def test_effect_ties_take_the_larger_effect_then_layer_and_index(pairs, seed):
    momentum = random_momentum(pairs, seed)
    counters = momentum.counters("ffn")
    beta = signed_rate(counters, pairs).abs().flatten().tolist()
    effect = effect_size(counters, pairs).flatten().tolist()
    expected = sorted(range(LAYERS * WIDTH), key=lambda i: (-beta[i], -effect[i], i))
    assert ranking(momentum, "ffn").tolist() == expected


@settings(max_examples=40, deadline=None)
@given(st.integers(1, LAYERS * WIDTH), st.sampled_from(["effect", "public"]), st.integers(0, 2**31))
def test_a_smaller_k_is_a_prefix(k, ties, seed):
    momentum = random_momentum(6, seed)
    everything = momentum.select("ffn", k=LAYERS * WIDTH, ties=ties)
    assert sorted(everything.keys()) == [("ffn", layer, index) for layer in range(LAYERS) for index in range(WIDTH)]
    assert momentum.select("ffn", k=k, ties=ties) == everything.top(k)


@pytest.mark.parametrize("max_fdr", [0.001, 0.05, 0.5])
def test_max_fdr_keeps_what_scipys_correction_keeps(max_fdr):
    generator = torch.Generator().manual_seed(3)
    bias = torch.where(torch.rand(LAYERS, WIDTH, generator=generator) < 0.3, 0.8, 0.0)
    momentum = random_momentum(60, bias=bias)
    counters = momentum.counters("ffn")
    tests = [
        stats.binomtest(int(p), int(p + n)).pvalue
        for p, n in zip(counters.positive.flatten(), counters.negative.flatten())
    ]
    passing = set(np.flatnonzero(stats.false_discovery_control(tests, method="bh") <= max_fdr).tolist())
    plan = momentum.select("ffn", max_fdr=max_fdr)
    assert {layer * WIDTH + index for layer, index in positions(plan)} == passing
    assert 0 < len(passing) < LAYERS * WIDTH
    ranked = momentum.select("ffn", k=LAYERS * WIDTH)
    assert positions(plan) == [place for place in positions(ranked) if place in set(positions(plan))], "best first"


def test_noise_gives_few_discoveries_and_signal_many():
    # Under the null, the chance of any discovery at all is at most max_fdr; 40 draws give 2 or so.
    found = 0
    for seed in range(40):
        try:
            random_momentum(60, seed).select("ffn", max_fdr=0.05)
            found += 1
        except SelectionError as error:
            assert re.search(r"'ffn'.*0\.05.*p-value", str(error))
    assert found <= 7  # P(more than 7 of 40 at 5 %) is 0.2 %, and the seeds are fixed
    bias = torch.zeros(LAYERS, WIDTH)
    bias[2] = 2.0
    plan = random_momentum(60, bias=bias).select("ffn", max_fdr=0.05)
    assert (plan.layer == 2).sum() == WIDTH and (plan.layer != 2).sum() <= 0.2 * WIDTH


@pytest.mark.parametrize("pairs", [1, 10, 12])
def test_too_few_pairs_for_any_au_say_how_many_it_takes(pairs):
    """148 AUs at 5 %: one sign on 13 pairs is the first that passes alone, 148 * 2 / 2 ** 13 < 0.05."""
    alone = torch.zeros(pairs, LAYERS, WIDTH)
    alone[:, 1, 1] = 1
    with pytest.raises(SelectionError, match=rf"'ffn'.*0\.05.*{pairs} pairs.*148.*13 pairs"):
        momentum_of(alone).select("ffn", max_fdr=0.05)
    enough = torch.zeros(13, LAYERS, WIDTH)
    enough[:, 1, 1] = 1
    assert positions(momentum_of(enough).select("ffn", max_fdr=0.05)) == [(1, 1)]


def test_pairs_of_equal_texts_are_no_pairs_to_test_on():
    momentum = replace(random_momentum(20), identical=9)
    with pytest.raises(SelectionError, match="11 pairs"):
        momentum.select("ffn", max_fdr=0.05)


def test_what_was_not_found_says_what_would_be():
    level = 0.05 / 148
    with pytest.raises(SelectionError) as caught:
        random_momentum(60, 1).select("ffn", max_fdr=0.05)
    found = re.search(r"60 pairs.* (\d+) %.* 70 %.* (\d+) pairs", str(caught.value))
    assert power(60, int(found[1]) / 100 + 0.006, level) >= 0.8 > power(60, int(found[1]) / 100 - 0.006, level)
    assert int(found[2]) == pairs_needed(0.7, level)


@pytest.mark.parametrize("ties", ["effect", "public"])
@pytest.mark.parametrize("asked", [0.05, 0.2, 0.35])
def test_min_stability_is_the_largest_k_that_the_halves_agree_on(asked, ties):
    spread = torch.randn(20, 200, generator=torch.Generator().manual_seed(1)) * 0.4
    momentum = random_momentum(60, layers=20, width=200, bias=spread)
    plan = momentum.select("ffn", min_stability=asked, ties=ties, operation="push")
    found = stability(momentum, "ffn", ties=ties)
    reaching = [k for k, score in zip(found.k, found.score) if score >= asked]
    assert len(plan) == max(reaching) <= 400 and plan.ties == ties and plan.operation == "push"
    assert plan == momentum.select("ffn", k=max(reaching), ties=ties, operation="push")


def test_some_layers_alone_whole_or_their_best():
    momentum = random_momentum(60, layers=20, width=200)
    whole = momentum.select("ffn", layers=[7, 3], operation="ablate")
    assert sorted(whole.keys()) == [("ffn", layer, index) for layer in (3, 7) for index in range(200)]
    everything = momentum.select("ffn", k=20 * 200)
    there = [unit for unit in everything if unit.layer in (3, 7)]
    assert list(whole) == there and whole.operation == "ablate"
    assert list(momentum.select("ffn", k=9, layers=(3, 7))) == there[:9]
    for layers in ([], [20], [3, -1]):
        with pytest.raises(SelectionError, match=rf"layers: found {re.escape(str(layers))}.*0, 1, 2"):
            momentum.select("ffn", k=9, layers=layers)


def test_no_k_is_stable_enough():
    momentum = random_momentum(60, layers=20, width=200)
    found = stability(momentum, "ffn")
    k, score = found.best()
    with pytest.raises(SelectionError, match=rf"min_stability.*'ffn'.*0\.5.*{score:.2f}.*k = {k}.*30.*30 pairs"):
        momentum.select("ffn", min_stability=0.5)
    assert score == max(found.score) < 0.5


def test_stability_needs_halves():
    momentum = random_momentum(60)
    with pytest.raises(SelectionError, match="without halves"):
        replace(momentum, half=None).select("ffn", min_stability=0.5)
    with pytest.raises(SelectionError, match=r"halves.*60 pairs"):
        replace(momentum, half=momentum.sites, half_pairs=60).select("ffn", min_stability=0.5)


@pytest.mark.parametrize("operation", ["scale", "push", "shift"])
def test_plan_tells_where_it_comes_from(demo_momentum, operation):
    plan = demo_momentum.select("attention", k=5, operation=operation, ties="public")
    assert (plan.operation, plan.ties, plan.pairs, plan.chat_template) == (operation, "public", 64, False)
    assert plan.model == demo_momentum.model and plan.sites == ("attention",)
    counters = demo_momentum.counters("attention")
    for unit in plan:
        assert unit.delta == pytest.approx(float(counters.delta_sum[unit.layer, unit.index]) / 64, rel=1e-6)
        most = max(counters.positive[unit.layer, unit.index], counters.negative[unit.layer, unit.index])
        assert abs(unit.beta) == pytest.approx(float(most) / 64, rel=1e-6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"k": 0}, "k: found 0,.*148.*'ffn'"),
        ({"k": 149}, "k.*149.*148"),
        ({}, "k, max_fdr and min_stability"),
        ({"k": 3, "max_fdr": 0.1}, "k, max_fdr and min_stability"),
        ({"min_stability": 0.5, "max_fdr": 0.1}, "k, max_fdr and min_stability"),
        ({"min_stability": 0}, "min_stability: found 0,"),
        ({"min_stability": 1.1}, r"min_stability.*1\.1"),
        ({"min_stability": True}, "min_stability.*True"),
        ({"min_stability": float("nan")}, "min_stability.*nan"),
        ({"min_stability": "0.5"}, "min_stability.*'0.5'"),
        ({"max_fdr": 0}, "max_fdr: found 0,"),
        ({"max_fdr": 1}, "max_fdr: found 1,"),
        ({"max_fdr": float("nan")}, "max_fdr.*nan"),
        ({"k": 3, "site": "attention"}, "'attention'.*ffn"),
        ({"k": 3, "operation": "add"}, "operation.*'add'.*shift"),
        ({"k": 3, "ties": "random"}, "ties.*'random'.*public"),
    ],
)
def test_complaints(arguments, message):
    with pytest.raises(SelectionError, match=message):
        random_momentum(5).select(**({"site": "ffn"} | arguments))
