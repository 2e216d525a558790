"""Dose and response: a strength for a KL and back, as predicted and as measured; in a plan and in its file."""

from dataclasses import replace

import pytest
import torch

from austeer import Plan, PlanError
from austeer.plans.dose import MEASURED_TOKENS, Dose, Point, some_ids
from small_plans import plan_of

KEYS = [("attention", 3, 5), ("ffn", 0, 0), ("ffn", 2, 8), ("attention", 1, 2)]
DOSE = Dose(
    kl=tuple(0.001 * (1 + i) for i in range(len(KEYS))),
    effect=tuple(0.5 * (1 + i) for i in range(len(KEYS))),
    error=0.1,
    texts="packaged neutral text",
    ids=((5, 6, 7), (8, 9)),
)
PLAN = plan_of(KEYS, "shift").with_dose(DOSE)


@pytest.mark.parametrize("points", [(), ((2.0, 0.1),), ((2.0, 0.1), (4.0, 0.3)), ((2.0, 0.1), (4.0, 0.3), (8.0, 4.0))])
@pytest.mark.parametrize("kl", [1e-6, 0.05, 0.1, 0.2, 1.0, 50.0])
def test_a_strength_has_the_kl_that_it_was_asked_for(points, kl):
    k = len(KEYS)
    dose = DOSE.with_measured(Point(k, *point) for point in points)
    assert dose.kl_of(dose.alpha(kl)) == pytest.approx(kl, rel=1e-9)
    for alpha, seen in points:
        assert dose.alpha(seen) == pytest.approx(alpha) and dose.kl_of(-alpha) == pytest.approx(seen)


def test_small_strengths_follow_the_square_and_prediction_and_measurement_are_of_one_k():
    dose = DOSE.with_measured([Point(2, 2.0, 0.1)])
    assert dose.alpha(0.025, 2) == pytest.approx(1.0), "below what was measured"
    assert DOSE.alpha(0.004, 3) == pytest.approx((0.004 / 0.003) ** 0.5)
    assert dose.alpha(0.15, 3) == pytest.approx(2.0), "of another k nothing was measured, and this corrects it"
    assert dose.kl_of(0.0) == 0 and dose.effect_of(3.0, 2) == 3.0 and replace(dose, effect=()).effect_of(3.0) is None
    assert dose.top(1) == replace(DOSE, kl=DOSE.kl[:1], effect=DOSE.effect[:1])
    falling = dose.with_measured([Point(2, 3.0, 0.05)])  # noise: no strength has less than a smaller one
    assert falling.alpha(0.05, 2) <= falling.alpha(0.1, 2)


@pytest.mark.parametrize("kl", [0, -1, float("nan"), float("inf"), True, "0.1"])
def test_a_kl_that_is_none_is_refused(kl):
    with pytest.raises(PlanError, match=r"kl: found .*0\.1"):
        DOSE.alpha(kl)
    with pytest.raises(PlanError, match="changes nothing"):
        replace(DOSE, kl=(0.0,) * len(KEYS)).alpha(0.1)


def test_plans_keep_it_where_it_still_holds(tmp_path):
    assert PLAN.top(2).dose == DOSE.top(2)
    assert PLAN.take(PLAN.of("ffn")).dose is None, "not the first AUs"
    assert PLAN.with_operation("scale").dose is None and PLAN.with_operation("shift").dose == DOSE
    other = plan_of([("ffn", 1, 7)], "shift").with_dose(replace(DOSE, kl=(0.1,), effect=(1.0,)))
    assert (PLAN + other).dose is None
    measured = PLAN.with_dose(DOSE.with_measured([Point(2, 1.5, 0.2)]))
    for plan in (PLAN, measured, PLAN.with_dose(replace(DOSE, effect=())), replace(PLAN, rank="effect", step="newton")):
        file = plan.save_pretrained(tmp_path / "plan")
        assert Plan.from_pretrained(file) == plan and Plan.from_pretrained(file) != plan.with_dose(None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kl": ()}, "KL"),
        ({"kl": (-0.1,), "effect": ()}, "KL"),
        ({"kl": (float("inf"),), "effect": ()}, "KL"),
        ({"effect": (1.0,)}, "effects"),
        ({"measured": (Point(99, 1.0, 0.1),)}, "measured strength"),
        ({"measured": (Point(1, 0.0, 0.1),)}, "measured strength"),
        ({"ids": ((1,) * 5000,)}, "tokens"),
        ({"texts": "two\nlines"}, "texts"),
    ],
)
def test_what_is_no_dose_is_refused(change, message):
    with pytest.raises(PlanError, match=message):
        replace(DOSE, **change)


def test_a_dose_of_another_plan_is_refused():
    with pytest.raises(PlanError, match=r"dose: .*'scale'"):
        plan_of(KEYS, "scale").with_dose(DOSE)
    with pytest.raises(PlanError, match=r"dose: found that of 1 AUs"):
        PLAN.with_dose(DOSE.top(1))


def test_whole_texts_travel_up_to_a_number_of_tokens():
    texts = [torch.arange(200) for _ in range(4)]
    assert [len(row) for row in some_ids(texts)] == [200, 200]
    assert [len(row) for row in some_ids([torch.arange(9000)])] == [MEASURED_TOKENS]


def test_small_strengths_keep_to_the_prediction_and_other_numbers_of_aus_are_corrected_too():
    """Far beyond the linear range a plan does less than predicted, and for small strengths as predicted."""
    dose = DOSE.with_measured([Point(4, 20.0, 0.4)])  # predicted: 1.6
    assert dose.kl_of(0.01) == pytest.approx(0.004 * 0.01**2, rel=0.01)
    assert dose.alpha(0.4, 4) == pytest.approx(20.0)
    assert dose.kl_of(20.0, 2) == pytest.approx(0.2), "of two AUs nothing was measured"
    values = [dose.kl_of(alpha) for alpha in (1, 2, 5, 10, 19.99, 20.01, 40)]
    assert values == sorted(values)
    more = DOSE.with_measured([Point(4, 2.0, 0.4)])  # predicted: 0.016
    assert [more.kl_of(alpha) for alpha in (0.5, 1, 4)] == pytest.approx([0.025, 0.1, 1.6]), "all were too small"
