"""Fixtures of the causal check: a small model, its momentum and profile, and their files."""

import json

import pytest

import austeer
from austeer.causal import runner
from austeer.demo.demo import load_data
from causal_checks import MEASURED, Stopped


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr("austeer.causal.statistics.RESAMPLES", 200)


@pytest.fixture(scope="session")
def model(tiny_of):
    return tiny_of("llama")


@pytest.fixture(scope="session")
def momentum(model, demo):
    return austeer.measure(model, demo[1], MEASURED, ["attention", "ffn", "layer"], progress=False)


@pytest.fixture(scope="session")
def with_effects(model, demo):
    return austeer.measure(model, demo[1], MEASURED, ["attention"], effects=True, progress=False)


@pytest.fixture(scope="session")
def profile(model, demo):
    return austeer.profile(model, demo[1], ["attention"], ["The sea is blue.", "A tree grows slowly."], draws=8)


@pytest.fixture
def counted(monkeypatch):
    """How many plans were scored; raises after as many calls as ``counted["stop"]`` says."""
    seen = {"names": 0, "calls": 0, "stop": None}
    real = runner.option_scores

    def score(model, tokenizer, task, steering=None, names=(None,), **options):
        if steering is not None:
            if seen["calls"] == seen["stop"]:
                raise Stopped
            seen["calls"] += 1
            seen["names"] += len(names)
        return real(model, tokenizer, task, steering, names, **options)

    monkeypatch.setattr(runner, "option_scores", score)
    return seen


@pytest.fixture
def files(model, demo, momentum, with_effects, profile, tmp_path, monkeypatch):
    """Momentum with and without effects, a profile, pairs, and the same pairs as a task."""
    monkeypatch.setattr("austeer.cli.common.load", lambda *options: (model, demo[1]))
    momentum.save(tmp_path / "m.momentum")
    with_effects.save(tmp_path / "effects.momentum")
    profile.save(tmp_path / "a.profile")
    rows = [{**vars(pair), "topic": "x"} for pair in load_data().held_out[:3]]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = [{"prompt": r["prompt"], "options": [r["negative"], r["positive"]], "label": 1} for r in rows]
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return tmp_path
