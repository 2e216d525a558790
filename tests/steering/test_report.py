"""The report: AUs with their strengths and shares, as they are at the time."""

import pytest

import austeer
from dense_formula import logits, random_plan


def test_strengths_and_shares_of_each_au(tiny, tiny_ids):
    a, b = random_plan(tiny, ("ffn", "attention"), 6), random_plan(tiny, "ffn", 5, "shift", seed=1)
    with austeer.steer(tiny, {"a": a, "b": b}, {"a": 2.0, "b": -3.0}, k={"a": 9, "b": 5}) as steering:
        with steering.rows(["a", "b"]):
            logits(tiny, tiny_ids)
        report = steering.report()
    units = {"a": {}, "b": {}}
    for site in report:
        assert site.calls == 1 and site.tokens == 14 and not site.compiled and site.path == "columns"
        assert site.aus == len({unit.index for unit in site.units})
        for unit in site.units:
            units[unit.plan][site.site, site.layer, unit.index] = unit
    assert units["a"].keys() == set(a.keys()) and units["b"].keys() == set(b.keys())
    for rank, key in enumerate(a.keys()):
        assert units["a"][key].strength == pytest.approx(2.0 * float(a.beta[rank]) if rank < 9 else 0.0)
    for rank, key in enumerate(b.keys()):
        assert units["b"][key].strength == pytest.approx(-3.0 * float(b.delta[rank]))
    for name in units:
        assert sum(unit.share for unit in units[name].values()) == pytest.approx(1)
        total = sum(abs(unit.strength) for unit in units[name].values())
        assert all(u.share == pytest.approx(abs(u.strength) / total) for u in units[name].values())
    assert sum(site.share for site in report) == pytest.approx(1)


def test_alpha_zero_has_no_shares(tiny):
    report = austeer.steer(tiny, random_plan(tiny, "ffn", 6), 0.0).report()
    assert {unit.share for site in report for unit in site.units} == {0.0}
    assert "0.0%" in str(report)
