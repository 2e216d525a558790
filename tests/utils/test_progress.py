"""The progress bar: on standard error, only where it is wanted, gone after an error."""

import re
import sys

import pytest

from austeer.utils.progress import Progress


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    """What a bar's width and animation depend on."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")


def run(show):
    with Progress("measuring", 40, "texts", show) as bar:
        for _ in range(4):
            bar.advance(10)


def test_bar_is_on_standard_error(capsys):
    run(True)
    captured = capsys.readouterr()
    assert captured.out == "" and "measuring" in captured.err and "40/40" in captured.err
    assert last_rate(captured.err, "texts") > 0


@pytest.mark.parametrize("show", [False, None])
def test_no_bar_where_nobody_looks(capsys, show):
    assert not sys.stderr.isatty()
    run(show)
    assert capsys.readouterr() == ("", "")


def test_a_line_now_and_then_where_there_is_no_terminal(capsys, monkeypatch):
    """Whatever is being done: stages that are shorter than the time between lines make lines, too."""
    now = 1000.0
    monkeypatch.setattr("austeer.utils.progress.monotonic", lambda: now)
    monkeypatch.setattr("austeer.utils.progress._last_line", None)
    for stage in range(1, 8):
        with Progress(f"round {stage}", 40, "texts") as bar:
            for _ in range(4):
                now += 4  # 16 s a stage
                bar.advance(10)
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == "" and [line.partition(",")[0] for line in lines] == [
        "round 2: 40 of 40 texts",
        "round 4: 40 of 40 texts",
        "round 6: 40 of 40 texts",
    ]


def test_a_line_of_work_whose_end_is_not_known(capsys, monkeypatch):
    monkeypatch.setattr("austeer.utils.progress._last_line", -1e9)
    with Progress("measuring", None, "") as bar:
        bar.advance(7, "quiet")
    assert capsys.readouterr().err == "measuring: 7, quiet\n"
    monkeypatch.setattr("austeer.utils.progress._last_line", -1e9)
    with Progress("measuring", None, "", False) as bar:
        bar.advance(7)
    assert capsys.readouterr().err == ""


def last_rate(shown, unit):
    return float(re.findall(rf"([\d.]+) {unit}/s", shown)[-1])


def test_bar_ends_with_an_error(capsys):
    with pytest.raises(KeyError), Progress("measuring", 10, "texts", True):
        raise KeyError
    shown = capsys.readouterr().err
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l") >= 0, "the cursor is there again"


def test_note_stands_behind_the_rate(capsys):
    with Progress("measuring", 100, "pairs", True) as bar:
        bar.advance(0, "5 tokens/s")
    shown = capsys.readouterr().err
    assert "5 tokens/s" in shown and "pairs/s" not in shown, "no rate is known yet"
    with Progress("measuring", 100, "pairs", True) as bar:
        for note in ("5 tokens/s", "7 tokens/s, 3% padding"):
            bar.advance(30, note)
    assert re.search(r"[\d.]+ pairs/s, 7 tokens/s, 3% padding", capsys.readouterr().err)


def test_what_was_done_before_does_not_count_as_speed(capsys):
    # A measurement that goes on: the first step is what the checkpoint holds.
    with Progress("measuring", 10**6, "pairs", True) as bar:
        for step in (500_000, 1, 1):
            bar.advance(step)
    shown = capsys.readouterr().err
    assert "500002/1000000" in shown and last_rate(shown, "pairs") < 500_000


@pytest.mark.parametrize("totals, place", [((), "10/?"), ((200,), "20/200"), ((200, 150, None), "40/150")])
def test_a_total_that_is_not_known_or_estimated_anew(capsys, totals, place):
    with Progress("measuring", None, "pairs", True) as bar:
        for total in (None, *totals):
            bar.advance(10, total=total)
    assert place in capsys.readouterr().err
