"""The study's tables of the causal check, from results with and without effects."""

import json
from dataclasses import asdict

import pytest

from austeer.causal import Agreement, Correlation, Difference, Findings, Strength, Together
from bench.files import ROOT
from bench.published import study
from bench.published.load import load


@pytest.fixture
def result():
    (found,) = (r for r in load(ROOT / "bench" / "results") if r.kind == "study")
    return found


def test_a_result_without_effects(result):
    named = dict(study.values(result))
    assert named["causal"].count("\n") == 1 + 6  # two tasks, each AU alone in three ways
    assert named["causal.predicted"].count("\n") == named["causal.together"].count("\n") == 1


def test_a_result_with_effects(result):
    size, rho = Difference(0.0123, 0.001, 0.0113, 0.002, 0.02, 0.01), Correlation(0.25, -0.5, 0.75)
    spread = Agreement(45, rho, rho)
    mixed = Agreement(75, rho, rho, Correlation(0.9, 0.8, 0.95), (0.65, 0.1, 1.2), (0.75, 0.5, 1.0))
    ways = {
        "scale": Findings(size, size, (0.5, 0.4, 0.6), rho, rho, spread, spread),
        "shift": Findings(size, size, (0.5, 0.4, 0.6), rho, rho, spread, mixed),
    }
    strength = Strength(16.0, (0.91, 0.8, 0.96), (0.4, 0.3, 0.5), {"random": (0.1, 0.1)}, {})
    causal = {"findings": {w: asdict(f) for w, f in ways.items()}, "together": asdict(Together([], [strength]))}
    result.content["tasks"]["sentiment"]["causal"] = json.loads(json.dumps(causal))
    named = dict(study.values(result))
    assert "| +0.011 [+0.002, +0.020] | +0.25 [-0.50, +0.75] |" in named["causal"]
    assert named["causal.predicted"].splitlines()[2:] == [
        "| sentiment | shifted by the mean difference | +0.25 [-0.50, +0.75] | +0.25 [-0.50, +0.75] "
        "| +0.90 [+0.80, +0.95] | +0.75 [+0.50, +1.00] |"
    ]
    assert named["causal.together"].splitlines()[2:] == [
        "| sentiment | 16 mean differences | +0.91 [+0.80, +0.96] | +0.40 [+0.30, +0.50] |"
    ]
