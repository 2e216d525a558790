"""Plans with a replay, for the tests of verifying."""

import pytest

import austeer
from dense_formula import random_plan
from hypotheses import ALPHA


@pytest.fixture(scope="module")
def plan(one_lively, demo):
    """A plan of all layers of the tiny model, with a replay."""
    return austeer.record_replay(one_lively, demo[1], random_plan(one_lively, "attention", 20, "shift"), ALPHA)
