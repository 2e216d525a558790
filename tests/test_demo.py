"""The demonstration, whole, on a tiny random model: what it writes is what it says."""

import json
from dataclasses import replace

import pytest

import austeer
from austeer import demo as demonstration
from austeer.figures import draw_demo
from austeer.steering import is_steered
from austeer.tasks import log_odds
from austeer.tune import best


@pytest.fixture
def done(tiny, demo, tmp_path, monkeypatch):
    monkeypatch.setattr(demonstration, "KS", (3, 5))
    monkeypatch.setattr(demonstration, "TIMED_K", 5)
    said = []
    return tiny, *demonstration.run(tiny, demo[1], tmp_path, say=said.append), said, tmp_path


def test_the_demo_is_consistent_with_what_it_writes(done, demo):
    tiny, result, momentum, plan, said, out = done
    assert austeer.Plan.from_pretrained(out / "plan") == plan
    assert austeer.Momentum.load(out / "momentum.safetensors").pairs == momentum.pairs == result.pairs["momentum"]
    assert not is_steered(tiny)

    # chosen on the selection part, within the limit on the side effect
    assert result.chosen == best(result.trials) and result.chosen.plan(momentum) == replace(plan, evidence=None)
    assert plan.evidence.alpha == result.chosen.alpha and plan.evidence.tested[-1].effect == result.held_out[0].effect
    assert plan.evidence.overhead[0].percent == 100 * (
        result.timings[f"auto, {plan.operation}, k={len(plan)}"].ratio - 1
    )
    assert all(trial.side_effect <= demonstration.MAX_SIDE_EFFECT for trial in result.trials)
    assert {t.operation for t in result.trials} == {"scale", "push", "shift"}

    # the paper's operation and random AUs stand beside the chosen one
    names = [row.name for row in result.held_out]
    assert any("paper" in name for name in names) and any(name.startswith("random") for name in names)
    assert all(row.low <= row.effect <= row.high for row in result.held_out)

    # the chosen row is what scoring the plan on the held-out pairs gives
    data = demonstration.load_data()
    base = log_odds(tiny, demo[1], data.held_out)
    with austeer.steer(tiny, plan, result.chosen.alpha):
        change = log_odds(tiny, demo[1], data.held_out) - base
    row = next(r for r in result.held_out if r.name.startswith(result.chosen.operation) and "random" not in r.name)
    assert row.effect == pytest.approx(float(change.mean()), rel=1e-6, abs=1e-9)

    assert list(result.timings)[:2] == ["unsteered", "unsteered again"] and len(result.timings) == 7
    assert all(timing.seconds > 0 for timing in result.timings.values())
    assert set(map(len, result.generations.values())) == {len(demonstration.PROMPTS)}
    assert json.loads(json.dumps(result.to_json()))["chosen"]["k"] == len(plan)
    assert any("momentum" in line for line in said) and any("chosen" in line for line in said)

    draw_demo(result, out / "demo.png")
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_momentum_and_tuning_and_held_out_pairs_are_disjoint():
    data = demonstration.load_data()
    parts = [set(part) for part in (data.momentum, data.tuning, data.held_out)]
    assert not parts[0] & parts[1] and not parts[2] & (parts[0] | parts[1])
    assert not set(data.neutral_selection) & set(data.neutral_held_out)
    assert len(data.momentum) + len(data.tuning) >= 200
