"""The progress bar: on standard error, only where it is wanted, gone after an error."""

import sys

import pytest

from austeer.utils.progress import Progress


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    """What a bar's width and animation depend on."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")


def run(show, total=40):
    with Progress("measuring", total, "texts", show) as bar:
        for _ in range(4):
            bar.advance(total // 4)


def test_bar_is_on_standard_error(capsys):
    run(True)
    captured = capsys.readouterr()
    assert captured.out == "" and "measuring" in captured.err and "40/40" in captured.err and "texts" in captured.err


@pytest.mark.parametrize("show", [False, None])
def test_no_bar_where_nobody_looks(capsys, show):
    assert not sys.stderr.isatty()
    run(show)
    assert capsys.readouterr() == ("", "")


def test_rate_is_units_a_second(capsys):
    with Progress("measuring", 100, "texts", True) as bar:
        bar.advance(30)
        bar.advance(30)
        rate = bar._bar.tasks[0].fields["rate"]
    assert rate.endswith(" texts/s") and float(rate.split()[0]) > 0


def test_bar_ends_with_an_error(capsys):
    with pytest.raises(KeyError), Progress("measuring", 10, "texts", True) as bar:
        raise KeyError
    assert not bar._bar.live.is_started


def test_more_than_the_total_is_no_error(capsys):
    with Progress("measuring", 1, "texts", True) as bar:
        bar.advance(5)
    assert "measuring" in capsys.readouterr().err


def test_note_stands_behind_the_rate(capsys):
    with Progress("measuring", 100, "pairs", True) as bar:
        bar.advance(0, "5 tokens/s")
        assert bar._bar.tasks[0].fields["rate"] == "5 tokens/s", "no rate is known yet"
        bar.advance(30)
        bar.advance(30, "7 tokens/s, 3% padding")
        rate = bar._bar.tasks[0].fields["rate"]
    assert rate.endswith(" pairs/s, 7 tokens/s, 3% padding") and float(rate.split()[0]) > 0
    assert "7 tokens/s, 3% padding" in capsys.readouterr().err


def test_what_was_done_before_does_not_count_as_speed(capsys):
    # A measurement that goes on: the first step is what the checkpoint holds.
    with Progress("measuring", 10**6, "pairs", True) as bar:
        bar.advance(500_000)
        bar.advance(1)
        bar.advance(1)
        assert bar._bar.tasks[0].completed == 500_002 and bar._bar.tasks[0].speed < 500_000


def test_a_total_that_is_not_known_or_estimated_anew(capsys):
    with Progress("measuring", None, "pairs", True) as bar:
        bar.advance(10)
        assert bar._bar.tasks[0].total is None
        for total in (200, 150):
            bar.advance(10, total=total)
            assert bar._bar.tasks[0].total == total
        bar.advance(10)
        assert bar._bar.tasks[0].total == 150 and bar._bar.tasks[0].completed == 40
    assert "40/150" in capsys.readouterr().err
