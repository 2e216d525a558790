"""The whole measurement on a tiny model: what a result holds, what gets no time, and when nothing may be said."""

import json
from functools import partial

import pytest
import torch

from austeer.costs.ceilings import Ceilings
from austeer.errors import AusteerError
from bench import catalogue, files, inference, steps, turns
from bench.catalogue import AGAIN, UNSTEERED
from bench.gate import Gate
from bench.inference import Effort, Job, measure, run, sweep
from bench.lineup import Case, prompts
from bench.plain_ways import Formula
from bench.steered import UnavailableError, Way
from tiny_models import tiny_model

SMALL, COMPILED = Case(k=30, prompt_tokens=6), Case("compile", 2, k=30, prompt_tokens=6)
EFFORT = Effort(seconds=0, least=2, most=2, tokens=3)
LIMITS = Ceilings(bandwidth=1e10, flops=1e11, launch=1e-6, source="made up")


def absent(model, plan, alpha):
    raise UnavailableError("absent: found no module 'absent'; install it with: pip install absent")


class Crooked(Formula):
    """Half the strength; counts its generations."""

    generations = 0

    def __init__(self, model, plan, alpha):
        super().__init__(model, plan, alpha / 2)

    def generate(self, ids, **options):
        Crooked.generations += 1
        return super().generate(ids, **options)


def ways(*names):
    return catalogue.chosen(names) | {
        "crooked": Way("crooked", Crooked),
        "absent": Way("absent", absent, peer=True),
        "whole": Way("whole", Formula, peer=True, module=False),
    }


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def contents(model):
    """What a run of three cases gave, case by case."""
    cases, series = sweep(SMALL, k=(30, 60), batch=(1, 2))
    everything = ways("public", "columns", "fold")
    longer = Effort(seconds=0, least=3, most=3, tokens=3)
    jobs = [Job(case, everything, effort) for case, effort in zip(cases, (EFFORT, EFFORT, longer))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "ceilings", lambda device, dtype: LIMITS)
        found = run(model, "tiny", jobs, series, commit="c0ffee")
        return [json.loads(files.dumps(content)) for content in found]


def test_a_sweep_changes_one_field_at_a_time():
    cases, series = sweep(Case(), k=(1, 100, 1000), batch=(1, 8, 8), site=("ffn",), execution=("eager", "compile"))
    assert cases[0] == Case() and len(cases) == len(set(cases)) == 5
    numbers = {name: [cases.index(case) for case in own] for name, own in series.items()}
    assert numbers == {"main": [0], "k": [1, 0, 2], "batch": [0, 3], "execution": [0, 4]}
    assert [case.k for case in cases] == [100, 1, 1000, 100, 100]
    assert str(cases[4]) == "compile, batch 1, ffn, scale, k=100, prompt of 32 tokens"
    assert "3 layers" in str(Case(layers=3))


def test_a_result_says_what_was_measured_on_what(contents, model):
    content = contents[-1]
    assert (content["kind"], content["schema"]) == ("inference", 1)
    assert [one["complete"] for one in contents] == [False, False, True]
    assert [len(one["cases"]) for one in contents] == [1, 2, 3]
    assert content["series"] == {"main": [0], "k": [0, 1], "batch": [0, 2]}
    assert content["environment"]["commit"] == "c0ffee" and content["environment"]["packages"]["torch"]
    parameters = sum(p.numel() for p in model.parameters())
    assert content["model"] == {"name": "tiny", "layers": 3, "width": 32, "parameters": parameters, "dtype": "float32"}
    assert content["settings"]["turns"] == "tokens" and content["settings"]["tokens"] == 3
    assert content["settings"]["level"] == 0.95
    assert [(case["k"], case["batch"], case["layers"]) for case in content["cases"]] == [
        (30, 1, 3),
        (60, 1, 3),
        (30, 2, 3),
    ]


def test_every_variant_has_times_with_intervals_and_counts(contents):
    for case in contents[-1]["cases"]:
        rows = case["variants"]
        assert list(rows)[:2] == [UNSTEERED, AGAIN]
        assert set(case["noise"]) == set(case["verdicts_possible"]) == {"first_token", "token"}
        for name in (UNSTEERED, AGAIN, "public", "columns", "fold", "whole"):
            row = rows[name]
            assert row["status"] == "measured" and not row["reason"]
            generations = 3 if case["batch"] == 2 else 2  # as the run was told
            for what, count in (("first_token", generations), ("token", 2 * generations)):
                seconds, ratio = row[what]["seconds"], row[what]["ratio"]
                assert 0 < seconds["low"] <= seconds["median"] <= seconds["high"] and seconds["rounds"] == count
                assert ratio["low"] <= ratio["median"] <= ratio["high"] and ratio["count"] == count
            assert row["tokens_a_second"] == pytest.approx(case["batch"] / row["token"]["seconds"]["median"], rel=1e-4)
            assert ("verdict" in row) == ("error" in row) == (name not in (UNSTEERED, AGAIN))
        assert {rows[UNSTEERED]["token"]["ratio"][key] for key in ("median", "low", "high")} == {1.0}
        for name in ("public", "columns", "fold", "whole"):
            assert rows[name]["error"] <= rows[name]["allowed"] and rows[name]["effect"] > 0
        assert rows["public"]["launches"] == rows[UNSTEERED]["launches"] + 9
        assert rows["fold"]["launches"] == rows[UNSTEERED]["launches"] and rows["whole"]["launches"] is None
        assert [name for name, row in rows.items() if row["ours"]] == ["columns", "fold"]
        assert [name for name, row in rows.items() if row["peer"]] == ["absent", "whole"]


def test_what_is_predicted_is_what_was_counted(contents):
    for case in contents[-1]["cases"]:
        plain = case["variants"][UNSTEERED]
        assert 0.7 * plain["bytes"] < plain["predicted"]["bytes"] < plain["bytes"]  # without norms and the like
        for name in (UNSTEERED, AGAIN, "public", "columns", "fold"):
            row = case["variants"][name]
            assert row["predicted"]["launches"] == row["launches"], name
            added = row["bytes"] - plain["bytes"], row["predicted"]["bytes"] - plain["predicted"]["bytes"]
            assert added[0] == added[1], name
            floor = max(row["bytes"] / LIMITS.bandwidth, row["operations"] / LIMITS.flops)
            assert row["floor_seconds"] == pytest.approx(floor, rel=1e-4)
        assert "floor_seconds" not in case["variants"]["whole"]


def test_memory_is_what_is_held(contents):
    for case in contents[-1]["cases"]:
        rows = case["variants"]
        saved = case["k"] * 48 * 4  # the rows
        assert saved <= rows["fold"]["held_bytes"] <= 1.5 * saved + 4096
        assert rows[UNSTEERED]["held_bytes"] == 0


def test_what_is_wrong_or_missing_is_named_and_gets_no_time(contents):
    for case in contents[-1]["cases"]:
        crooked, missing = case["variants"]["crooked"], case["variants"]["absent"]
        assert crooked["status"] == "wrong" and "differs from the formula" in crooked["reason"]
        assert crooked["error"] > crooked["allowed"]
        assert missing["status"] == "skipped" and "install it with" in missing["reason"]
        for row in (crooked, missing):
            assert not {"token", "first_token", "verdict", "tokens_a_second", "launches"} & set(row)
    assert Crooked.generations == 3, "the gate's, one a case"


def test_the_model_is_as_it_was(contents, model):
    fresh = tiny_model()
    assert all(map(torch.equal, model.parameters(), fresh.parameters()))
    assert not any(m._forward_hooks or m._forward_pre_hooks or hasattr(m, "_hf_hook") for m in model.modules())
    assert torch.is_grad_enabled()


def with_times(monkeypatch, ratios, noise=0.0, generations=20):
    """Replaces what was timed: each way takes its ratio to the unsteered model; the pair of them differs by noise."""

    def by_turns(made, prompt, tokens, go_on, on_generation):
        def times(name, seconds, count):
            wobble = [1 + noise * (-1) ** number if name == AGAIN else 1.0 for number in range(generations)]
            return [[seconds * ratios.get(name, 1.0) * w] * count for w in wobble]

        sizes = {"first_token": (0.5, 1), "token": (0.1, 2)}
        return {what: {name: times(name, *size) for name in made} for what, size in sizes.items()}

    monkeypatch.setattr(turns, "by_turns", by_turns)


def test_verdicts_are_those_of_the_intervals(model, monkeypatch):
    with_times(monkeypatch, {"public": 1.1, "columns": 1.004, "fold": 0.9}, noise=0.006)
    found = measure(model, LIMITS, Job(SMALL, ways("public", "columns", "fold"), EFFORT))
    assert found["verdicts_possible"] == {"first_token": True, "token": True}
    assert found["noise"]["token"] == pytest.approx(0.006)
    said = {name: row["verdict"]["token"] for name, row in found["variants"].items() if "verdict" in row}
    assert said == {"public": "slower", "columns": "unclear", "fold": "faster", "whole": "same"}
    assert found["variants"]["public"]["token"]["ratio"]["median"] == pytest.approx(1.1)
    assert found["variants"]["public"]["first_token"]["seconds"]["median"] == pytest.approx(0.55)
    assert found["variants"]["public"]["tokens_a_second"] == pytest.approx(1 / 0.11)


def test_noise_refuses_every_verdict(model, monkeypatch):
    with_times(monkeypatch, {"public": 2.0}, noise=0.03)
    found = measure(model, LIMITS, Job(SMALL, ways("public", "columns", "fold"), EFFORT))
    assert found["verdicts_possible"] == {"first_token": False, "token": False}
    said = {word for row in found["variants"].values() for word in row.get("verdict", {}).values()}
    assert said == {"noise"}


def test_compiled_steps_are_judged_and_timed(model, monkeypatch):
    """Everything but the compiler."""
    monkeypatch.setattr(torch, "compile", lambda call, **options: call)
    judged, real = [], Gate.judge
    monkeypatch.setattr(
        Gate, "judge", lambda gate, seen, ids: judged.append(len(seen[0].left)) or real(gate, seen, ids)
    )
    found = measure(model, LIMITS, Job(COMPILED, ways("columns"), EFFORT))
    rows = found["variants"]
    assert rows["whole"]["status"] == "skipped" and "eagerly only" in rows["whole"]["reason"]
    assert rows["crooked"]["status"] == "wrong" and "token" not in rows["crooked"]
    assert set(found["noise"]) == {"token"} and rows["columns"]["token"]["seconds"]["rounds"] == 6
    assert judged[-3:] == [3, 2, 3], "the generation and the step of columns, then the generation of crooked"
    assert "first_token" not in rows["columns"]


def test_an_unsteered_step_that_is_wrong_is_no_reference(model, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda call, **options: lambda: call() * 1.5)
    with pytest.raises(AusteerError, match="the unsteered model itself is wrong: logits of a step differ"):
        measure(model, LIMITS, Job(COMPILED, ways("columns"), EFFORT))


def test_a_step_that_is_wrong_only_when_compiled_gets_no_time(model, monkeypatch):
    factors = iter((1.0, 1.0, 1.0, 1.5))  # unsteered twice, then columns looked at, and timed
    monkeypatch.setattr(torch, "compile", lambda call, **options: partial(lambda by: by * call(), next(factors)))
    found = measure(model, LIMITS, Job(COMPILED, ways("columns"), EFFORT))
    row = found["variants"]["columns"]
    assert row["status"] == "wrong" and "logits of a step differ" in row["reason"] and "token" not in row


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"execution": "jit"}, "execution: found 'jit', expected eager, compile, graph"),
        ({"execution": "graph"}, "found a CPU, expected a GPU"),
        ({"batch": 0}, "expected a batch and a prompt of at least 1"),
        ({"prompt_tokens": 0}, "expected a batch and a prompt of at least 1"),
        ({"prompt_tokens": 128 - steps.ROOM + 1}, f"found 97 tokens and {steps.ROOM} after them, expected at most 128"),
        ({"k": 97}, "k: found 97, expected an integer from 1 to 96"),
        ({"site": "mlp"}, "mlp"),
    ],
)
def test_a_case_that_cannot_be_is_refused_before_any_work(model, changes, message):
    worked = []
    jobs = [Job(case, ways(), EFFORT) for case in (SMALL, Case(**{**vars(SMALL), **changes}))]
    with pytest.raises(AusteerError, match=message):
        for _ in run(model, "tiny", jobs, {}, tell=lambda turns, text: worked.append(text)):
            worked.append("measured")
    assert not worked


def test_a_way_that_fails_costs_only_itself(model):
    closed = []

    class Closing(Formula):
        def close(self):
            closed.append(1)

    def broken(model, plan, alpha):
        raise ArithmeticError("too much")

    own = ways("fold") | {"closing": Way("closing", Closing), "broken": Way("broken", broken)}
    rows = measure(model, LIMITS, Job(SMALL, own, EFFORT))["variants"]
    assert (rows["broken"]["status"], rows["broken"]["reason"]) == ("failed", "ArithmeticError: too much")
    assert "token" in rows["closing"] and "token" not in rows["broken"] and closed == [1]
    assert all(map(torch.equal, model.parameters(), tiny_model().parameters()))


def test_counting_can_be_left_out(model, monkeypatch):
    with_times(monkeypatch, {})
    found = measure(model, LIMITS, Job(SMALL, ways("fold"), Effort(counts=False)))
    for name in (UNSTEERED, "fold"):
        row = found["variants"][name]
        assert row["launches"] is row["bytes"] is None and "predicted" not in row and row["token"]


def test_what_cannot_be_counted_costs_no_times(model, monkeypatch):
    def fails(steered, ids):
        raise AssertionError("shapes are incompatible")

    with_times(monkeypatch, {})
    monkeypatch.setattr(inference.counted_ops, "of_step", fails)
    rows = measure(model, LIMITS, Job(SMALL, ways("fold"), EFFORT))["variants"]
    for name in (UNSTEERED, "fold"):
        assert rows[name]["status"] == "measured" and rows[name]["token"] and rows[name]["launches"] is None
        assert rows[name]["not_counted"] == "AssertionError: shapes are incompatible"


@pytest.mark.parametrize("operation", ["push", "shift"])
def test_a_case_of_another_operation(model, monkeypatch, operation):
    with_times(monkeypatch, {})
    case = Case(k=30, prompt_tokens=6, operation=operation)
    found = measure(model, LIMITS, Job(case, ways("public", "dense hook", "sparse hook", "auto"), EFFORT))
    assert found["operation"] == operation and Case.of(found) == Case(
        k=30, prompt_tokens=6, operation=operation, layers=3
    )
    for name in ("public", "dense hook", "sparse hook", "auto"):
        assert found["variants"][name]["status"] == "measured"


def test_effort_lasts_until_its_time_is_over(monkeypatch):
    now = iter([0.0, 1.0, 2.0, 10.5])
    monkeypatch.setattr(inference.time, "perf_counter", lambda: next(now))
    go_on = Effort(seconds=10, least=2, most=100).clock()
    assert [go_on(done) for done in (0, 1, 2, 3)] == [True, True, True, False]
    monkeypatch.setattr(inference.time, "perf_counter", lambda: 5.0)
    go_on = Effort(seconds=1e9, least=2, most=3).clock()
    assert [go_on(done) for done in (2, 3)] == [True, False]


def test_the_same_prompt_each_time(model):
    prompt = prompts(model, 3, 9)
    assert prompt(4).shape == (3, 9) and torch.equal(prompt(4), prompts(model, 3, 9)(4))
    assert not torch.equal(prompt(4), prompt(5)) and prompt(4).min() >= 8 and prompt(4).max() < 64


def test_unknown_ways_are_refused_by_name():
    with pytest.raises(AusteerError, match="variants: found 'collumns', expected of: unsteered, "):
        catalogue.chosen(["collumns"])
    assert list(catalogue.chosen(["fold"])) == [UNSTEERED, AGAIN, "fold"]
    assert list(catalogue.chosen([])) == [UNSTEERED, AGAIN]
    assert list(catalogue.chosen()) == list(catalogue.WAYS)


@pytest.mark.parametrize("site, all_of", [("ffn", 96), ("attention", 144), ("neuron", 144), ("layer", 96)])
def test_all_aus_of_a_site(model, site, all_of):
    assert inference.touched_most(model, site) == all_of
