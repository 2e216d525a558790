"""The command line as a user runs it: real files, real model, exit codes, what is printed where."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import austeer
from austeer.cli import app
from austeer.cli.common import load
from austeer.forward.generation import continue_prompts

PAIRS = Path(austeer.__file__).parent / "data" / "demo_pairs.jsonl"


def invoke(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False, env={"COLUMNS": "120"})


def run(*arguments):
    """The command in this process; standard output."""
    done = invoke(*arguments)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(autouse=True)
def loaded_once(demo, monkeypatch):
    monkeypatch.setattr(
        "austeer.cli.common.load", lambda name, *options: demo if name == "demo" else load(name, *options)
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A momentum file and a plan, made by the commands themselves, the first in a process of its own."""
    folder = tmp_path_factory.mktemp("cli")
    measure = (
        *("measure", PAIRS, "--model", "demo", "--out", folder / "m.momentum", "--where", "split=selection"),
        *("--limit", 12, "--sites", "attention,ffn", "--dtype", "float32", "--device", "cpu", "--json"),
    )
    done = subprocess.run(
        [sys.executable, "-m", "austeer", *map(str, measure)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    select = ("select", folder / "m.momentum", "--k", 20, "--operation", "shift", "--out", folder / "plan", "--json")
    return folder, json.loads(done.stdout), json.loads(run(*select))


def test_measure_and_select_equal_the_library(demo, files):
    folder, measured, selected = files
    momentum = austeer.Momentum.load(folder / "m.momentum")
    assert measured["pairs"] == momentum.pairs == 12
    assert measured["sites"] == {"attention": [30, 576], "ffn": [30, 576]}
    pairs = austeer.load_pairs(PAIRS, where={"split": "selection"}, limit=12)
    own = austeer.measure(*demo, pairs, ["attention", "ffn"], progress=False)
    assert own.sites["ffn"].positive.equal(momentum.sites["ffn"].positive)
    plan = austeer.Plan.from_pretrained(folder / "plan")
    assert plan == momentum.select("attention", k=20, operation="shift")
    assert selected["k"] == 20 and selected["operation"] == "shift"


def test_inspect_shows_top_aus_layers_and_a_figure(files):
    folder = files[0]
    text = run("inspect", folder / "m.momentum", "--site", "ffn", "--k", 30, "--png", folder / "f.png")
    plan = austeer.Momentum.load(folder / "m.momentum").select("ffn", k=30)
    first = next(iter(plan))
    row = next(line for line in text.splitlines() if line.split()[:1] == ["0"])
    assert row.split()[:4] == ["0", str(first.layer), str(first.index), f"{first.beta:+.3f}"]
    assert "top 30 AUs of site ffn by layer" in text
    assert (folder / "f.png").read_bytes().startswith(b"\x89PNG")
    data = json.loads(run("inspect", folder / "plan", "--json"))
    assert len(data["units"]) == 20 and sum(data["by_layer"]) == 20


def test_generate_sets_steered_beside_unsteered(demo, files):
    model, tokenizer = demo
    data = json.loads(
        run(
            *("generate", files[0] / "plan", "--model", "demo", "--prompt", "The weekend trip was", "--device", "cpu"),
            *("--alpha", "-6,0", "--max-new-tokens", 6, "--json", "--report"),
        )
    )
    texts = {name: values[0] for name, values in data["continuations"].items()}
    assert list(texts) == ["unsteered", "alpha -6", "alpha 0"]
    assert texts["alpha 0"] == texts["unsteered"] != texts["alpha -6"]
    assert {row["path"] for row in data["report"]} == {"bias"}
    ids = tokenizer("The weekend trip was", return_tensors="pt")
    with austeer.steer(model, austeer.Plan.from_pretrained(files[0] / "plan"), -6):
        own = model.generate(**ids, max_new_tokens=6, do_sample=False)
    assert tokenizer.decode(own[0, ids["input_ids"].shape[1] :]) == texts["alpha -6"]


def test_a_layer_s_direction_is_selected_inspected_and_ablated(demo, files, tmp_path):
    model, tokenizer = demo
    plan = tmp_path / "calm"
    which = ("--site", "ffn", "--layers", "14", "--operation", "ablate")
    data = json.loads(run("select", files[0] / "m.momentum", *which, "--out", plan, "--json"))
    assert (data["k"], data["layers"], data["operation"]) == (576, [14], "ablate")
    assert "576 AUs" in run("inspect", plan) and ", ablate, from" in run("inspect", plan)
    options = ("--alpha", 1, "-p", "The soup was", "--device", "cpu", "--max-new-tokens", 4, "--json")
    found = json.loads(run("generate", plan, "--model", "demo", *options))["continuations"]
    with austeer.steer(model, austeer.Plan.from_pretrained(plan), 1):
        assert found["alpha 1"] == continue_prompts(model, tokenizer, ["The soup was"], max_new_tokens=4)


def test_generate_runs_several_plans_in_one_batch(demo, files):
    """Each prompt is a row for each plan and one for none; and each writes what it writes alone."""
    model, tokenizer = demo
    folder = files[0]
    run("select", folder / "m.momentum", "--site", "ffn", "--k", 9, "--operation", "push", "--out", folder / "other")
    prompts = ("The weekend trip was", "Compared with the inn across the road, this one felt")
    data = json.loads(
        run(
            *("generate", folder / "plan", folder / "other", "--model", "demo", "-p", prompts[0], "-p", prompts[1]),
            *("--device", "cpu", "--alpha", -6, "--scope", "2:", "--max-new-tokens", 6, "--json", "--report"),
        )
    )
    assert list(data["continuations"]) == ["unsteered", "plan, alpha -6", "other, alpha -6"]
    for name in ("plan", "other"):
        with austeer.steer(model, austeer.Plan.from_pretrained(folder / name), -6, scope=(2, None)):
            own = continue_prompts(model, tokenizer, prompts, max_new_tokens=6)
        assert data["continuations"][f"{name}, alpha -6"] == own
    assert data["continuations"]["unsteered"] == continue_prompts(model, tokenizer, prompts, max_new_tokens=6)
    assert {unit["plan"] for row in data["report"] for unit in row["units"]} == {"plan", "other"}


def test_generate_steers_the_answer(demo, files):
    """By the tokenizer's own markers: this one has none, and so the answer is all that is generated."""
    common = ("generate", files[0] / "plan", "--model", "demo", "-p", "The weekend trip was", "--device", "cpu")
    texts = [
        json.loads(run(*common, "--alpha", -30, "--scope", scope, "--max-new-tokens", 9, "--json"))["continuations"]
        for scope in ("answer", "generation")
    ]
    assert texts[0] == texts[1] and texts[0]["unsteered"] != texts[0]["alpha -30"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("select", "{m}", "--k", "0", "--out", "{new}"), "k: .* 0.*17280"),
        (("select", "{m}", "--out", "{new}"), "k, max_fdr and min_stability"),
        (("select", "{m}", "--min-stability", "2", "--out", "{new}"), "min_stability.*2"),
        (("select", "{m}", "--max-fdr", "0.01", "--out", "{new}"), "22 pairs"),
        (("select", "{m}", "--k", "5", "--out", "{plan}"), "plan.*exists"),
        (("select", "{pairs}", "--k", "5", "--out", "{new}"), "austeer-momentum"),
        (("inspect", "{new}"), "new.*no such file"),
        (("generate", "{plan}", "--model", "{new}", "--prompt", "x"), "new"),
        (("generate", "{plan}", "--model", "demo", "--prompt", ""), "empty text"),
        (("generate", "{plan}", "--model", "demo", "--prompt", "x", "--alpha", "2,strong"), "--alpha.*'strong'"),
        (("generate", "{plan}", "--model", "nobody/nothing", "--prompt", "x"), "nobody/nothing.*no folder"),
        (("generate", "{plan}", "--model", "demo", "--prompt", "x", "--scope", "5:2"), r"scope.*\(5, 2\)"),
        (("generate", "{plan}", "--model", "demo", "--prompt", "x", "--scope", "prompts"), "scope.*'prompts'"),
        (("measure", "{missing}", "--model", "demo", "--out", "{new}"), "missing.*no such file"),
        (("measure", "{broken}", "--model", "demo", "--out", "{new}"), "line 2.*'positive'"),
        (("measure", "{pairs}", "--model", "demo", "--out", "{m}"), "momentum: exists"),
        (("measure", "{pairs}", "--model", "demo", "--out", "{broken}/x", "--limit", "2"), "broken.jsonl.*writable"),
        (("inspect", "{m}", "--png", "{broken}/x.png"), "broken.jsonl/x.png"),
        (("generate", "{plan}", "--model", "demo", "--prompt", "\udcff"), "not UTF-8"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(files, tmp_path, arguments, message, command_line):
    broken = tmp_path / "broken.jsonl"
    row = {"prompt": "a", "positive": " b", "negative": " c"}
    broken.write_text("\n".join(json.dumps(r) for r in (row, {**row, "positive": " "})))
    places = {
        "m": files[0] / "m.momentum",
        "plan": files[0] / "plan",
        "new": tmp_path / "new",
        "missing": tmp_path / "missing.jsonl",
        "pairs": PAIRS,
        "broken": broken,
    }
    code, out, error = command_line(*(a.format(**places) for a in arguments))
    assert code == 2 and re.search(message, error) and error.startswith("error: ")
    assert len(error.strip().splitlines()) == 1 and not out and not places["new"].exists()


def test_help_teaches_with_an_example():
    commands = ("measure", "select", "inspect", "generate", "demo", "push", "verify")
    for command in (*commands, "export lora", "export checkpoint", "export gguf"):
        text = run(*command.split(), "--help")
        assert f"Example: austeer {command}" in text and "--json" in text


def test_json_is_json_also_where_a_figure_is_infinite(tmp_path):
    pairs = tmp_path / "p.jsonl"
    row = json.dumps({"prompt": "It was", "positive": " good", "negative": " bad"})
    pairs.write_text(f"{row}\n{row}\n")
    run("measure", pairs, "--model", "demo", "--out", tmp_path / "m", "--sites", "ffn", "--device", "cpu")

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    data = json.loads(run("inspect", tmp_path / "m", "--json"), parse_constant=refuse)
    assert None in data["effect"]  # two equal pairs: the difference never varies


def test_a_plan_measured_with_another_prompt_form_is_noted(files):
    done = invoke("generate", files[0] / "plan", "-m", "demo", "-p", "Hello", "--chat", "--max-new-tokens", 1, "--json")
    assert done.exit_code == 0 and "without a chat template, and these prompts go through" in done.stderr
    assert "report" not in json.loads(done.stdout), "it is long, and nobody asked for it"


def test_unknown_options_and_no_command():
    assert invoke("select", "--nonsense").exit_code == 2
    assert "measure" in invoke().output
    assert austeer.__version__ in run("--version")
