"""CAA and SADI: equal to their papers' formulas, written out with plain hooks on activations read text by text."""

import pytest
import torch

import austeer
from austeer.baselines import arms
from austeer.baselines.residual import spread
from austeer.models.sites import find_sites
from baseline_material import IDS, PAIRS, hooked, material_of, reference_activations
from dense_formula import logits


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2"])
def material(request, tiny_of, demo):
    return material_of(tiny_of(request.param), demo[1])


def test_caa_adds_the_mean_difference_of_the_residual_stream(material):
    model = material.model
    positive, negative = reference_activations(model, material.tokenizer, PAIRS, "layer")
    vector = (positive - negative).mean(0).float()
    for layer, arm in enumerate(arms("caa", material, sites=["ffn"], ks=[1])):
        assert arm.detail == f"layer {layer}" and arm.k == vector.shape[1]
        expected = hooked(model, find_sites(model, ["layer"])["layer"][layer], lambda x, n=layer: x + 3 * vector[n])
        with austeer.steer(model, arm.plan, 3, k=arm.k):
            torch.testing.assert_close(logits(model, IDS), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("site", ["ffn", "layer", "neuron"])
def test_sadi_amplifies_the_elements_that_differ_most(material, site):
    model = material.model
    positive, negative = reference_activations(model, material.tokenizer, PAIRS, site)
    mean = (positive - negative).mean(0)  # [layers, width]
    for arm in arms("sadi", material, sites=[site], ks=[4, 11]):
        kept = mean.abs().flatten().topk(arm.k).indices
        mask = torch.zeros(mean.numel()).index_fill(0, kept, 1).view_as(mean)
        assert arm.operation == "scale"
        found = set(arm.plan.top(arm.k).keys())
        assert found == {(site, int(layer), int(index)) for layer, index in mask.nonzero()}
        layer = arm.plan.layer[0].item()  # hooks are put on one layer; the others' AUs are left out of the plan
        plan = arm.plan.take((arm.plan.layer[: arm.k] == layer).nonzero()[:, 0])
        expected = hooked(model, find_sites(model, [site])[site][layer], lambda x, m=mask[layer]: x + 2.5 * (x * m))
        with austeer.steer(model, plan, 2.5):
            torch.testing.assert_close(logits(model, IDS), expected, rtol=1e-3, atol=1e-3)


def test_sadi_at_attention_takes_whole_heads(material):
    model = material.model
    positive, negative = reference_activations(model, material.tokenizer, PAIRS, "attention")
    width, count = positive.shape[-1], model.config.num_attention_heads
    # as the published code: the mean over a head's dimensions, before the mean over pairs
    per_head = (positive.unflatten(-1, (count, -1)).mean(-1) - negative.unflatten(-1, (count, -1)).mean(-1)).mean(0)
    best = per_head.abs().flatten().argsort(descending=True)
    size = width // count
    (one, three) = arms("sadi", material, sites=["attention"], ks=[1], heads=[1, 3])
    assert (one.k, three.k) == (size, 3 * size) and one.detail == "1 head" and three.detail == "3 heads"
    for arm, heads in ((one, best[:1]), (three, best[:3])):
        expected = {
            ("attention", int(head) // count, int(head) % count * size + i) for head in heads for i in range(size)
        }
        assert set(arm.plan.top(arm.k).keys()) == expected
        assert bool((arm.plan.beta == 1).all())


def test_spread_keeps_away_from_both_ends():
    assert spread(range(30), 10) == [1, 4, 7, 10, 13, 16, 19, 22, 25, 28]
    assert spread([0, 2, 5], 10) == [0, 2, 5]
    assert spread(range(32), 4) == [4, 12, 20, 28]
