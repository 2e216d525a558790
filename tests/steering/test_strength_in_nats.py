"""steer(kl=): the strength follows from the side effect that is allowed; predicted, then corrected by what is seen."""

import warnings
from dataclasses import replace

import pytest
import torch

import austeer
from austeer import PlanError, SteeringError, SteeringWarning, profile, steer
from austeer.plans.dose import Dose, Point
from austeer.steering.side_effects import side_effects_of
from dense_formula import assert_unchanged, shift_plan, snapshot
from letter_tokens import Letters
from tiny_models import tiny_model

TEXTS = ["the soup was warm", "a view of the river and its boats", "two roads meet by the old mill", "bread and tea"]
IDS = tuple(tuple(row) for row in Letters()(TEXTS)["input_ids"])


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def made(model):
    return profile(model, Letters(), ["attention", "ffn"], TEXTS, draws=400, progress=False)


@pytest.fixture(scope="module")
def plan(model, made):
    plan = shift_plan(model, ("attention", "ffn"), 12, seed=4)
    return plan.with_dose(replace(made.dose(plan), ids=IDS))


def kl_of(model, plan, alpha, k=None):
    with steer(model, {"p": plan}, alpha, k=k) as steering:
        return side_effects_of(model, IDS, steering, ["p"]).mean()[0][0]


@pytest.mark.parametrize("kl", [0.002, 0.02, 0.1])
@pytest.mark.parametrize("k", [None, 5])
def test_the_kl_is_what_was_asked_for(model, plan, kl, k):
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SteeringWarning)
        steering = steer(model, plan, kl=kl, k=k)
    assert kl_of(model, plan, steering.alpha, k) == pytest.approx(kl, rel=0.15)
    assert steering.kl == pytest.approx(kl) and steering.plan.dose.measured[0].k == (k or len(plan))
    assert not plan.dose.measured, "the plan that was given is as it was"
    assert_unchanged(model, before)
    with steering:
        assert austeer.is_steered(model)
    assert_unchanged(model, before)


def test_a_predicted_strength_is_not_measured(model, plan, monkeypatch):
    monkeypatch.setattr("austeer.steering.doses.side_effects_of", None)
    steering = steer(model, plan, kl=0.02, exact=False)
    assert steering.alpha == pytest.approx(plan.dose.alpha(0.02))
    known = plan.with_dose(plan.dose.with_measured([Point(len(plan), steering.alpha, 0.02)]))
    assert steer(model, known, kl=0.02).alpha == pytest.approx(steering.alpha), "nor one that is known"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"when": 0.5, "scope": "generation"}, "when: found 0.5"),
        ({"scope": "nowhere"}, "scope"),
        ({"mode": "x"}, "mode"),
    ],
)
def test_what_cannot_be_is_refused_before_it_is_measured(model, plan, monkeypatch, options, named):
    monkeypatch.setattr("austeer.steering.doses.side_effects_of", None)
    with pytest.raises(SteeringError, match=named):
        steer(model, plan, kl=0.02, **options)


def test_it_is_live(model, plan):
    with steer(model, plan, kl=0.02) as steering:
        strong = steering.alpha
        steering.kl = 0.005
        assert steering.alpha == pytest.approx(strong / 2, rel=0.05) and steering.kl == pytest.approx(0.005)
        with pytest.raises(PlanError, match="kl: found -1"):
            steering.kl = -1
        assert steering.kl == pytest.approx(0.005)
        steering.alpha = 0
        assert steering.kl == 0
        steering.alpha = {"attention": 1.0, "ffn": 2.0}
        assert steering.kl is None, "the dose is of one strength for all sites"


def test_plans_by_name_each_have_their_own(model, plan, made):
    other = shift_plan(model, ("ffn",), 8, seed=9)
    with steer(model, {"a": plan, "b": other}, kl={"a": 0.01, "b": 0.04}, profile=made) as steering:
        found = side_effects_of(model, IDS, steering, ["a", "b"]).mean()
        assert [kl for kl, _ in found] == pytest.approx([0.01, 0.04], rel=0.15)
        assert steering.kl == {"a": pytest.approx(0.01), "b": pytest.approx(0.04)}
        steering.kl = 0.02
        kls = steering.kl if isinstance(steering.kl, dict) else dict.fromkeys("ab", steering.kl)
        assert kls == pytest.approx({"a": 0.02, "b": 0.02})
        assert steering.alpha["a"] != steering.alpha["b"]
    with pytest.raises(SteeringError, match=r"kl: found plans \['a'\]"):
        steer(model, {"a": plan, "b": other}, kl={"a": 0.01}, profile=made)


def test_far_from_the_prediction_is_told_with_what_was_measured(model, plan):
    wrong = plan.with_dose(replace(plan.dose, kl=tuple(kl / 100 for kl in plan.dose.kl)))
    with pytest.warns(SteeringWarning, match=r"predicted for 0.02 nats.* were measured"):
        steering = steer(model, wrong, kl=0.02)
    assert kl_of(model, plan, steering.alpha) == pytest.approx(0.02, rel=0.4)


def test_what_cannot_be_is_refused_before_anything_changes(model, plan, made):
    before, bare = snapshot(model), plan.with_dose(None)
    for options, error, message in (
        ({"plan": bare}, SteeringError, r"without a dose.*profile"),
        ({"plan": bare.with_operation("scale"), "profile": made}, SteeringError, r"'scale'.*'shift'"),
        ({"plan": plan, "alpha": 1.0}, SteeringError, "both alpha"),
        ({"plan": plan, "kl": 0.0}, PlanError, "kl: found 0.0"),
        ({"plan": plan, "kl": True}, PlanError, "kl: found True"),
        ({"plan": plan.with_dose(replace(plan.dose, ids=()))}, SteeringError, r"exact=False"),
        ({"plan": plan.with_dose(Dose(kl=(0.0,) * len(plan), ids=IDS))}, PlanError, "changes nothing"),
    ):
        with pytest.raises(error, match=message):
            steer(model, **{"kl": 0.02, **options})
    steered = steer(model, bare)
    with steered:
        assert steered.kl is None
        with pytest.raises(SteeringError, match="without a dose"):
            steered.kl = 0.1
    assert_unchanged(model, before)


def test_a_profile_measures_what_has_no_text_of_its_own(model, plan, made):
    steering = steer(model, plan.with_dose(None), kl=0.02, profile=made)
    assert kl_of(model, plan, steering.alpha) == pytest.approx(0.02, rel=0.15)


def test_a_model_whose_numbers_break_is_refused():
    model = tiny_model()
    plan = shift_plan(model, ("ffn",), 4, seed=1)
    plan = plan.with_dose(Dose(kl=tuple(0.01 * (i + 1) for i in range(len(plan))), ids=IDS))
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(SteeringError, match=r"KL of nan.*bfloat16 or float32"):
        steer(model, plan, kl=0.1)
