"""The study's tables of the causal check."""

import json
from dataclasses import asdict

from austeer.causal import Agreement, Correlation, Difference, Findings, Strength, Together
from bench.published import causal as tables

SIZE, RHO = Difference(0.0123, 0.001, 0.0113, 0.002, 0.02, 0.01), Correlation(0.25, -0.5, 0.75)
ROW = ["sentiment", "shifted by the mean difference", "+0.012", "+0.001", "+0.011 [+0.002, +0.020]"]


def test_a_result_with_effects():
    spread = Agreement(45, RHO, RHO)
    mixed = Agreement(75, RHO, RHO, Correlation(0.9, 0.8, 0.95), (0.65, 0.1, 1.2), (0.75, 0.5, 1.0))
    ways = {
        "scale": Findings(SIZE, SIZE, (0.5, 0.4, 0.6), RHO, RHO, spread, spread),
        "shift": Findings(SIZE, SIZE, (0.5, 0.4, 0.6), RHO, RHO, spread, mixed),
        "deviation": Findings(SIZE, SIZE, (0.5, 0.4, 0.6), RHO, RHO, spread, None),
    }
    strength = Strength(16.0, (0.91, 0.8, 0.96), (0.4, 0.3, 0.5), {"random": (0.1, 0.1)}, {})
    causal = {"findings": {w: asdict(f) for w, f in ways.items()}, "together": asdict(Together([], [strength]))}
    tasks = {"boolq": {}, "sentiment": json.loads(json.dumps({"causal": causal}))}
    assert [*tables.causal(tasks)][1] == [*ROW, "+0.25 [-0.50, +0.75]"]
    rhos = ["+0.25 [-0.50, +0.75]", "+0.25 [-0.50, +0.75]", "+0.90 [+0.80, +0.95]"]
    assert [*tables.predicted(tasks)] == [[*ROW[:2], *rhos, "+0.75 [+0.50, +1.00]"]]
    row = ["sentiment", "16 mean differences", "+0.91 [+0.80, +0.96]", "+0.40 [+0.30, +0.50]"]
    assert [*tables.together(tasks)] == [row]
    tasks["sentiment"]["causal"]["together"] = None
    assert [*tables.together(tasks)] == []
