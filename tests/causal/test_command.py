"""The command and the figures of the causal check."""

import json
import re
from dataclasses import replace

import pytest
from typer.testing import CliRunner

import austeer
from austeer import FileFormatError
from austeer.causal.figures import draw_causal, draw_predicted
from austeer.cli import app
from causal_checks import checked


def test_figures(model, demo, with_effects, tmp_path):
    result = checked(model, demo, with_effects, groups=1, alphas=[1])
    draw_causal(result, tmp_path / "a.svg")
    assert draw_predicted(result, tmp_path / "b.svg")
    for name in "ab":
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()
    alone = replace(result, units=[replace(unit, predicted={}) for unit in result.units])
    for part in (alone, replace(result, together=None)):
        assert draw_predicted(part, tmp_path / "c.svg")
    assert not draw_predicted(replace(alone, together=None), tmp_path / "d.svg")
    assert not (tmp_path / "d.svg").exists()


def run(*arguments):
    return CliRunner().invoke(app, ["causal", *map(str, arguments)], catch_exceptions=True, env={"COLUMNS": "200"})


def options(files, out):
    few = ("-n", 2, "--sample", 4, "--ways", "shift", "--device", "cpu")
    return ("--momentum", files / "m.momentum", "--model", "demo", "--out", out, *few)


def test_command(files, tmp_path, counted):
    done = run(files / "pairs.jsonl", *options(files, tmp_path / "out"), "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["items"] == 3 and found["n"] == 2 and set(found["findings"]) == {"shift"}
    assert len(found["verdict"]["shift"]) == 4
    kept = json.loads((tmp_path / "out" / "causal.json").read_text())
    assert kept["findings"] == found["findings"]
    assert (tmp_path / "out" / "causal.png").read_bytes().startswith(b"\x89PNG")
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]
    # again, from the record, as text; the same items as a task in the neutral format are another task's
    counted["names"] = 0
    again = run(files / "pairs.jsonl", *options(files, tmp_path / "out"))
    assert again.exit_code == 0 and counted["names"] == 0
    assert "2 top AUs of site attention beside 2 matched random ones, each steered alone, on 3 held-out" in again.stdout
    assert found["verdict"]["shift"][0] in again.stdout
    refused = run(files / "task.jsonl", *options(files, tmp_path / "out"))
    assert isinstance(refused.exception, FileFormatError) and "record.jsonl" in str(refused.exception)
    forced = run(files / "task.jsonl", *options(files, tmp_path / "out"), "--force", "--json")
    assert forced.exit_code == 0 and counted["names"] > 0
    swapped = json.loads(forced.stdout)["findings"]["shift"]["wanted"]
    assert swapped["top"] == pytest.approx(found["findings"]["shift"]["wanted"]["top"], rel=1e-2, abs=1e-5)


def test_command_with_effects(files, tmp_path):
    momentum = ("--momentum", files / "effects.momentum", "--profile", files / "a.profile")
    chosen = (*options(files, tmp_path / "out"), *momentum, "--groups", 2, "--alpha", "1,2")
    done = run(files / "pairs.jsonl", *chosen, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [row["alpha"] for row in found["together"]["strengths"]] == [1, 2]
    assert len(found["together"]["groups"]) == 8 and len(found["verdict"]["shift"]) == 6
    assert (tmp_path / "out" / "predicted.png").read_bytes().startswith(b"\x89PNG")
    again = run(files / "pairs.jsonl", *chosen)
    assert again.exit_code == 0 and "2 groups of each kind" in again.stdout
    assert "causal.json and causal.png and predicted.png" in again.stdout


@pytest.mark.parametrize("arguments, message", [
    (("--where", "topic"), "--where.*'topic'"),
    (("--where", "topic=y"), "no row"),
    (("--site", "neuron"), "site 'neuron'"),
    (("--template", "nonsense"), "template.*nonsense"),
    (("--alpha", "x"), "alpha.*'x'"),
])  # fmt: skip
def test_command_complaints(files, tmp_path, arguments, message):
    done = run(files / "pairs.jsonl", *options(files, tmp_path / "out"), *arguments)
    assert isinstance(done.exception, austeer.AusteerError) and re.search(message, str(done.exception))
    assert not (tmp_path / "out").exists()


def test_interruption_says_how_to_go_on(files, tmp_path, monkeypatch):
    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("austeer.causal.causal_check", stop)
    done = run(files / "pairs.jsonl", *options(files, tmp_path / "out"))
    assert done.exit_code == 130
    assert "record.jsonl: the same command goes on" in done.output.replace("\n", "")
