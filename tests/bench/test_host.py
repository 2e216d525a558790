"""The host-time benchmark: every variant steers as it says, and what is timed is its difference to a twin."""

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


def test_each_variant_takes_the_path_it_is_for_and_changes_the_logits(model):
    ids = torch.randint(3, 64, (4, host.PROMPT), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def decoded():
        cache = model(ids, use_cache=True).past_key_values
        return model(ids[:, :1], past_key_values=cache, use_cache=True).logits

    plain, taken = decoded(), {}
    for name, variant in host.variants(model).items():
        with variant.steering(model, 4) as steering:
            changed = not torch.equal(decoded(), plain)
            taken[name] = {row.path for row in steering.report()}
            tokens = steering.report()[0].tokens
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


def test_a_site_is_steered_while_it_is_timed_and_its_twin_is_not(model, monkeypatch):
    results = []

    def called(call, device):
        results.append(call())
        return float(len(results))

    monkeypatch.setattr(host, "seconds", called)
    steering = host.variants(model)["rows of three plans"].steering(model, 4)
    assert host.one_site(model, steering, 4, 3) == [-1e6, 1e6, -1e6]  # the order changes, the sign does not
    for first, second in zip(results[::2], results[1::2]):
        differs = [not torch.equal(a, b) for a, b in zip(first, second)]
        assert differs == [True, False, True, True]  # the second row has no plan
    before = host.one_site(model, None, 4, 2)
    assert len(before) == 2 and torch.equal(results[-1], results[-2])


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(host, "CALLS", 2)
    threads = torch.get_num_threads()
    arguments = ["--out", str(tmp_path), "--layers", "1", "--rounds", "2", "--batch", "1"]
    try:
        assert host.main(arguments) == 0
        printed = capsys.readouterr().out
        assert host.main([*arguments, "--json"]) == 0
    finally:
        torch.set_num_threads(threads)
    content = json.loads(capsys.readouterr().out)
    assert "rows of three plans" in printed and "columns" in printed
    assert len(list((tmp_path / "cpu").glob("host-*.json"))) == 2
    (batch,) = content["batches"]
    assert set(batch["variants"]) == {host.AGAIN, *host.variants(host.build_model(1, CPU, torch.float32))}
    assert batch["variants"]["scale"]["path"] == "fold"
    for row in batch["variants"].values():
        us = row["us_by_itself"]
        assert us["low"] <= us["median"] <= us["high"] and us["rounds"] == 2
    assert content["environment"]["threads"] == 1


@pytest.mark.parametrize(
    "arguments, message", [(["--rounds", "1"], "expected at least 2"), (["--batch", "0"], "at least 1 layer and row")]
)
def test_too_little_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        host.parse(arguments)
    assert message in capsys.readouterr().err
