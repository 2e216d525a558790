"""``austeer inspect`` and ``select`` as a user runs them: what is printed, how wide, and as JSON."""

import json

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from austeer import Plan
from austeer.cli import app
from austeer.overview.overview import of_momentum, of_plan
from local_hub import local_hub
from made_momentum import momentum_of, signal
from small_plans import EVIDENCE, KNOWN


@pytest.fixture(scope="module")
def momentum():
    return momentum_of(signal(60, 0.5, layers=20, width=200))


@pytest.fixture
def folder(momentum, tmp_path, monkeypatch):
    momentum.save(tmp_path / "kind.momentum")
    KNOWN.save_pretrained(tmp_path / "plan")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ask(*arguments, columns=80):
    result = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": str(columns)}, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("columns", [80, 120])
def test_momentum_fits_the_terminal(folder, momentum, columns):
    text = ask("inspect", "kind.momentum", "--k", 30, "--rows", 4, columns=columns)
    lines = text.splitlines()
    assert max(map(len, lines[1:])) <= columns, "only the first line has what a user named"
    overview = of_momentum(momentum, "ffn", 30)
    ranks = [line.split()[0] for line in lines if line[:1].isdigit() and len(line.split()) == 9]
    assert ranks == ["0", "1", "2", "3"]
    assert "top 30 AUs of site ffn by layer" in text
    joined = " ".join(text.split())
    assert overview.verdict in joined
    assert f"{overview.significance.discoveries} of 4000 AUs pass a sign test" in joined
    assert "chosen again of the top 10 30 100 300 1000" in joined
    assert not any(line.startswith("site ") for line in lines), "one site needs no table of sites"


def test_all_sites_are_compared(folder, demo_momentum):
    demo_momentum.save(folder / "two.momentum")
    text = ask("inspect", "two.momentum")
    assert [line.split()[0] for line in text.splitlines()[-2:]] == ["attention", "ffn"]
    assert "site         AUs  |beta|" in text


def test_json_has_all_of_it(folder, momentum):
    data = json.loads(ask("inspect", "kind.momentum", "--k", 30, "--json", "--png", "f.png"))
    expected = json.loads(json.dumps(of_momentum(momentum, "ffn", 30).to_json()))
    assert data == {**expected, "png": "f.png"}
    assert (folder / "f.png").read_bytes().startswith(b"\x89PNG")


def test_a_plan_shows_its_tested_strengths(folder):
    text = ask("inspect", "plan", columns=120)
    joined = " ".join(text.split())
    assert "alpha effect 95 % share side effect on" in joined
    assert "4 * +0.9 +0.6 to +1.2 100% +0.04 9 pairs" in joined
    assert "effect: mean change of log-odds, nats; side effect: rise of the cross-entropy" in joined
    assert "cost: +0.4 % [-1.2, +2.1] by fold on Xeon" in joined
    assert json.loads(ask("inspect", "plan", "--json"))["evidence"] == json.loads(json.dumps(EVIDENCE.to_json()))


def test_a_plan_of_the_hub(folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    with local_hub():
        KNOWN.push_to_hub("user/kind", token="hf_user")
        data = json.loads(ask("inspect", "user/kind@main", "--json"))
    assert data == json.loads(json.dumps({**of_plan(KNOWN, None, 100).to_json(), "png": None}))


def test_select_by_stability(folder, momentum):
    plan = momentum.select("ffn", min_stability=0.3)
    data = json.loads(ask("select", "kind.momentum", "--site", "ffn", "--min-stability", 0.3, "--out", "p", "--json"))
    assert data["k"] == len(plan) and Plan.from_pretrained("p") == plan
