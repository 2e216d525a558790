"""``austeer pairs`` as a user runs it."""

import functools
import json
import re

import pytest
import torch

import austeer
from austeer.cli.common import load
from austeer.making.unfinished_run import partial_path
from places import SHARED_DATA as DATA

TEMPLATE = ("pairs", "make", "template", "--prompt", "The {noun} was", "--positive", " {good}", "--negative", " {bad}")
VALUES = ("--value", "noun=film,book", "--value", "good=fine,clever", "--value", "bad=poor,silly")
TWO = ("--positive-prompt", "Answer kindly.", "--negative-prompt", "Answer rudely.")


@pytest.fixture(scope="module")
def place(demo, tiny_of, tmp_path_factory):
    """A folder with a small model that has a chat template, one that has none, and pairs."""
    place = tmp_path_factory.mktemp("pairs")
    for name in ("model", "plain"):
        tiny_of("llama").save_pretrained(place / name)
        demo[1].save_pretrained(place / name)
    for path in (place / "plain").glob("chat_template*"):
        path.unlink()
    path = place / "plain" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("chat_template", None)
    path.write_text(json.dumps(settings))
    rows = [{"prompt": f"Question {i}?", "positive": f" yes {i}", "negative": f" no {i}"} for i in range(30)]
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "prompts.txt").write_text("One?\nTwo?\nThree?\n")
    return place


#: Each model is read once for all tests.
once = functools.cache(load)


@pytest.fixture
def run(monkeypatch, command_line):
    monkeypatch.setattr("austeer.cli.common.load", once)
    return command_line


def test_a_template_to_a_file(run, tmp_path):
    out = tmp_path / "p.jsonl"
    code, text, _ = run(*TEMPLATE, *VALUES, "--out", out)
    assert code == 0 and "4 pairs" in text and f"next: austeer pairs check {out}" in text
    assert austeer.load_pairs(out)[0] == austeer.Pair("The film was", " fine", " poor")
    before = out.read_bytes()
    code, _, error = run(*TEMPLATE, *VALUES, "--out", out)
    assert code == 2 and f"{out}: exists" in error and out.read_bytes() == before
    code, text, _ = run(*TEMPLATE, *VALUES, "--out", out, "--force", "--count", 3, "--json")
    assert code == 0 and json.loads(text)["pairs"] == 3
    code, _, error = run(*TEMPLATE, *VALUES[:-2], "--out", tmp_path / "q.jsonl")
    assert code == 2 and "{bad}" in error and not (tmp_path / "q.jsonl").exists()


def test_a_task_in_the_neutral_format(run, tmp_path):
    rows = [{"prompt": f"Row {i}. Answer:", "answer": 10 + i} for i in range(8)]
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, text, error = run("pairs", "make", "task", tmp_path / "task.jsonl", "--out", tmp_path / "p.jsonl")
    assert code == 0 and "8 pairs" in text and "other rows" in error
    assert austeer.load_pairs(tmp_path / "p.jsonl")[3].positive == " 13"
    code, _, error = run("pairs", "make", "task", tmp_path / "task.jsonl", "--out", tmp_path / "p.csv")
    assert code == 2 and "'.csv'" in error
    same = [{"prompt": f"Row {i}. Answer:", "answer": 10} for i in range(8)]
    (tmp_path / "same.jsonl").write_text("".join(json.dumps(row) + "\n" for row in same))
    code, _, error = run("pairs", "make", "task", tmp_path / "same.jsonl", "--out", tmp_path / "q.jsonl")
    assert code == 2 and "answers" in error
    code, _, error = run(
        "pairs", "make", "task", tmp_path / "task.jsonl", "--out", tmp_path / "q.jsonl", "--where", "a"
    )
    assert code == 2 and "--where: found 'a'" in error


def test_what_leads_to_a_letter_reaches_the_momentum(run, place, tmp_path):
    row = {"asks-for": "cause", "a1": "It rained.", "a2": "It was dry."}
    rows = [row | {"p": f"There were {i}.", "most-plausible-alternative": i % 2 + 1} for i in range(6)]
    (tmp_path / "copa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "p.jsonl"
    assert run("pairs", "make", "task", tmp_path / "copa.jsonl", "--template", "copa", "--out", out)[0] == 0
    model, momentum = place / "model", tmp_path / "m.momentum"
    assert run("measure", out, "--model", model, "--chat", "--out", momentum, "--quiet")[0] == 0
    network, tokenizer = once(str(model), "auto", None)
    task = austeer.tasks.load_task(tmp_path / "copa.jsonl", "copa").with_chat_template(tokenizer)
    expected = austeer.measure(network, tokenizer, task.pairs(), progress=False)
    found = austeer.Momentum.load(momentum)
    for name, counters in expected.sites.items():
        assert torch.equal(found.sites[name].positive, counters.positive)
        assert torch.equal(found.sites[name].negative, counters.negative)


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")
def test_boolq_balanced(run, tmp_path):
    out = tmp_path / "boolq.jsonl"
    code, text, _ = run(
        *("pairs", "make", "task", DATA / "boolq_a.jsonl", "--template", "boolq", "--balance", "--out", out, "--json")
    )
    data = json.loads(text)
    pairs = austeer.load_pairs(out)
    assert code == 0 and data["pairs"] == len(pairs) == 1000 - data["dropped"]["left out to balance"]
    assert sum(p.positive == " yes" for p in pairs) * 2 == len(pairs)


def test_two_instructions(run, place, tmp_path):
    out = tmp_path / "p.jsonl"
    make = ("pairs", "make", "instructions", place / "prompts.txt", *TWO, "--max-new-tokens", 6, "--device", "cpu")
    code, text, error = run(*make, "--model", place / "model", "--no-same-length", "--out", out, "--quiet", "--resume")
    assert code == 0 and "no unfinished run" in error and "--chat" in error and f"wrote {out}" in text
    assert {p.prompt for p in austeer.load_pairs(out)} <= {"One?", "Two?", "Three?"}
    plain = tmp_path / "plain.jsonl"
    code, _, error = run(
        *make, "--model", place / "plain", "--no-same-length", "--out", plain, "--quiet", "--samples", 2
    )
    assert code == 0 and "no chat template" in error and not partial_path(plain).exists()
    assert 3 < len(austeer.load_pairs(plain)) <= 6, "samples differ without a temperature being named"
    # An unfinished run is neither lost nor taken up unasked.
    partial_path(out).write_text("")
    code, _, error = run(*make, "--model", place / "model", "--out", out)
    assert code == 2 and f"{out}: exists" in error
    out.unlink()
    code, _, error = run(*make, "--model", place / "model", "--out", out)
    assert code == 2 and "--resume" in error and partial_path(out).exists()
    code, _, error = run(*make, "--model", place / "model", "--no-same-length", "--out", out, "--force", "--quiet")
    assert code == 0 and out.exists() and not partial_path(out).exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        (("--negative-prompt", "Answer kindly."), "both sides"),
        (("--negative-prompt", ""), "''"),
        (("--out", "p.txt"), "'.txt'"),
        (("none.txt",), "none.txt"),
    ],
)
def test_what_is_refused_before_a_model_is_loaded(run, monkeypatch, tmp_path, changes, message):
    monkeypatch.setattr("austeer.cli.common.load", None)
    monkeypatch.chdir(tmp_path)
    code, _, error = run("pairs", "make", "instructions", "-m", "none", *TWO, "--out", "p.jsonl", *changes)
    assert code == 2 and message in error and not list(tmp_path.iterdir())


def test_a_check_needs_no_weights(run, place, monkeypatch):
    monkeypatch.setattr("austeer.cli.common.load", None)
    code, text, _ = run("pairs", "check", place / "pairs.jsonl", "--model", place / "model")
    assert code == 0 and "30 pairs, 30 of them with two sides" in text
    assert text.index("answer words") < text.index("blank sides"), "the gravest first"
    assert re.search("'yes'.*positive.*30", text) and "->" in text
    code, text, _ = run("pairs", "check", place / "pairs.jsonl", "--model", place / "model", "--json", "--limit", 5)
    data = json.loads(text)
    assert data["pairs"] == 5 and data["length_control"] is None
    levels = {finding["name"]: finding["level"] for finding in data["findings"]}
    assert levels["number of pairs"] == "grave" and levels["length"] == "ok"


def test_a_check_with_momentum(run, place, tmp_path):
    model, pairs = place / "model", place / "pairs.jsonl"
    run("measure", pairs, "--model", model, "--sites", "ffn", "--chat", "--out", tmp_path / "m", "--device", "cpu")
    check = ("pairs", "check", pairs, "--model", model, "--momentum", tmp_path / "m", "--device", "cpu", "--k", 20)
    control = tmp_path / "control.jsonl"
    code, text, _ = run(*check, "--chat", "--json", "--out-control", control, "--control-pairs", 12)
    data = json.loads(text)
    assert code == 0 and list(data["length_control"]["sites"]) == ["ffn"] and data["control_file"] == str(control)
    written = austeer.load_pairs(control)
    assert len(written) == data["length_control"]["pairs"] == 12
    assert all(p.prompt.startswith("Question") and p.positive.endswith(p.negative.strip()) for p in written)
    code, _, error = run(*check, "--chat", "--out-control", control)
    assert code == 2 and f"{control}: exists" in error
    code, _, error = run(*check)
    assert code == 2 and "chat template" in error
    code, _, error = run(*check, "--chat", "--limit", 20, "--quiet")
    assert code == 0 and re.search("30 pairs.* 20", error)
    code, text, _ = run("pairs", "check", pairs, "--model", model, "--control", "--device", "cpu", "--k", 9, "--quiet")
    assert code == 0 and "top 9 AUs" in text


def test_a_check_of_what_cannot_be_checked(run, place, tmp_path):
    code, _, error = run("pairs", "check", tmp_path / "none.jsonl", "--model", place / "model")
    assert code == 2 and "none.jsonl: no such file" in error
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "good": "b", "bad": "c"}\n' * 2)
    code, _, error = run("pairs", "check", tmp_path / "p.jsonl", "--model", place / "model")
    assert code == 2 and "--positive-field" in error
    (tmp_path / "m").write_text("")
    code, _, error = run(
        "pairs", "check", place / "pairs.jsonl", "--model", place / "model", "--momentum", tmp_path / "m"
    )
    assert code == 2 and "austeer-momentum" in error
