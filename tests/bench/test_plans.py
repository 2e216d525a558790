"""Plans for timing: as many AUs in as many layers as asked for, and evenly."""

import pytest

from austeer.errors import PlanError
from austeer.models.sites import SITE_NAMES, find_sites
from bench.plans import spread_plan
from tiny_models import tiny_model

LAYERS = 12


@pytest.fixture(scope="module")
def model():
    return tiny_model(num_hidden_layers=LAYERS)


def counts(plan):
    return {layer: plan.layer.tolist().count(layer) for layer in sorted(set(plan.layer.tolist()))}


@pytest.mark.parametrize("site", SITE_NAMES)
@pytest.mark.parametrize("k, layers", [(1, 1), (5, 5), (12, 12), (30, 12), (30, 4), (30, 1), (100, 5), (7, 3)])
def test_aus_are_spread_evenly(model, site, k, layers):
    plan = spread_plan(model, site, k, layers)
    found = counts(plan)
    assert len(plan) == k and plan.sites == (site,) and plan.operation == "scale"
    assert len(found) == layers and max(found.values()) - min(found.values()) <= 1
    assert len(set(zip(plan.layer.tolist(), plan.index.tolist()))) == k, "an AU twice"
    assert plan.index.min() >= 0 and plan.index.max() < find_sites(model, [site])[site][0].width
    assert set(plan.beta.tolist()) <= {-1.0, 1.0}
    gaps = [b - a for a, b in zip(found, list(found)[1:])]
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert abs(min(found) - (LAYERS - 1 - max(found))) <= 1, "as far from the first layer as from the last"


def test_by_default_as_many_layers_as_there_are_or_as_k(model):
    assert len(counts(spread_plan(model, "ffn", 100))) == LAYERS
    assert len(counts(spread_plan(model, "ffn", 5))) == 5


def test_the_same_call_gives_the_same_plan_and_both_signs(model):
    plan, again, other = (spread_plan(model, "ffn", 50, seed=seed) for seed in (0, 0, 1))
    assert plan.index.equal(again.index) and plan.beta.equal(again.beta)
    assert not plan.index.equal(other.index)
    assert 10 < (plan.beta > 0).sum() < 40


@pytest.mark.parametrize(
    "k, layers, message",
    [
        (0, None, "k: found 0"),
        (32 * LAYERS + 1, None, f"k: found {32 * LAYERS + 1}, expected an integer from 1 to {32 * LAYERS}"),
        (65, 2, "k: found 65, expected an integer from 1 to 64 .AUs of 2 layers of site 'ffn'"),
        (10, LAYERS + 1, rf"layers: found {LAYERS + 1}, expected an integer from 1 to {LAYERS}"),
        (3, 5, "layers: found 5 with k=3, expected at most one layer an AU"),
    ],
)
def test_what_cannot_be_is_refused(model, k, layers, message):
    with pytest.raises(PlanError, match=message):
        spread_plan(model, "ffn", k, layers)
