"""Methods that know the gradient: equal to their formulas, better than where they began, or refused."""

from dataclasses import replace

import pytest
import torch

import austeer
from austeer import SelectionError
from austeer.baselines import arms, profiles_needed
from austeer.baselines.newton import UNIT, newton_step, side_effect_matrix
from austeer.momentum.by_effect import DAMPING, SHRINKAGE
from austeer.tasks.scoring import log_odds
from baseline_material import PAIRS, material_of

BY_GRADIENTS = ("effect", "newton", "trained")


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def material(request, tiny_of, demo):
    return material_of(tiny_of(request.param), demo[1], profiled=True)


def one(material, method, **changes):
    (arm,) = arms(method, material, **({"sites": ["ffn"], "ks": [5]} | changes))
    return arm


def test_the_newton_step_has_the_largest_effect_for_its_side_effect(material):
    momentum, profile = material.momentum, material.profile
    g = momentum.effect("layer")[1]
    rows, diagonal = (found[..., 0, :].double() for found in profile.scaled("layer", [1]))
    exact = rows.T @ rows
    matrix = exact * (1 - SHRINKAGE)
    matrix[range(len(g)), range(len(g))] = diagonal + DAMPING * diagonal.mean()
    torch.testing.assert_close(side_effect_matrix(profile, 1), matrix, rtol=1e-4, atol=1e-9)
    step, effect = newton_step(momentum, profile, 1)
    assert float(step @ matrix @ step) == pytest.approx(UNIT, rel=1e-4)
    assert effect == pytest.approx(float(g @ step))
    generator = torch.Generator().manual_seed(0)
    for size in (0.01, 0.3, 3.0):
        other = (
            step + size * step.norm() * torch.randn(len(g), generator=generator, dtype=torch.float64) / len(g) ** 0.5
        )
        other *= (UNIT / float(other @ matrix @ other)) ** 0.5
        assert float(g @ other) < effect
    arm = one(material, "newton", layers=[1])
    torch.testing.assert_close(arm.plan.delta.double(), step, rtol=1e-6, atol=0)
    assert set(arm.plan.layer.tolist()) == {1}


def test_training_raises_the_log_odds_within_the_same_side_effect(material):
    start, found, again = (one(material, method, layers=[1]) for method in ("newton", "trained", "trained"))
    assert torch.equal(found.plan.delta, again.plan.delta)
    matrix, vector = side_effect_matrix(material.profile, 1), found.plan.delta.double()
    assert float(vector @ matrix @ vector) == pytest.approx(UNIT, rel=1e-3)
    plain = log_odds(material.model, material.tokenizer, PAIRS)
    changes = []
    for arm in (start, found):
        with austeer.steer(material.model, arm.plan, 1, check=False):
            changes.append(float((log_odds(material.model, material.tokenizer, PAIRS) - plain).mean()))
    assert changes[1] > 1.01 * changes[0] > 0


def test_training_leaves_the_model_as_it_was(material):
    before = {name: value.clone() for name, value in material.model.state_dict().items()}
    one(material, "trained", layers=[2])
    assert all(torch.equal(value, before[name]) for name, value in material.model.state_dict().items())
    assert all(p.requires_grad for p in material.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in material.model.modules())


def test_steps_of_chosen_units(material):
    """Each kind of step of an AU alone: its mean difference, or what has a predicted KL of UNIT at a strength of 1."""
    momentum = material.momentum
    difference, newton = arms("effect", material, sites=["ffn"], ks=[1])
    unit = (difference.plan.layer[0], difference.plan.index[0])
    delta = momentum.counters("ffn").delta_sum[unit] / momentum.pairs
    assert float(difference.plan.delta[0]) == pytest.approx(float(delta))
    assert float(delta * momentum.effect("ffn")[unit]) > 0
    assert newton.plan.dose.kl_of(1) == pytest.approx(UNIT, rel=1e-3)
    at = (newton.plan.layer[0], newton.plan.index[0])
    assert float(newton.plan.delta[0] * momentum.effect("ffn")[at]) > 0


@pytest.mark.parametrize("method", BY_GRADIENTS)
def test_what_is_missing_is_named_with_the_remedy(material, method):
    plain = replace(material, momentum=replace(material.momentum, effects=None))
    with pytest.raises(SelectionError, match=f"'{method}'.*without effects.*effects=True"):
        arms(method, plain, sites=["ffn"], ks=[1])
    with pytest.raises(SelectionError, match=f"'{method}'.*no side-effect profile.*profile"):
        arms(method, replace(material, profile=None), sites=["ffn"], ks=[1])
    foreign = replace(material.profile, model=replace(material.profile.model, layers=7))
    with pytest.raises(SelectionError, match=r"7 layers.*3 layers"):
        arms(method, replace(material, profile=foreign), sites=["ffn"], ks=[1])


def test_a_vector_is_trained_on_pairs(material):
    with pytest.raises(SelectionError, match=r"'trained'.*no pair"):
        arms("trained", replace(material, pairs=PAIRS[:0]), sites=["ffn"], ks=[1], layers=[1])


def test_an_unmeasured_layer(material):
    for method in ("newton", "trained"):
        with pytest.raises(SelectionError, match=rf"'{method}'.*layer 3.*\[0, 1, 2\]"):
            arms(method, material, sites=["ffn"], ks=[1], layers=[3])


def test_sites_of_which_a_profile_is_needed():
    assert profiles_needed(["momentum", "caa"], ["ffn"]) == ()
    assert profiles_needed(["momentum", "effect"], ["ffn", "neuron"]) == ("ffn", "neuron")
    assert set(profiles_needed(["effect", "trained"], ["ffn"])) == {"ffn", "layer"}
