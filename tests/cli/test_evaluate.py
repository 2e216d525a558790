"""`austeer evaluate` as a user runs it: variants, tables, result files, what it refuses before loading a model."""

import json
import re
from functools import partial

import pytest

import austeer
from austeer import Plan
from austeer.cli.evaluate import make_variants
from austeer.errors import TaskError
from austeer.plans.evidence import Evidence, Outcome
from austeer.tasks import evaluate, load_task, shipped
from dense_formula import random_plan

ROWS = [
    {"prompt": "The sky is", "options": [" blue", " green", " red and wet"], "label": 0},
    {"prompt": "Grass in the spring is", "options": [" blue", " green"], "label": " green"},
    {"prompt": "Snow is", "options": [" black", " white"], "label": 1},
]


@pytest.fixture
def place(lively, demo, tmp_path, monkeypatch):
    """A folder, which is the working directory, with a small model, two plans and a task."""
    lively.save_pretrained(tmp_path / "model")
    demo[1].save_pretrained(tmp_path / "model")
    for seed, name in enumerate(("a", "b")):
        random_plan(lively, "attention", 20, "shift", seed).save_pretrained(tmp_path / "plans" / name)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "sums.jsonl").write_text('{"prompt": "2 + 3 =", "answer": 5}\n{"prompt": "1 + 1 =", "answer": 2}\n')
    (tmp_path / "neutral.txt").write_text("Two boats left.\nThe river runs north.\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture
def run(command_line):
    return partial(command_line, "evaluate")


MODEL = ("--model", "model", "--device", "cpu", "--neutral", "neutral.txt")


def test_json_equals_the_library(place, run, lively, demo):
    arguments = ("rows.jsonl", *MODEL, "--plan", "plans/a", "--plan", "plans/b", "--alpha", "3", "--alpha", "-2")
    code, out, err = run(*arguments, "--k", "7", "--json", "--out", "results/found.json")
    assert code == 0, err
    found = json.loads(out)
    plans = {name: Plan.from_pretrained(place / "plans" / name) for name in "ab"}
    expected = evaluate(
        lively,
        demo[1],
        load_task(place / "rows.jsonl"),
        {"a": (plans["a"], 3.0, 7), "b": (plans["b"], -2.0, 7)},
        neutral=["Two boats left.", "The river runs north."],
        progress=False,
    ).to_json()
    assert [variant["name"] for variant in found["variants"]] == ["unsteered", "a", "b"]
    for variant, own in zip(found["variants"], expected["variants"]):
        assert variant["margin"] == pytest.approx(own["margin"], abs=1e-5)
        assert (variant["alpha"], variant["k"], variant["exact"]) == (own["alpha"], own["k"], own["exact"])
        assert variant["kl"] == pytest.approx(own["kl"], abs=1e-5)
    assert "rows" not in found and found["between"][0]["first"] == "a"
    written = json.loads((place / "results" / "found.json").read_text())
    assert [row["prompt"] for row in written["rows"]] == [row["prompt"] for row in ROWS]
    assert {k: v for k, v in written.items() if k != "rows"} == found
    assert [path.name for path in (place / "results").iterdir()] == ["found.json"]


def test_table(place, run):
    code, out, err = run("rows.jsonl", *MODEL, "--plan", "plans/a", "--alpha", "3", "--alpha", "-2", "--limit", "2")
    assert code == 0, err
    assert "rows: 2 items in 2 groups, model" in out
    assert "unsteered" in out and "a, alpha 3" in out and "a, alpha -2" in out
    assert "accuracy" in out and "McNemar" in out and "between" in out


def test_numbers(place, run):
    code, out, err = run("sums.jsonl", *MODEL, "--plan", "plans/a", "-a", "3", "--max-new-tokens", "3", "-o", "n.json")
    assert code == 0, err
    assert "exact match" in out and "accuracy" not in out and "wrote n.json" in out
    rows = json.loads((place / "n.json").read_text())["rows"]
    assert [row["answer"] for row in rows] == [5, 2] and all("text" in row["variants"]["a"] for row in rows)


def test_template_chat_and_where(place, run):
    rows = [{"question": "is it", "passage": "It is.", "answer": i < 2, "part": str(i % 2)} for i in range(4)]
    rows = [{**row, "question": f"is it {i}"} for i, row in enumerate(rows)]
    (place / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = run(
        *("b.jsonl", "--template", "boolq", "--where", "part=1", "--chat", *MODEL, "-p", "plans/a", "-a", "1", "--json")
    )
    assert code == 0, err
    found = json.loads(out)
    assert (found["task"], found["items"], found["chat_template"]) == ("boolq", 2, True)
    assert re.search(r"note: a .*chat template", err.replace("\n", " "))


def test_strength_of_the_plans_evidence(place, run):
    plan = Plan.from_pretrained(place / "plans" / "a")
    evidence = Evidence(effect="log-odds", tested=(Outcome(2.5, "items", 1.0),), alpha=2.5)
    plan.with_evidence(evidence).save_pretrained(place / "plans" / "tuned")
    code, out, err = run("rows.jsonl", *MODEL, "--plan", "plans/tuned", "--json")
    assert code == 0 and json.loads(out)["variants"][1]["alpha"] == 2.5, err


def test_list_of_templates(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = run("--templates")
    assert code == 0 and all(name in out for name in shipped()) and "most-plausible-alternative" in out
    code, out, _ = run("--templates", "--json")
    assert json.loads(out)["boolq"]["fields"] == ["answer", "passage", "question"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "neither.*--lm-eval"),
        (("rows.jsonl", "--lm-eval", "boolq"), "both.*--lm-eval"),
        (("rows.jsonl",), "--model.*none"),
        (("rows.jsonl", *MODEL, "--where", "part"), "--where.*'part'"),
        (("rows.jsonl", *MODEL, "--template", "bolq"), "template.*'bolq'.*boolq"),
        (("rows.jsonl", *MODEL, "--template", "boolq"), "prompt, options, label.*answer"),
        (("none.jsonl", *MODEL), "none.jsonl"),
        (("rows.jsonl", *MODEL, "--plan", "plans/a"), "'a'.*strength"),
        (("rows.jsonl", *MODEL, "--alpha", "3"), "--alpha.* 3.*--plan"),
        (("rows.jsonl", *MODEL, "-p", "plans/none", "-a", "3"), "plans/none"),
        (("rows.jsonl", *MODEL, "--out", "plans"), "plans: .*folder"),
        (("rows.jsonl", *MODEL, "--out", "rows.jsonl"), "rows.jsonl: exists"),
        (("rows.jsonl", "-m", "model", "--neutral", "none.txt"), "--neutral.*none.txt"),
        (("-m", "model", "--lm-eval", "boolq", "--template", "boolq"), "--template.*--lm-eval"),
    ],
)
def test_refused_before_a_model_is_loaded(place, run, monkeypatch, arguments, message):
    monkeypatch.setattr(austeer.models, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    code, out, err = run(*arguments)
    assert code == 2 and re.search(message, " ".join(err.split())) and not out
    assert (place / "rows.jsonl").read_text().count("\n") == 3


# --- variants --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plans, alphas, ks, expected",
    [
        ([], [], [], {}),
        (["x/a"], [], [], {"a": ("x/a", None, None)}),
        (["x/a"], [2.0], [3], {"a": ("x/a", 2.0, 3)}),
        (["x/a", "x/b"], [2.0], [], {"a": ("x/a", 2.0, None), "b": ("x/b", 2.0, None)}),
        (["x/a", "x/b"], [2.0, 3.0], [4, 5], {"a": ("x/a", 2.0, 4), "b": ("x/b", 3.0, 5)}),
        (["x/a", "y/a"], [2.0], [], {"x/a": ("x/a", 2.0, None), "y/a": ("y/a", 2.0, None)}),
        (["x/a"], [2.0, 3.0], [4], {"a, alpha 2": ("x/a", 2.0, 4), "a, alpha 3": ("x/a", 3.0, 4)}),
        (["x/a"], [2.0], [4, 5], {"a, k 4": ("x/a", 2.0, 4), "a, k 5": ("x/a", 2.0, 5)}),
        (["x/a", "x/a"], [2.0, 3.0], [], {"a, alpha 2": ("x/a", 2.0, None), "a, alpha 3": ("x/a", 3.0, None)}),
    ],
)
def test_which_variants_options_ask_for(plans, alphas, ks, expected):
    assert {name: tuple(v) for name, v in make_variants(plans, alphas, ks, str).items()} == expected


@pytest.mark.parametrize(
    "plans, alphas, ks, message",
    [
        ([], [], [3], "--k.* 3.*plan"),
        (["a", "b"], [1.0, 2.0, 3.0], [], "--alpha.* 3 .* 2 plans"),
        (["a"], [1.0, 2.0], [1, 2, 3], "--k.* 3 .* 2 strengths"),
        (["a", "a"], [1.0], [], "--plan.* a twice"),
        (["a"], [1.0, 1.0], [], "--plan.* a twice"),
    ],
)
def test_options_that_do_not_go_together(plans, alphas, ks, message):
    with pytest.raises(TaskError, match=message):
        make_variants(plans, alphas, ks, str)
