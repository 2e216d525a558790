"""What `austeer tune` and `austeer compare` read from their command line: times, counts, texts, the folder."""

import re

import pytest
from typer.testing import CliRunner

from austeer.cli import app
from austeer.cli.search_options import open_folder, parse_budget, parse_counts, read_neutral
from austeer.cli.search_text import show_alpha
from austeer.errors import AusteerError, PairsError, TaskError


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("5m", 300), ("1.5 min", 90), ("2h", 7200), ("45", 45), (None, None)]
)
def test_times(text, seconds):
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "0m", "-5m", "5 parsecs", "m", "1e3s", "nan"])
def test_no_times(text):
    with pytest.raises(TaskError, match=re.escape(repr(text))):
        parse_budget(text)


def test_counts_are_sorted_and_distinct():
    assert parse_counts("--ks", "100, 10,10") == [10, 100]
    for wrong in ("", "0,10", "-1", "1.5", "ten"):
        with pytest.raises(TaskError, match=f"--ks.*'{wrong}'"):
            parse_counts("--ks", wrong)


def test_neutral_texts_are_the_lines_of_a_file(tmp_path):
    path = tmp_path / "neutral.txt"
    path.write_text("One text.\n\n  Another.  \n", encoding="utf-8")
    assert read_neutral(path) == ["One text.", "Another."] and read_neutral(None) is None
    path.write_text("One text.\n", encoding="utf-8")
    with pytest.raises(PairsError, match=f"1 texts.*{path}"):
        read_neutral(path)
    path.write_bytes(b"\xff\xfe")
    for unreadable in (path, tmp_path / "missing.txt"):
        with pytest.raises(PairsError, match=str(unreadable)):
            read_neutral(unreadable)


def test_force_removes_an_earlier_search_and_nothing_else(tmp_path):
    for name in ("search.jsonl", "momentum.safetensors", "result.json", "notes.txt"):
        (tmp_path / name).write_text("x")
    open_folder(tmp_path, force=False)
    assert len(list(tmp_path.iterdir())) == 4
    open_folder(tmp_path, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(AusteerError, match=r"notes.txt.*folder"):
        open_folder(tmp_path / "notes.txt", force=True)


def test_strengths_in_print():
    assert show_alpha(2.82842712) == "2.83" and show_alpha({"attention": 1.0, "ffn": 0.5}) == "attention 1\nffn 0.5"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune", "{data}", "--model", "demo", "--budget", "soon"], "--budget.*'soon'"),
        (["tune", "{data}", "--model", "demo", "--ks", "few"], "--ks.*'few'"),
        (["compare", "{data}", "--model", "demo", "--ks", "0"], "--ks.*'0'"),
        (["compare", "{data}", "--model", "demo", "--neutral", "{data}.none"], "--neutral.*none"),
        (["compare", "{data}", "--model", "demo"], "no row"),
        (["tune", "{data}.none.jsonl", "--model", "demo"], "no such file"),
        (["tune", "{data}", "--model", "demo", "--chat-option", "thinking"], "--chat-option.*'thinking'"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr("austeer.cli.common.load", None)
    data = tmp_path / "pairs.jsonl"
    data.write_text("")
    result = CliRunner().invoke(app, [a.format(data=data) for a in arguments] + ["--out", str(tmp_path / "out")])
    assert isinstance(result.exception, AusteerError) and re.search(message, str(result.exception))
    assert not (tmp_path / "out").exists()
