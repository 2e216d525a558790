"""Random plans: a fair draw, with each AU's own beta and delta."""

import pytest
import torch

from austeer import SelectionError
from austeer.baselines import random_plan


@pytest.mark.parametrize("operation", ["scale", "shift"])
def test_units_are_distinct_and_have_their_own_values(demo_momentum, operation):
    plan = random_plan(demo_momentum, "ffn", 500, seed=3, operation=operation)
    everything = {(unit.layer, unit.index): unit for unit in demo_momentum.select("ffn", k=30 * 576)}
    assert len(set(plan.keys())) == len(plan) == 500 and plan.operation == operation
    assert all(everything[unit.layer, unit.index] == unit for unit in plan)


def test_seed_decides(demo_momentum):
    first, again, other = (random_plan(demo_momentum, "ffn", 20, seed) for seed in (1, 1, 2))
    assert first == again and set(first.keys()) != set(other.keys())


def test_global_random_state_is_left_alone(demo_momentum):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    random_plan(demo_momentum, "ffn", 5, seed=1)
    assert torch.equal(torch.rand(3), expected)


def test_draw_is_uniform_over_layers(demo_momentum):
    # 3,000 AUs over 30 layers: 100 a layer, standard deviation about 9; the best AUs would crowd into a few.
    plan = random_plan(demo_momentum, "attention", 3000, seed=0)
    layers = torch.bincount(plan.layer, minlength=30)
    assert layers.min() > 60 and layers.max() < 140
    best = set(demo_momentum.select("attention", k=3000).keys())
    assert len(best & set(plan.keys())) / 3000 == pytest.approx(3000 / 17280, abs=0.03)


@pytest.mark.parametrize("site, k, message", [
    ("ffn", 0, "k: .* 0.*17280"),
    ("ffn", 17281, "k: .*17281.*17280.*'ffn'"),
    ("layer", 5, "site 'layer'"),
])  # fmt: skip
def test_complaints(demo_momentum, site, k, message):
    with pytest.raises(SelectionError, match=message):
        random_plan(demo_momentum, site, k, seed=0)
