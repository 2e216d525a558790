"""The host-time benchmark: every variant steers as it says, and what is timed is its difference to a twin."""

import copy
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


def test_each_variant_steers_and_says_on_which_path(model):
    ids = torch.randint(3, 64, (4, host.PROMPT), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def decoded():
        cache = model(ids, use_cache=True).past_key_values
        return model(ids[:, :1], past_key_values=cache, use_cache=True).logits

    plain = decoded()
    for name, variant in host.variants(model).items():
        with variant.attached(model, 4) as steering:
            changed = not torch.equal(decoded(), plain)
            if isinstance(variant, host.Hook):
                assert changed and variant.path(steering) == "hook"
                continue
            tokens = steering.report()[0].tokens
            assert variant.path(steering)
            if variant.mode != "auto":
                assert variant.path(steering) == variant.mode
        if name == "generation, out of scope":  # its decoded token is prompt, as it was told
            assert not changed and tokens == 0
        else:
            assert changed, name
        if name == "generation, in scope":
            assert tokens == 4
        if variant.rows:
            assert tokens == 3 * (host.PROMPT + 1)
    assert torch.equal(decoded(), plain)


@pytest.mark.parametrize("operation", ["scale", "shift"])
def test_a_dense_hook_changes_its_columns_alone(model, operation):
    module, x = host.modules(model)[0], torch.ones(1, 1, host.WIDTH)
    with torch.no_grad():
        plain = module(x)
        with host.Hook(operation).attached(model, 1):
            steered = module(x)
    changed = steered != plain
    assert changed.sum() == host.AUS_A_LAYER
    expected = plain * (1 + host.ALPHA) if operation == "scale" else plain + host.ALPHA
    torch.testing.assert_close(steered[changed], expected[changed])


def test_sites_are_steered_while_they_are_timed_and_the_twin_s_are_not(model, monkeypatch):
    results = []

    def called(call, device):
        results.append(call())
        return len(results) * 1e-6

    monkeypatch.setattr(host, "seconds", called)
    own, walks = copy.deepcopy(model), []
    with host.variants(model)["rows of three plans"].attached(own, 4):
        subject = host.Subject(own, model, 4)
        # of two sites one comes before its twin and the other after it, so the two differences cancel
        for number, walk in ((0, lambda: walks.append(1)), (1, lambda: walks.append(1)), (0, None)):
            assert subject.added(number, walk) == pytest.approx(0, abs=1e-9)
    assert len(walks) == 8 and len(results) == 12, "each of two sites and of their twins by itself"
    for first, second in zip(results[::2], results[1::2]):
        differs = [not torch.equal(one, other) for one, other in zip(first, second)]
        assert differs == [True, False, True, True]  # the second row has no plan


@pytest.mark.parametrize("cold", [True, False])
def test_what_is_timed_is_what_steering_adds_to_a_call(model, monkeypatch, cold):
    own = copy.deepcopy(model)
    subject, steered = host.Subject(own, model, 1), set(host.modules(own))
    taken = {True: 7e-6, False: 2e-6}
    monkeypatch.setattr(host, "seconds", lambda call, device: call.args[1] * taken[call.args[0] in steered])
    assert subject.added(1, (lambda: None) if cold else None) == pytest.approx(5)


def test_the_walk_is_over_twice_the_largest_cache(tmp_path):
    assert host.walk_bytes(tmp_path) == host.DEFAULT_WALK
    for number, size in enumerate(("32K\n", "1024K\n", "32M\n")):
        (tmp_path / f"index{number}").mkdir()
        (tmp_path / f"index{number}" / "size").write_text(size)
    assert host.walk_bytes(tmp_path) == 64 * 2**20


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs the command with few calls; where its files are."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(host, "CALLS", 2)
    monkeypatch.setattr(host, "walk_bytes", lambda: 1 << 16)
    threads = torch.get_num_threads()
    yield lambda *more: host.main(["--out", str(tmp_path), "--layers", "2", "--rounds", "2", *more])
    torch.set_num_threads(threads)


def test_the_table_fits_a_terminal_and_has_every_goal(model, capsys, monkeypatch):
    monkeypatch.setattr(host.console, "_width", 80)
    us = {"median": -123.45, "low": -1234.5, "high": 123.4, "rounds": 40}
    known = host.variants(model)
    rows = {name: {"path": "columns", "us_by_itself": us, "us_cold": us} for name in known}
    goals = [one for name in known for one in host.goal(name, known[name], rows[name])]
    host.show(None, {"batches": [{"batch": 1, "variants": rows, "goals": goals}]})
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert max(map(len, lines)) <= 80 and not any("…" in line for line in lines)
    for name, most in {"shift, columns": [3, 12], "push": [5, 12], "dense hook": []}.items():
        found = [line for line in lines if line.startswith(f"{name}  ")]
        assert len(found) == 2 and all("-123.5 [-1234.5, 123.4]" in line for line in found)
        assert [line.partition("at most ")[2] for line in found if "at most" in line] == [f"{n}: met" for n in most]


def test_the_command_prints_both_tables(command, capsys, monkeypatch):
    monkeypatch.setattr(host.console, "_width", 120)  # no name in two lines
    assert command("--cold") == 0
    printed = capsys.readouterr().out
    for name in host.variants(host.build_model(1, CPU, torch.float32)):
        assert sum(line.startswith(f"{name}  ") for line in printed.splitlines()) == 2, name


def test_the_result(command, tmp_path, capsys):
    assert command("--json", "--batch", "1", "2") == 0
    content = json.loads(capsys.readouterr().out)
    assert len(list((tmp_path / "cpu").glob("host-*.json"))) == 1
    assert [batch["batch"] for batch in content["batches"]] == [1, 2] and content["walked_bytes"] == 0
    for batch in content["batches"]:
        assert next(iter(batch["variants"])) == host.AGAIN
        for row in batch["variants"].values():
            us = row["us_by_itself"]
            assert us["low"] <= us["median"] <= us["high"] and us["rounds"] == 2 and "us_cold" not in row
        for one in batch["goals"]:
            median = batch["variants"][one["variant"]]["us_by_itself"]["median"]
            assert one["of"] == "us_by_itself" and one["met"] == (median <= one["most"])
    assert content["environment"]["threads"] == 1


@pytest.mark.parametrize(
    "arguments, message", [(["--rounds", "1"], "expected at least 2"), (["--batch", "0"], "at least 1 layer and row")]
)
def test_too_little_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        host.parse(arguments)
    assert message in capsys.readouterr().err
