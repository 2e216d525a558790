"""`austeer verify`, and replays of `export` and `tune`, as a user runs them."""

import json
import re
from dataclasses import replace

import pytest
from typer.testing import CliRunner

import austeer
from austeer.cli import app
from completions import Completions
from dense_formula import random_plan
from hypotheses import ALPHA, faults
from searches import NEUTRAL, NOUNS
from small_plans import REPLAY


@pytest.fixture(scope="module")
def place(one_lively, demo, tmp_path_factory):
    """A folder with the tiny model, its tokenizer and a plan for it."""
    folder = tmp_path_factory.mktemp("verify")
    one_lively.save_pretrained(folder / "tiny")
    demo[1].save_pretrained(folder / "tiny")
    random_plan(one_lively, "ffn", 12).save_pretrained(folder / "kind")
    return folder


def run(*arguments):
    """The command in this process: (exit code, standard output)."""
    done = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    return done.exit_code, done.stdout


def test_export_with_a_replay_and_verify(place, one_lively, demo, tmp_path):
    out = tmp_path / "kind"
    export = ("export", "lora", place / "kind", "-m", place / "tiny", "--alpha", ALPHA, "--quiet")
    code, text = run(*export, "--replay", "--out", out)
    assert code == 0 and f"wrote {out}, with a replay for austeer verify\n" in text
    code, text = run("verify", out, "-m", place / "tiny")
    assert code == 0 and text.startswith("austeer verify: applied\n") and "PEFT" in text
    assert max(map(len, text.splitlines())) <= 80
    plan = austeer.Plan.from_pretrained(place / "kind")
    for verdict, status in (("applied", 0), ("half strength", 1)):
        case = faults()[verdict](plan)
        with Completions(
            one_lively, demo[1], lambda body, case=case: case if body["model"] == "kind" else None
        ) as server:
            code, text = run("verify", out, "--url", server.url, "--lora", "kind", "--json")
        found = json.loads(text)
        assert (code, found["verdict"], found["applied"]) == (status, verdict, verdict == "applied")
        assert found["plan"]["digest"] == plan.digest and found["differences"][verdict] < 1e-3


def test_record_puts_the_replay_into_the_plan(place, tmp_path):
    austeer.Plan.from_pretrained(place / "kind").save_pretrained(tmp_path / "kind")
    code, text = run("verify", tmp_path / "kind", "-m", place / "tiny", "--record", "--alpha", -3)
    assert code == 0 and "alpha -3" in text and "austeer.steer" in text
    assert austeer.Plan.from_pretrained(tmp_path / "kind").replay.alpha == -3.0
    code, text = run("verify", tmp_path / "kind", "-m", place / "tiny", "--dtype", "bfloat16", "--json")
    found = json.loads(text)
    assert code == 0 and found["unsteered"] > 1e-3 and "bfloat16" in found["engine"]


def test_record_writes_the_file_that_was_read(place, tmp_path):
    """And no plan beside it."""
    other, own = tmp_path / "austeer_plan.safetensors", tmp_path / "mine.safetensors"
    austeer.Plan.from_pretrained(place / "kind").save_pretrained(tmp_path)
    own.write_bytes(other.read_bytes())
    before = other.read_bytes()
    assert run("verify", own, "-m", place / "tiny", "--record", "--alpha", 2)[0] == 0
    assert other.read_bytes() == before and austeer.Plan.from_pretrained(own).replay.alpha == 2.0
    assert len(list(tmp_path.iterdir())) == 2


def test_what_cannot_be_is_refused_before_a_model_is_loaded(place, tmp_path, monkeypatch):
    monkeypatch.setattr("austeer.cli.common.load", None)
    monkeypatch.setattr("austeer.models.load.fits", None)
    model = ("-m", place / "tiny", "--dtype", "float32")
    with pytest.raises(austeer.VerifyError, match="--record: found me/kind, which is not here"):
        run("verify", "me/kind", *model, "--record")
    with pytest.raises(austeer.VerifyError, match="--alpha: found 2, expected one"):
        run("verify", place / "kind", *model, "--record", "--alpha", "2,3")
    pytest.importorskip("gguf")
    plan = austeer.Plan.from_pretrained(place / "kind")
    plan = plan.with_replay(replace(REPLAY, digest=plan.digest, alpha=1.0, scope="all"))
    file = austeer.export_gguf(plan, place / "tiny", tmp_path / "kind.gguf", alpha=1.0, progress=False)
    with pytest.raises(austeer.VerifyError, match=r"kind.gguf: .*llama-server"):
        run("verify", file, *model)


def test_tune_records_the_plan_that_it_chose(place, tmp_path):
    rows = [{"prompt": f"The {noun} was", "positive": " good", "negative": " bad"} for noun in NOUNS]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "neutral.txt").write_text("\n".join(NEUTRAL))
    out = tmp_path / "out"
    few = ("--rank", "momentum", "--sites", "attention", "--operations", "shift", "--ks", "2", "--no-mix")
    few += ("--neutral", tmp_path / "neutral.txt", "--samples", 0, "--quiet")
    for options in ((), ("--replay", "--force")):
        assert run("tune", tmp_path / "pairs.jsonl", "-m", place / "tiny", *few, "--out", out, *options)[0] == 0
        plan = austeer.Plan.from_pretrained(out / "plan")
        assert (plan.replay is not None) == bool(options)
    assert plan.replay.digest == plan.digest and plan.replay.alpha == plan.evidence.alpha
    text = run("verify", out / "plan", "-m", place / "tiny", "--json")[1]
    found = json.loads(text)
    assert found["plan"]["digest"] == plan.digest and found["differences"]["applied"] < 1e-3, text


def test_the_help_has_the_exit_codes():
    words = " ".join(run("verify", "--help")[1].replace("│", " ").split())
    assert 'exit code is 0 for "applied", 1 for every other verdict, and 2 where it could not be tried' in words


def test_exports_have_none_by_themselves(place, tmp_path):
    for kind in ("lora", "checkpoint"):
        text = run("export", kind, place / "kind", "-m", place / "tiny", "--out", tmp_path / kind, "--json", "--quiet")[
            1
        ]
        assert json.loads(text)["replay"] is False
    pytest.importorskip("gguf")
    out = tmp_path / "kind.gguf"
    assert run("export", "gguf", place / "kind", "-m", place / "tiny", "-o", out, "--replay", "--quiet")[0] == 0
    with pytest.raises(austeer.VerifyError, match="llama-server"):
        run("verify", out, "-m", place / "tiny")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("verify", "{kind}"), "neither of --url and --model"),
        (("verify", "{kind}", "-m", "{tiny}", "--url", "http://localhost:9/v1"), "both of --url and --model"),
        (("verify", "{kind}", "-m", "{tiny}"), "kind: found no replay.*--record"),
        (("verify", "{kind}", "--url", "http://localhost:9/v1"), "kind: found no replay.*--record"),
        (("verify", "{kind}", "--url", "http://localhost:9/v1", "--record"), "--record.*beside --url"),
        (("verify", "{kind}", "-m", "{tiny}", "--alpha", "2"), "--alpha: found 2 without --record"),
        (("verify", "{kind}", "-m", "{tiny}", "--alpha", "2,3", "--record"), "--alpha: found 2, expected one"),
        (("verify", "{kind}", "-m", "{tiny}", "--record", "--alpha", "0"), "alpha: found 0"),
        (("verify", "{kind}", "--url", "http://localhost:9/v1", "--body", "[1]"), r"--body: found '\[1\]'"),
        (("verify", "{tiny}.none", "-m", "{tiny}"), "tiny.none: no such file"),
        (
            ("export", "lora", "{kind}", "{kind}", "-m", "{tiny}", "-o", "{tiny}.out", "--replay"),
            "--replay: found 2 plans",
        ),
        (("export", "lora", "{kind}", "-m", "{tiny}", "-o", "{tiny}", "--replay"), "tiny: exists already"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(place, command_line, arguments, message):
    places = {"kind": place / "kind", "tiny": place / "tiny"}
    code, out, error = command_line(*(text.format(**places) for text in arguments))
    assert code == 2 and not out and re.search(message, error), error
    assert len([line for line in error.splitlines() if line.startswith("error: ")]) == 1
