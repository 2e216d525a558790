"""What gradients predict of single AUs and of groups, beside what is measured."""

from contextlib import ExitStack
from dataclasses import replace

import pytest
from scipy.stats import spearmanr

from austeer import SelectionError
from austeer.causal import WAYS, causal_check
from austeer.demo.demo import load_data
from austeer.models.sites import find_sites
from austeer.tasks import Task
from causal_checks import FEW, MEASURED, checked
from naive_scores import naive_log_odds


def test_what_the_gradient_predicts(model, demo, with_effects, profile):
    result = checked(model, demo, with_effects, profile=profile, groups=2, alphas=[2, 1])
    effect = with_effects.effect("attention")
    for unit in result.units:
        assert set(unit.predicted) == {"shift", "deviation"}
        for way, shift in (("shift", abs(unit.delta)), ("deviation", unit.deviation)):
            assert unit.predicted[way] == pytest.approx(float(effect[unit.layer, unit.index]) * shift)
    # the top ones by predicted effect and by effect per side effect are steered, too, whatever their beta
    by_place = {(unit.layer, unit.index): unit for unit in result.units}
    gain = (effect * with_effects.counters("attention").delta_sum).abs()
    price = (effect.abs() / (profile.fisher("attention") + 0.001 * profile.fisher("attention").mean()).sqrt()).flatten()
    for name, score in (("effect", gain.flatten()), ("per_side_effect", price)):
        expected = {divmod(place, effect.shape[1]) for place in score.topk(3).indices.tolist()}
        assert {place for place, unit in by_place.items() if name in unit.groups} == expected
    for way in WAYS:
        spread, mixed = result.findings[way].spread, result.findings[way].mixed
        members = [u for u in result.units if {"spread", "effect", "per_side_effect"} & {*u.groups}]
        assert (spread.count, mixed.count) == (6, len(members)) and 6 < len(members) <= 12
        assert mixed.beta.rho == pytest.approx(spearman([u.beta for u in members], [u.raised[way] for u in members]))
        assert mixed.delta.rho == pytest.approx(spearman([u.delta for u in members], [u.raised[way] for u in members]))
        assert (mixed.predicted is None) == (mixed.slope is None) == (way == "scale")
        assert len(result.verdict[way]) == (4 if way == "scale" else 6)
    expected = spearman([u.predicted["shift"] for u in members], [u.raised["shift"] for u in members])
    assert result.findings["shift"].mixed.predicted.rho == pytest.approx(expected)


def spearman(x, y):
    return spearmanr(x, y).statistic


def test_groups_steered_together_equal_hooks_by_hand(model, demo, with_effects, profile):
    result = checked(model, demo, with_effects, ways=["shift"], profile=profile, groups=2, alphas=[3, 1])
    found = result.together
    assert [group.kind for group in found.groups[::2]] == ["random", "momentum", "effect", "per_side_effect"]
    assert [row.alpha for row in found.strengths] == [1, 3]
    delta = with_effects.counters("attention").delta_sum / with_effects.pairs
    gain = with_effects.effect("attention") * delta
    best = [group for group in found.groups if group.kind == "effect"]
    assert {place for group in best for place in group.units} == {
        divmod(place, delta.shape[1]) for place in gain.flatten().topk(20).indices.tolist()
    }
    places = find_sites(model, ["attention"])["attention"]
    for group in (found.groups[0], best[0]):
        assert len(group.units) == 10
        assert group.predicted == pytest.approx(sum(float(gain[place]) for place in group.units))
        for alpha, raised in zip((1, 3), group.raised):
            sides = []
            for sign in (alpha, -alpha):
                with ExitStack() as hooks:
                    for layer, index in group.units:
                        hooks.enter_context(
                            shifted(model.get_submodule(places[layer].path), index, sign * delta[layer, index])
                        )
                    sides.append(float(naive_log_odds(model, demo[1], load_data().held_out[:5]).mean()))
            assert raised == pytest.approx((sides[0] - sides[1]) / 2, rel=1e-2, abs=2e-5)
    plan = with_effects.select("attention", k=10, operation="shift")
    first = next(group for group in found.groups if group.kind == "momentum")
    assert first.units == tuple(zip(plan.layer.tolist(), plan.index.tolist()))
    assert first.kl == pytest.approx(profile.kl(plan))
    for number, row in enumerate(found.strengths):
        own = [group for group in found.groups if group.kind == "random"]
        assert row.means["random"] == pytest.approx(
            (sum(row.alpha * g.predicted for g in own) / 2, sum(g.raised[number] for g in own) / 2)
        )
        assert row.kl["random"] == pytest.approx(row.alpha**2 * sum(g.kl for g in own) / 2)
        assert row.slope[1] <= row.slope[0] <= row.slope[2]


def shifted(module, index, shift):
    def steer(_, args):
        x = args[0].clone()
        x[..., index] += shift
        return (x,)

    return module.register_forward_pre_hook(steer)


def test_on_the_measured_pairs_small_groups_do_what_the_gradient_predicts(model, demo, with_effects):
    """The gradient is of these very items, so what is left is how far a small shift is from linear: nearly nothing."""
    task = Task.of_pairs(MEASURED)
    result = causal_check(
        model,
        demo[1],
        task,
        with_effects,
        "attention",
        **(FEW | {"ways": ["deviation"], "groups": 3, "alphas": [0.01]}),
    )
    (row,) = result.together.strengths
    assert row.slope[0] == pytest.approx(1, abs=0.02) and row.correlation[0] > 0.99
    assert row.kl == {} and result.together.groups[0].kl is None
    assert result.findings["deviation"].mixed.predicted.rho > 0.9


def test_without_effects_nothing_is_predicted(model, demo, momentum, profile):
    result = checked(model, demo, momentum, ways=["shift"])
    assert result.together is None and result.findings["shift"].mixed is None
    assert result.findings["shift"].spread.predicted is None
    assert all(unit.predicted == {} for unit in result.units)
    with pytest.raises(SelectionError, match="effects"):
        checked(model, demo, momentum, profile=profile)


def test_effects_and_groups_go_on_from_a_check_without(model, demo, momentum, with_effects, counted, tmp_path):
    record = tmp_path / "record.jsonl"
    plain = checked(model, demo, momentum, record=record, ways=["shift"])
    counted["names"] = 0
    more = checked(model, demo, with_effects, record=record, ways=["shift"], groups=1, alphas=[1])
    assert counted["names"] == 2 * (len(more.units) - len(plain.units)) + 2 * 3
    counted["names"] = 0
    again = checked(model, demo, with_effects, record=record, ways=["shift"], groups=1, alphas=[1, 2])
    assert counted["names"] == 2 * 3 and [g.raised[0] for g in again.together.groups] == [
        g.raised[0] for g in more.together.groups
    ]


def test_a_profile_of_other_weights_is_refused(model, demo, with_effects, profile, tmp_path):
    record = tmp_path / "record.jsonl"
    with pytest.raises(SelectionError, match=r"profile: .*other weights.*0123.*austeer profile"):
        checked(model, demo, with_effects, record=record, profile=replace(profile, weights="0123"))
    with pytest.raises(SelectionError, match="site 'attention' has no profile"):
        other = replace(profile, rows={"ffn": profile.rows["attention"]}, layers={"ffn": profile.layers["attention"]})
        checked(model, demo, with_effects, record=record, profile=other)
    assert not record.exists()
