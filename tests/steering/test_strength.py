"""alpha and k in every form that a user may give them, and nothing changed by what is refused."""

import pytest

from austeer import PlanError, SteeringError
from austeer.steering.strength import Strength
from dense_formula import random_plan


@pytest.fixture
def two(tiny):
    return {"a": random_plan(tiny, ("ffn", "attention"), 4), "b": random_plan(tiny, "ffn", 5, seed=1)}


def test_one_number_for_all_and_one_for_each(two):
    levels = Strength(two, named=True)
    levels.set_alpha(2)
    levels.set_k(None)
    assert levels.alpha() == 2.0 and levels.k() == {"a": 8, "b": 5}
    assert levels.of("ffn") == [(2.0, 8), (2.0, 5)]
    levels.set_alpha({"a": {"ffn": 1, "attention": 3}, "b": -2})
    levels.set_k({"a": 3, "b": 2})
    assert levels.of("attention") == [(3.0, 3), (0.0, 2)]  # b has nothing there
    assert levels.alpha() == {"a": {"ffn": 1.0, "attention": 3.0}, "b": -2.0} and levels.k() == {"a": 3, "b": 2}
    levels.set_k(4)
    assert levels.k() == 4


def test_a_plan_without_a_name_takes_its_sites(two):
    levels = Strength({"": two["a"]}, named=False)
    levels.set_alpha({"ffn": 1, "attention": 3})
    assert levels.alpha() == {"ffn": 1.0, "attention": 3.0}
    levels.set_alpha({"ffn": 3, "attention": 3})
    assert levels.alpha() == 3.0


@pytest.mark.parametrize(
    ("method", "value", "error", "message"),
    [
        ("set_alpha", {"a": 1}, SteeringError, r"alpha: .*\['a'\].*\['a', 'b'\]"),
        ("set_alpha", {"ffn": 1}, SteeringError, r"alpha: .*plans.*\['ffn'\]"),
        ("set_alpha", {"a": {"ffn": 1}, "b": 1}, SteeringError, r"alpha: .*sites.*\['ffn'\]"),
        ("set_alpha", {"a": {1: 2, "ffn": 1}, "b": 1}, SteeringError, r"alpha: .*sites.*\['1', 'ffn'\]"),
        ("set_alpha", {"a": float("nan"), "b": 1}, SteeringError, "alpha: .*nan"),
        ("set_k", 6, PlanError, "k: .*6.*1 to 5.*'b'"),
        ("set_k", {"a": 1, "c": 1}, SteeringError, r"k: .*\['a', 'c'\]"),
    ],
)
def test_what_is_refused_changes_nothing(two, method, value, error, message):
    levels = Strength(two, named=True)
    levels.set_alpha(1.5)
    levels.set_k(2)
    with pytest.raises(error, match=message):
        getattr(levels, method)(value)
    assert levels.of("ffn") == [(1.5, 2), (1.5, 2)]
