"""Which AUs a causal check tries: matches are random, alike and no top AUs; the spread covers every |beta|."""

from dataclasses import replace

import pytest
import torch

from austeer import SelectionError
from austeer.causal.sample import CLASSES, GROUP, NEAREST, Scale, draw, draw_groups, gains, match, stratified


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def scale():
    size = torch.rand(30, 576, generator=generator(), dtype=torch.float64).exp()
    return Scale(size, size * torch.rand(30, 576, generator=generator(1), dtype=torch.float64))


def test_scale_is_that_of_the_texts():
    x = torch.randn(7, 2, 5, generator=generator())
    found = Scale.of(x)
    torch.testing.assert_close(found.size, x.double().abs().mean(0))
    torch.testing.assert_close(found.deviation, x.double().var(0, correction=0).sqrt())
    assert Scale(torch.zeros(1, 2), torch.zeros(1, 2)).features().isfinite().all()


def test_matches_share_layer_and_scale(demo_momentum, scale):
    sample = draw(demo_momentum, "attention", scale, 200, 50)
    top, matched = sample.top, sample.matched
    assert [("attention", int(u) // 576, int(u) % 576) for u in top] == demo_momentum.select("attention", k=200).keys()
    assert torch.equal(top // 576, matched // 576)
    assert len({*top.tolist(), *matched.tolist()}) == 400
    features = scale.features().flatten(0, 1)
    near = (features[top] - features[matched]).norm(dim=-1)
    # a random AU of the layer is much farther away
    others = top // 576 * 576 + torch.randint(576, (200,), generator=generator())
    other = (features[top] - features[others]).norm(dim=-1)
    assert float(near.median()) < 0.3 * float(other.median())


def test_matches_are_random_among_the_nearest(scale):
    features = scale.features()
    top = torch.tensor([5 * 576 + 100])
    drawn = {int(match(top, features, generator(seed))) for seed in range(300)}
    distance = (features[5] - features[5, 100]).norm(dim=-1)
    expected = {5 * 576 + int(i) for i in distance.argsort()[1 : NEAREST + 1]}
    assert drawn == expected


def test_the_spread_has_as_many_of_each_class_as_there_are(demo_momentum, scale):
    strength = torch.cat([torch.linspace(0, 0.0999, 1000), torch.linspace(0.9001, 1, 3), torch.tensor([0.55])])
    chosen = strength[stratified(strength, 13, generator())]
    assert ((chosen < 0.1).sum(), (chosen > 0.9).sum(), (chosen == strength[-1]).sum()) == (9, 3, 1)
    found = draw(demo_momentum, "ffn", scale, 5, 100).spread
    counters = demo_momentum.counters("ffn")
    beta = torch.maximum(counters.positive, counters.negative).flatten()[found] / demo_momentum.pairs
    assert len(found.unique()) == 100
    counts = torch.histc(beta.double(), CLASSES, float(beta.min()), float(beta.max()))
    assert (counts > 0).sum() >= CLASSES - 2 and counts.max() <= 20


def test_one_strength_for_all():
    assert len(stratified(torch.full((20,), 0.5), 6, generator()).unique()) == 6


def test_the_seed_decides(demo_momentum, scale):
    first, again, other = (draw(demo_momentum, "ffn", scale, 10, 30, seed) for seed in (1, 1, 2))
    assert torch.equal(first.matched, again.matched) and torch.equal(first.spread, again.spread)
    assert torch.equal(first.top, other.top)
    assert not torch.equal(first.matched, other.matched) and not torch.equal(first.spread, other.spread)


def test_a_larger_draw_keeps_a_smaller_one(demo_momentum, scale):
    small, large = draw(demo_momentum, "ffn", scale, 10, 30), draw(demo_momentum, "ffn", scale, 40, 60)
    assert torch.equal(small.spread, large.spread[:30]) and torch.equal(small.top, large.top[:10])
    # a match that is among the top now has to go
    assert len({*small.matched.tolist()} & {*large.matched.tolist()}) >= 5


@pytest.fixture(scope="module")
def made_effects(demo_momentum):
    """Momentum whose effects are another site's differences: not those of the AUs, and of both signs."""
    effects = {"attention": demo_momentum.counters("ffn"), "ffn": demo_momentum.counters("attention")}
    return demo_momentum.with_effects(effects, None)


def test_top_aus_by_effect_are_those_of_the_largest_one_up_or_down(made_effects, scale):
    sample, gain = draw(made_effects, "ffn", scale, 40, 30), gains(made_effects, "ffn")
    delta = made_effects.counters("ffn").delta_sum / made_effects.pairs
    torch.testing.assert_close(gain, (made_effects.effect("ffn") * delta).flatten())
    assert len(sample.effect.unique()) == 40 and not len(sample.per_side_effect)
    assert gain[sample.effect].abs().min() >= gain.abs().sort(descending=True).values[39]
    assert 5 < int((gain[sample.effect] > 0).sum()) < 35
    assert {*sample.effect.tolist()} <= {*sample.units().tolist()}
    plain = draw(made_effects.effects, "ffn", scale, 40, 30)
    assert not len(plain.effect)


def test_groups_are_the_best_ten_and_the_next_ten(made_effects):
    found, gain = draw_groups(made_effects, "ffn", 6), gains(made_effects, "ffn")
    assert {kind: tuple(rows.shape) for kind, rows in found.items()} == dict.fromkeys(
        ("random", "momentum", "effect"), (6, GROUP)
    )
    plan = made_effects.select("ffn", k=60)
    assert torch.equal(found["momentum"].flatten(), plan.layer.long() * 576 + plan.index)
    sums = gain[found["effect"]].sum(1)
    assert (sums[:-1] >= sums[1:]).all() and (gain[found["effect"]] > 0).all()
    assert gain[found["effect"][-1]].min() >= gain.sort(descending=True).values[59]
    for rows in found.values():
        assert len(rows.unique()) == 60
    fewer, other = draw_groups(made_effects, "ffn", 2), draw_groups(made_effects, "ffn", 2, seed=1)
    for kind, rows in fewer.items():
        assert torch.equal(rows, found[kind][:2])
    assert not torch.equal(fewer["random"], other["random"])


def test_units_are_there_once_and_in_order(demo_momentum, scale):
    sample = draw(demo_momentum, "ffn", scale, 10, 400)
    units = sample.units().tolist()
    members = {unit for part in vars(sample).values() for unit in part.tolist()}
    assert units == sorted(members)


def test_complaints(demo_momentum, scale):
    with pytest.raises(SelectionError, match=r"n: .* 0.*8640.*'ffn'"):
        draw(demo_momentum, "ffn", scale, 0, 5)
    with pytest.raises(SelectionError, match=r"sample.*17281.*17280"):
        draw(demo_momentum, "ffn", scale, 5, 17281)
    with pytest.raises(SelectionError, match="site 'layer'"):
        draw(demo_momentum, "layer", scale, 5, 5)
    crowded = torch.tensor([0, 1, 2])
    with pytest.raises(SelectionError, match=r"3 top AUs.*4 AUs"):
        match(crowded, torch.zeros(2, 4, 2), generator())


def test_only_measured_layers(demo_momentum, scale):
    rows, counters = [3, 7], demo_momentum.counters("ffn")
    sites = {"ffn": type(counters)(*(t[rows] for t in counters.tensors().values()))}
    part = replace(demo_momentum, sites=sites, layers=tuple(rows))
    sample = draw(part, "ffn", Scale(scale.size[rows], scale.deviation[rows]), 10, 20)
    assert int(sample.units().max()) < 2 * 576
