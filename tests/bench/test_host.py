"""The host-time benchmark: every variant steers as it says, differences are per site, and noise is no verdict."""

import json

import pytest
import torch

from bench import host, report

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return host.build_model(2, CPU, torch.float32)


@pytest.fixture(autouse=True)
def loud():
    yield
    report.quiet = False


def test_every_layer_has_the_same_number_of_aus(model):
    plan = host.build_plan(model, "push")
    assert plan.layer.tolist() == sorted([0, 1] * host.AUS_A_LAYER)
    assert len(set(zip(plan.layer.tolist(), plan.index.tolist()))) == len(plan)


def test_each_variant_takes_the_path_it_is_for_and_changes_the_logits(model):
    ids = torch.randint(3, 64, (4, host.PROMPT), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def decoded():
        cache = model(ids, use_cache=True).past_key_values
        return model(ids[:, :1], past_key_values=cache, use_cache=True).logits

    plain, taken = decoded(), {}
    for name, variant in host.variants(model).items():
        steering = variant.steering(model, 4).attach()
        changed = not torch.equal(decoded(), plain)
        taken[name] = {row.path for row in steering.report()}
        tokens = steering.report()[0].tokens
        steering.detach()
        if name == "generation, out of scope":  # its decoded token is prompt, as it was told
            assert not changed and tokens == 0
        else:
            assert changed, name
        if name == "generation, in scope":
            assert tokens == 4
        if variant.rows:
            assert tokens == 3 * (host.PROMPT + 1)
    assert torch.equal(decoded(), plain)
    assert taken.pop("scale") == {"fold"}
    assert taken.pop("scale, fused") == {"fused"} and taken.pop("scale, dense") == {"dense"}
    assert set(map(frozenset, taken.values())) == {frozenset({"columns"})}


def test_one_site_by_itself_is_steered_while_it_is_timed(model, monkeypatch):
    prompt, results = torch.randint(3, 64, (4, host.PROMPT)), []

    def called(module, x, calls):
        results.append(module(x))
        return float(len(results))

    monkeypatch.setattr(host, "_calls", called)
    steering = host.variants(model)["rows of three plans"].steering(model, 4)
    assert host.one_site(model, steering, prompt, 3) == [-1e6, 1e6, -1e6]  # the order changes, the sign does not
    for first, second in zip(results[::2], results[1::2]):
        differs = [not torch.equal(a, b) for a, b in zip(first, second)]
        assert differs == [True, False, True, True]  # the second row has no plan
    before = host.one_site(model, None, prompt, 2)
    assert len(before) == 2 and torch.equal(results[-1], results[-2])


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    threads = torch.get_num_threads()
    arguments = ["--out", str(tmp_path), "--layers", "2", "--rounds", "2", "--steps", "1", "--batch", "1"]
    try:
        assert host.main(arguments) == 0
        printed = capsys.readouterr().out
        assert host.main([*arguments, "--json"]) == 0
    finally:
        torch.set_num_threads(threads)
    content = json.loads(capsys.readouterr().out)
    assert "a site that auto steers costs below 10 us (median)" in printed
    assert len(list((tmp_path / "cpu").glob("host-*.json"))) == 2
    (batch,) = content["batches"]
    assert set(batch["variants"]) == {host.AGAIN, *host.variants(host.build_model(1, CPU, torch.float32))}
    for row in batch["variants"].values():
        for key in ("us_a_site", "us_by_itself"):
            us = row[key]
            assert us["low"] <= us["median"] <= us["high"] and us["rounds"] == 2
    assert {goal["case"].split(" (")[0] for goal in content["goals"]} == {
        name for name, variant in host.variants(host.build_model(1, CPU, torch.float32)).items() if variant.goal
    }
    assert content["environment"]["threads"] == 1


def test_times_are_differences_over_sites(model, monkeypatch):
    """With a made-up clock: steered runs take 2 us more on each of the two sites."""

    def decode(model, prompt, steps):
        return 100e-6 + (4e-6 if any(hasattr(m, "_hf_hook") for m in model.modules()) else 0.0)

    monkeypatch.setattr(host, "_decode", decode)
    monkeypatch.setattr(host, "_calls", lambda module, x, calls: 10e-6 + (3e-6 if hasattr(module, "_hf_hook") else 0.0))
    rounds = []
    result = host.measure(model, 1, 3, 1, lambda: rounds.append(1))
    assert len(rounds) == 4 and result["unsteered_us"] == pytest.approx(100)
    assert result["variants"]["scale"]["us_a_site"]["median"] == pytest.approx(0)  # folded: no hook
    assert result["variants"]["push"]["us_a_site"]["median"] == pytest.approx(2)
    assert result["variants"]["push"]["us_by_itself"]["median"] == pytest.approx(3)
    assert result["variants"]["push"]["minimum_us_a_site"] == pytest.approx(2)
    assert result["noise_us"] == pytest.approx(0)
    assert all(goal["met"] for goal in host.goals([result]))


def test_a_goal_within_the_noise_is_neither_met_nor_missed(capsys):
    def batch(value, low, high):
        keys = ("us_a_site", "us_by_itself")
        same = {"goal": False, **{key: {"median": 0.0, "low": low, "high": high} for key in keys}}
        row = {"goal": True, "path": "columns", **{key: {"median": value, "low": value, "high": value} for key in keys}}
        return {"batch": 1, "variants": {host.AGAIN: same, "push": row}}

    found = [host.goals([batch(value, *noise)])[0] for value, noise in ((12.0, (-4, 4)), (12.0, (-1, 1)), (3, (-1, 1)))]
    assert [goal["met"] for goal in found] == [None, False, True]
    report.show_goals(found)
    printed = capsys.readouterr().out
    assert "met in 1, missed in 1, hidden by noise in 1 of 3 cases" in printed
    assert "missed: push (columns) in the model, batch 1, 1.200 times the limit" in printed


@pytest.mark.parametrize("arguments", [["--rounds", "1"], ["--batch", "0"], ["--steps", "0"]])
def test_too_little_is_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        host.parse(arguments)
    assert "expected at least 2 rounds" in capsys.readouterr().err
