"""The causal check: equal to hooks by hand, resumable, and plain about what it cannot do."""

from dataclasses import replace

import pytest
import torch

import austeer
from austeer import FileFormatError, PlanError, SelectionError
from austeer.causal import WAYS, causal_check, check, runner
from austeer.demo.demo import load_data
from austeer.errors import TaskError
from austeer.models.sites import find_sites
from austeer.tasks import Item, Task
from baseline_material import reference_activations
from causal_checks import FEW, HELD_OUT, MEASURED, Stopped, checked
from naive_scores import naive_log_odds


@pytest.mark.parametrize("site", ["attention", "layer"])
def test_effects_equal_hooks_by_hand(model, demo, momentum, site):
    result = checked(model, demo, momentum, site=site)
    pairs = load_data().held_out[:5]
    texts = torch.cat(reference_activations(model, demo[1], pairs, site))  # [texts, layers, width]
    deviation, size = texts.std(0, correction=0), texts.abs().mean(0)
    places = find_sites(model, [site])[site]
    delta = momentum.counters(site).delta_sum / momentum.pairs

    def log_odds(unit, change):
        def steer(x):
            x = x.clone()
            x[..., unit.index] = change(x[..., unit.index])
            return x

        module = model.get_submodule(places[unit.layer].path)
        if places[unit.layer].side == "input":
            handle = module.register_forward_pre_hook(lambda m, args: (steer(args[0]),))
        else:
            handle = module.register_forward_hook(
                lambda m, args, out: (steer(out[0]), *out[1:]) if isinstance(out, tuple) else steer(out)
            )
        with handle:
            return float(naive_log_odds(model, demo[1], pairs).mean())

    assert len(result.units) >= 9
    for unit in result.units[::3]:
        here = (unit.layer, unit.index)
        assert unit.deviation == pytest.approx(float(deviation[here]), rel=1e-4)
        assert unit.size == pytest.approx(float(size[here]), rel=1e-4)
        assert unit.delta == pytest.approx(float(delta[here]))
        step, spread = abs(unit.delta), unit.deviation
        for way, raise_, lower in (
            ("scale", lambda x: 2 * x, lambda x: 0 * x),
            ("shift", lambda x, s=step: x + s, lambda x, s=step: x - s),
            ("deviation", lambda x, s=spread: x + s, lambda x, s=spread: x - s),
        ):
            expected = (log_odds(unit, raise_) - log_odds(unit, lower)) / 2
            assert unit.raised[way] == pytest.approx(expected, rel=1e-2, abs=2e-5), (way, unit)
    assert result.log_odds == pytest.approx(float(naive_log_odds(model, demo[1], pairs).mean()), abs=1e-4)


def test_groups_and_findings_belong_together(model, demo, momentum):
    result = checked(model, demo, momentum)
    top = [unit for unit in result.units if "top" in unit.groups]
    by_place = {(unit.layer, unit.index): unit for unit in result.units}
    assert {("attention", u.layer, u.index) for u in top} == set(momentum.select("attention", k=3).keys())
    matched = [by_place[unit.match] for unit in top]
    assert all("matched" in unit.groups and unit.layer == own.layer for unit, own in zip(matched, top))
    assert sum("spread" in unit.groups for unit in result.units) == 6
    for way in WAYS:
        found = result.findings[way]
        assert found.size.top == pytest.approx(sum(abs(u.raised[way]) for u in top) / 3)
        assert found.size.matched == pytest.approx(sum(abs(u.raised[way]) for u in matched) / 3)
        signs = [1 if (u.delta if way == "shift" else u.beta) >= 0 else -1 for u in top]
        wanted = sum(s * u.raised[way] for s, u in zip(signs, top)) / 3
        assert found.wanted.top == pytest.approx(wanted) == pytest.approx(sum(u.wanted(way) for u in top) / 3)
        assert len(result.verdict[way]) == 4


def test_on_the_real_model_the_top_aus_act_as_momentum_says(demo, demo_momentum):
    task = Task.of_pairs(load_data().held_out[:4])
    result = causal_check(*demo, task, demo_momentum, "attention", n=4, sample=4, ways=["shift"], progress=False)
    found = result.findings["shift"].wanted
    assert found.top > 0.01 > abs(found.matched) and found.low > 0
    assert result.verdict["shift"][1] == "top AUs act in the wanted direction more than matched random AUs"


# --- resuming --------------------------------------------------------------------------------------------------------


def same(result, other):
    return (result.units, result.findings, result.verdict) == (other.units, other.findings, other.verdict)


def test_an_interrupted_check_goes_on(model, demo, momentum, counted, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "PLANS_AT_ONCE", 12)  # two AUs at a time
    whole = checked(model, demo, momentum)
    total, calls = counted["names"], counted["calls"]
    assert total == 6 * len(whole.units) and calls > 3
    counted |= {"names": 0, "calls": 0, "stop": 2}
    record = tmp_path / "new" / "record.jsonl"
    with pytest.raises(Stopped):
        checked(model, demo, momentum, record=record)
    with record.open("a") as file:
        file.write('{"key": "scale 0 1", "val')  # a line that was being written
    counted["stop"] = None
    again = checked(model, demo, momentum, record=record)
    assert same(again, whole) and counted["names"] == total
    counted["names"] = 0
    assert same(checked(model, demo, momentum, record=record), whole) and counted["names"] == 0


def test_more_aus_and_ways_go_on_from_fewer(model, demo, momentum, counted, tmp_path):
    record = tmp_path / "record.jsonl"
    small = checked(model, demo, momentum, record=record, ways=["shift"])
    before, counted["names"] = counted["names"], 0
    large = checked(model, demo, momentum, record=record, n=6)
    known = {(unit.layer, unit.index): unit.raised["shift"] for unit in small.units}
    again = [unit for unit in large.units if (unit.layer, unit.index) in known]
    assert len(again) >= 6 and counted["names"] == 6 * len(large.units) - 2 * len(again)
    for unit in again:
        assert unit.raised["shift"] == known[unit.layer, unit.index]
    fresh = checked(model, demo, momentum, n=6)
    # rows of other batches differ by rounding
    for unit, other in zip(large.units, fresh.units):
        assert (unit.layer, unit.index) == (other.layer, other.index)
        assert unit.raised == pytest.approx(other.raised, abs=1e-5)
    assert before == 2 * len(small.units) > 0


@pytest.mark.parametrize("what", ["task", "momentum", "weights", "site"])
def test_another_check_is_refused(model, demo, momentum, tmp_path, tiny_of, what):
    record = tmp_path / "record.jsonl"
    checked(model, demo, momentum, record=record, ways=["shift"])
    before = record.read_bytes()
    task, other, network, site = HELD_OUT, momentum, model, "attention"
    if what == "task":
        task = HELD_OUT[:4]
    elif what == "momentum":
        other = austeer.measure(model, demo[1], MEASURED[:8], ["attention"], progress=False)
    elif what == "weights":
        network = tiny_of("llama")
        with torch.no_grad():
            network.model.layers[0].mlp.down_proj.weight[0, 0] += 1
    else:
        site = "ffn"
    with pytest.raises(FileFormatError, match=f"record.jsonl.*found {what}"):
        causal_check(network, demo[1], task, other, site, **FEW, record=record)
    assert record.read_bytes() == before


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"ways": ["knock"]}, r"ways.*'knock'.*scale, shift, deviation"),
        ({"ways": []}, r"ways.*\[\]"),
        ({"n": 1000}, r"n: .*1000.* 72"),
        ({"sample": 145}, "sample.*145.* 144"),
        ({"site": "neuron"}, "site 'neuron'"),
        ({"groups": 9}, r"groups: .*9.* AUs of 'attention'"),
        ({"groups": -1}, r"groups: .*-1"),
        ({"alphas": [1, -2]}, r"alphas: .*-2.0"),
        ({"alphas": []}, r"alphas: .*\[\]"),
    ],
)
def test_complaints(model, demo, with_effects, tmp_path, changes, message):
    record = tmp_path / "record.jsonl"
    with pytest.raises(SelectionError, match=message):
        checked(model, demo, with_effects, record=record, **changes)
    assert not record.exists()


def test_a_numeric_task_and_another_model_are_refused(model, demo, momentum, tiny_of):
    numeric = Task("sums", "numeric", (Item("1 + 1 =", (), 0, 2.0),))
    with pytest.raises(TaskError, match=r"sums.*numeric"):
        causal_check(model, demo[1], numeric, momentum, "attention", **FEW)
    with pytest.raises(PlanError, match=r"3.*2"):
        causal_check(tiny_of("llama", num_hidden_layers=2), demo[1], HELD_OUT, momentum, "attention", **FEW)


def test_notes_say_what_weakens_the_check(model, momentum, with_effects, tiny_of):
    (note,) = check.notes(model, HELD_OUT, replace(momentum, sources=("elsewhere",)))
    assert "effects=True" in note
    momentum = with_effects
    assert check.notes(model, HELD_OUT, replace(momentum, sources=("elsewhere",))) == []
    note, *_ = check.notes(model, HELD_OUT, replace(momentum, sources=(HELD_OUT.source,)))
    assert HELD_OUT.source in note
    (note,) = check.notes(model, HELD_OUT, replace(momentum, sources=(), chat_template=True))
    assert "chat template" in note
    (note,) = check.notes(tiny_of("llama").bfloat16(), HELD_OUT, replace(momentum, sources=()))
    assert "bfloat16" in note and "float32" in note


def test_log_odds_that_are_no_number(tiny_of, demo, momentum):
    broken = tiny_of("llama")
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(TaskError, match="log-odds"):
        checked(broken, demo, momentum)
