"""AUs by effect per side effect: against the formula by brute force; what is chosen for its errors is not believed."""

import math
from dataclasses import replace

import pytest
import torch

import austeer
from austeer import SelectionError, profile
from austeer.momentum.by_effect import Candidates, best_sites, choose, effect_curve, effect_ratio, kl_ratio
from letter_tokens import Letters, letter_pairs
from tiny_models import tiny_model

TEXTS = ["the soup was warm", "a view of the river and its boats", "two roads meet by the old mill", "bread and tea"]
SITES = ("attention", "ffn", "neuron")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def momentum(model):
    return austeer.measure(model, Letters(), letter_pairs(40), SITES, effects=True, progress=False)


@pytest.fixture(scope="module")
def made(model):
    return profile(model, Letters(), SITES, TEXTS, draws=200, progress=False)


def random_candidates(units=60, draws=12, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def some(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = some(draws, units).float()
    scale = rows.double().square().sum(0).mean().expand(units)
    return Candidates(("ffn",), (units,), some(units), some(units), rows.double().square().sum(0), rows, scale)


def shrunk(found, shrinkage, damping):
    matrix = (1 - shrinkage) * (found.rows.T @ found.rows).double()
    matrix.diagonal().copy_(found.diagonal + damping * found.diagonal.mean())
    return matrix


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shrinkage", [0.2, 0.8, 1.0])
def test_newtons_steps_solve_the_matrix_and_each_choice_gains_most(seed, shrinkage):
    found, k = random_candidates(seed=seed), 8
    matrix = shrunk(found, shrinkage, 0.01)
    choice = choose(found, k, "newton", damping=0.01, shrinkage=shrinkage)

    def reached(units):
        """g' M^-1 g of some AUs: the square of the effect at a KL of 1."""
        units = list(units)
        return float(found.g[units] @ torch.linalg.solve(matrix[units][:, units], found.g[units]))

    order = choice.order.tolist()
    for size in range(k):
        best = max((unit for unit in range(60) if unit not in order[:size]), key=lambda u: reached([*order[:size], u]))
        assert order[size] == best
        units = order[: size + 1]
        expected = torch.linalg.solve(matrix[units][:, units], found.g[units])
        torch.testing.assert_close(choice.steps(size + 1), expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("seed", range(5))
def test_differences_are_chosen_for_the_effect_of_all_together(seed):
    found, k = random_candidates(seed=seed), 8
    matrix = shrunk(found, 0.5, 0.01)
    choice = choose(found, k, "difference", damping=0.01, shrinkage=0.5)
    assert torch.equal(choice.steps(k), found.delta[choice.order])
    assert bool((found.g * found.delta)[choice.order].gt(0).all())
    order = choice.order.tolist()

    def reached(units):
        step = found.delta[units]
        return float(found.g[units] @ step) / math.sqrt(float(step @ matrix[units][:, units] @ step))

    usable = [unit for unit in range(60) if found.g[unit] * found.delta[unit] > 0]
    for size in range(k):
        best = max((u for u in usable if u not in order[:size]), key=lambda u: reached([*order[:size], u]))
        assert order[size] == best


def test_a_smaller_choice_is_the_beginning_of_a_larger_one_and_the_pool_keeps_the_best():
    found = random_candidates(units=3000, draws=30)
    small, large = choose(found, 5, "newton"), choose(found, 50, "newton")
    assert torch.equal(small.order, large.order[:5])
    torch.testing.assert_close(small.steps(5), large.steps(5))


def test_what_cannot_be_chosen_is_refused():
    found = random_candidates()
    with pytest.raises(SelectionError, match=r"k: found 61, expected .* 1 to 60"):
        choose(found, 61, "newton")
    agreeing = int((found.g * found.delta > 0).sum())
    with pytest.raises(SelectionError, match=rf"{agreeing} .*delta's sign"):
        choose(found, 60, "difference")
    with pytest.raises(SelectionError, match=r"step: found 'adam', expected one of difference, newton"):
        choose(found, 5, "adam")


def test_of_noise_half_of_the_data_predicts_nothing(momentum, made):
    """Where g and rows are noise, what one half chooses has no effect on the other, however well it looks."""
    generator = torch.Generator().manual_seed(7)

    def noise(counters):
        return replace(counters, delta_sum=torch.randn(counters.delta_sum.shape, generator=generator).double())

    effects = momentum.effects
    half = {site: noise(c) for site, c in effects.half.items()}
    sites = {site: replace(c, delta_sum=half[site].delta_sum + noise(c).delta_sum) for site, c in effects.sites.items()}
    fake = momentum.with_effects(sites, half)
    found = Candidates.of(fake, made, ["neuron"])
    choice = choose(found, 20, "newton")
    seen = found.per_side_effect(choice.order, choice.steps(20))
    assert effect_ratio(fake, made, ["neuron"], "newton", 20)[-1] < 0.4
    try:
        assert effect_curve(fake, made, ["neuron"], "newton").best < 0.6 * seen
    except SelectionError as error:
        assert "give more pairs" in str(error)


def test_the_curve_grows_to_a_best_and_names_the_least_that_is_enough(momentum, made):
    curve = effect_curve(momentum, made, ["ffn"], "newton")
    assert curve.k[0] == 1 and list(curve.k) == sorted(curve.k) and len(curve.k) == len(curve.effect)
    at = curve.k.index(curve.enough)
    assert curve.effect[at] >= 0.95 * curve.best > max([*curve.effect[:at], 0])
    kinds = [curve.sites for curve in best_sites(momentum, made, SITES, "newton")]
    assert sorted(kinds) == sorted([("attention",), ("ffn",), ("neuron",), SITES])
    ratios = kl_ratio(momentum, made, ["ffn"], "newton", 12)
    assert len(ratios) == 12 and min(ratios) >= 1 and ratios[-1] > 1


def test_halves_that_say_the_same_lose_nothing_and_none_are_no_reason_to_refuse(momentum, made):
    share = momentum.half_pairs / momentum.pairs
    whole = momentum.effects.sites
    half = {site: replace(c, delta_sum=whole[site].delta_sum * share) for site, c in momentum.effects.half.items()}
    alike = momentum.with_effects(momentum.effects.sites, half)
    assert effect_ratio(alike, made, ["ffn"], "newton", 12) == pytest.approx([1.0] * 12)
    whole = replace(momentum, half=None, effects=replace(momentum.effects, half=None))
    assert effect_ratio(whole, made, ["ffn"], "newton", 12) == [1.0] * 12
    usable = [int(Candidates.of(half, made, ["ffn"]).usable("difference").sum()) for half in momentum.halves()]
    far = effect_ratio(momentum, made, ["ffn"], "difference", max(usable) + 3)
    assert far[min(usable) - 1 :] == [far[-1]] * (len(far) - min(usable) + 1) and far[-1] < 1
    some = effect_ratio(momentum, made, ["ffn"], "newton", 12)
    assert len(some) == 12 and 0 <= min(some) <= max(some) <= 1 and min(some) < 1


# --- as plans ---


@pytest.mark.parametrize("site", ["ffn", ("attention", "neuron")])
@pytest.mark.parametrize("step", ["difference", "newton"])
def test_a_plan_has_the_chosen_aus_and_what_they_are_predicted_to_do(momentum, made, site, step):
    plan = momentum.select(site, 12, profile=made, step=step)
    assert (len(plan), plan.operation, plan.rank, plan.step) == (12, "shift", "effect", step)
    found = Candidates.of(momentum, made, [site] if isinstance(site, str) else site)
    choice = choose(found, 12, step)
    effect = torch.tensor([float(momentum.effect(u.site)[u.layer, u.index]) for u in plan], dtype=torch.float64)
    torch.testing.assert_close(effect, found.g[choice.order])
    part = effect_ratio(momentum, made, found.sites, step, 12)
    assert plan.dose.effect_of(2.0) == pytest.approx(2 * part[-1] * float(effect @ plan.delta.double()), rel=1e-6)
    delta = [momentum.counters(u.site).delta_sum[u.layer, u.index] / momentum.pairs for u in plan]
    if step == "difference":
        torch.testing.assert_close(plan.delta, torch.stack(delta).float())
    else:
        ratio = plan.delta.double() / choice.steps(12)
        torch.testing.assert_close(ratio, ratio[:1].expand(12), rtol=1e-4, atol=0)
        assert plan.dose.alpha(0.1) == pytest.approx(1, rel=1e-5)
    ratios = kl_ratio(momentum, made, found.sites, step, 12)
    assert plan.dose.kl_of(1.0, 5) == pytest.approx(ratios[4] * made.kl(plan.top(5)), rel=1e-5)
    assert plan.top(5).dose.kl_of(1.0) == plan.dose.kl_of(1.0, 5)
    assert plan.dose.error == made.error and not plan.dose.ids, "a user's own text stays with the user"


def test_site_and_k_follow_from_a_budget(momentum, made):
    best = best_sites(momentum, made, SITES, "newton")[0]
    plan = momentum.select("auto", profile=made, kl=0.05)
    assert len(plan) == best.enough and set(plan.sites) <= set(best.sites)
    assert plan.dose.alpha(0.05) == pytest.approx(1, rel=1e-5)
    assert len(momentum.select("auto", 7, profile=made)) == 7
    assert len(momentum.select("ffn", profile=made, kl=0.05)) == effect_curve(momentum, made, ["ffn"], "newton").enough


def test_the_papers_choice_stays_the_papers_with_a_profile(momentum, made):
    public = momentum.select("ffn", 6, ties="public", operation="shift", profile=made)
    assert public.with_dose(None) == momentum.select("ffn", 6, ties="public", operation="shift")
    assert public.dose is not None


def test_other_ranks_have_a_dose_by_the_profile_too(momentum, made):
    plan = momentum.select("ffn", 6, rank="momentum", operation="shift", profile=made)
    assert plan.rank == "momentum" and plan.dose.kl_of(2.0) == pytest.approx(made.kl(plan, 2.0))
    assert plan.with_dose(None) == momentum.select("ffn", 6, operation="shift")
    largest = momentum.select("ffn", 6, rank="difference", operation="shift")
    means = momentum.counters("ffn").delta_sum.abs()
    assert {u.layer * means.shape[1] + u.index for u in largest} == set(means.flatten().topk(6).indices.tolist())
    assert largest.dose is None and momentum.select("ffn", 6, rank="difference").operation == "scale"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 3, "rank": "effect", "profile": None}, r"profile: found none.*austeer profile"),
        ({"k": 3, "operation": "scale"}, r"operation: found 'scale' .*'shift'"),
        ({"max_fdr": 0.1, "rank": "effect"}, r"max_fdr.*rank 'effect'"),
        ({"k": 3, "ties": "public", "rank": "effect"}, r"ties with rank 'effect'"),
        ({}, r"k, max_fdr.*kl=0\.1"),
        ({"kl": 0}, r"kl: found 0"),
        ({"k": 3, "rank": "best"}, r"rank: found 'best'"),
        ({"k": 3, "step": "adam"}, r"step: found 'adam'"),
        ({"k": 3, "rank": "momentum", "kl": 0.1, "profile": None}, r"another rank than 'effect'"),
        ({"k": 3, "site": "auto", "profile": None}, r"another rank than 'effect'"),
        ({"k": 3, "site": "layer"}, r"'layer'"),
    ],
)
def test_combinations_that_mean_nothing_are_refused(momentum, made, options, message):
    given = {"site": "ffn", "profile": made, **options}
    with pytest.raises(SelectionError, match=message):
        momentum.select(given.pop("site"), **given)


def test_momentum_without_effects_or_of_another_model_is_refused(momentum, made):
    with pytest.raises(SelectionError, match=r"effects: .*effects=True"):
        replace(momentum, effects=None).select("ffn", 3, profile=made)
    foreign = replace(made, model=replace(made.model, layers=9))
    with pytest.raises(SelectionError, match="9 layers"):
        momentum.select("ffn", 3, profile=foreign)
    with pytest.raises(SelectionError, match=r"no site with both effects .*profile"):
        momentum.select("auto", 3, profile=replace(made, rows={}, layers={}))
