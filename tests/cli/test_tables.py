"""Tables at 80 columns: every name and value of every command's is there, whole."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text
from typer.testing import CliRunner

import synthetic_results
from austeer.causal import Agreement, Correlation, Difference, Findings, Strength, Together
from austeer.cli import app, causal, compare, demo, evaluate_text, tune
from austeer.cli.common import console
from austeer.forward.timing import Timing
from austeer.tasks.evaluation import IntervalEstimate
from austeer.tuning.held_out import HeldOut, Unsteered
from austeer.tuning.tune import Trial
from austeer.tuning.writing import Text as WrittenText
from austeer.tuning.writing import Writing, Written
from austeer.utils import tables
from austeer.utils.tables import fitting
from bench import changes, report

words = st.lists(st.text("abc-_.", min_size=1, max_size=40), min_size=1, max_size=6).map(" ".join)
values = st.sampled_from(["", "7", "+0.12", "12.3%", "+0.123 [-10.123, +10.123]", "attention 0.123\nffn 4"])


@st.composite
def any_table(draw):
    """Headings, rows, and the columns of words among them."""
    count = draw(st.integers(1, 9))
    prose = draw(st.sets(st.integers(1, 9), max_size=2))
    kinds = [words if at == 0 or at in prose else values for at in range(count)]
    rows = draw(st.lists(st.tuples(*kinds), min_size=1, max_size=5, unique_by=lambda row: row[0]))
    return [draw(words) for _ in range(count)], rows, prose


@settings(max_examples=50, deadline=None)
@given(any_table(), st.integers(70, 140), st.booleans())
def test_every_cell_is_whole_and_names_are_beside_every_value(table, width, right):
    headings, rows, prose = table
    found, unbroken = [], []
    for part in fitting(headings, rows, width, prose=prose, right=right):
        terminal = Console(width=width, color_system=None)
        with terminal.capture() as capture:
            terminal.print(part)
        lines = capture.get().splitlines()
        assert max(map(len, lines)) <= width
        start, columns = 0, []
        for column in part.columns:  # what is printed in each, without its blanks
            columns.append("".join(line[start : start + column.width].replace(" ", "") for line in lines))
            start += column.width + part.padding[1]
        assert columns[0] == "".join([headings[0], *(row[0] for row in rows)]).replace(" ", "")
        found += columns[1:]
        unbroken += lines
    expected = ["".join([headings[at], *(row[at] for row in rows)]) for at in range(1, len(headings))]
    assert found == ["".join(column.split()) for column in expected]
    for row in rows:
        for at in {*range(1, len(row))} - prose:
            assert all(any(value in line for line in unbroken) for value in row[at].splitlines())


def test_one_table_where_there_is_room():
    rows = [["a", "1", "2"], ["b", "3", "4"]]
    (whole,) = fitting(["name", "one", "a long heading of a column"], rows, 80)
    assert [column.width for column in whole.columns] == [4, 3, 26]
    (tight,) = fitting(["name", "one", "a long heading of a column"], rows, 35)
    assert tight.padding[1] == 1, "one blank between columns before anything is broken"
    (broken,) = fitting(["name", "one", "a long heading of a column"], rows, 20)
    assert broken.columns[2].header.plain == "a long\nheading\nof a\ncolumn"


def test_what_tells_rows_apart_is_repeated():
    rows = [["a way", "one", "1" * 30, "2" * 30], ["a way", "other", "3" * 30, "4" * 30]]
    parts = list(fitting(["way", "which", "x", "y"], rows, 60))
    assert [[column.header.plain for column in part.columns] for part in parts] == [
        ["way", "which", "x"],
        ["way", "which", "y"],
    ]


# --- the commands ----------------------------------------------------------------------------------------------------

LONG = "difference of the means of both sides at layers 12, 14 and 16 of a very-long-model-name-with-many-parts"
INTERVAL = IntervalEstimate(0.4567, 0.4012, 0.5123)
CORRELATION = Correlation(-0.123, -0.456, 0.234)
TIMING = Timing(0.0451, 1.0123, 0.9876, 1.1234, 10)


def held_out(detail, alpha):
    return HeldOut(
        **{"name": detail, "method": "difference", "detail": detail, "site": "attention", "operation": "shift"},
        **{"k": 10240, "alpha": alpha, "layers": 30, "effect": -10.123, "low": -11.234, "high": 10.567, "share": 1.0},
        **{"accuracy": 0.567, "accuracy_low": 0.5, "accuracy_high": 0.6, "p": 1.2e-12, "kl": 0.123, "rise": 0.1},
    )


ROWS = [held_out(LONG, {"attention": 0.00123, "ffn": 1.23e-05}), held_out("12 heads", 1.23e04)]
UNSTEERED = Unsteered(1.234, 0.623, 0.5, 0.7, 400)
TRIAL = Trial("difference", LONG, "attention", "shift", 10240, 1.23e04, 0.5, 200, -10.123, -11.234, 10.567, 1.0, 0.1)
SPLIT = {"measure": {"pairs": 400}, "tune": {"items": 200}, "test": {"items": 400}, "grouped_by": "prompt"}


TEXT = WrittenText("neutral", "A [bold] trap is", " a pipe\nunder a sink " * 9, 40, 0.5, (0.5, 0.5, 0.5), -2.345, -1.0)
WRITTEN = Written(LONG, {"attention": 0.00123, "ffn": 1.23e-05}, 1.0, 40, 0.5, (0.5,) * 3, -2.345, 1.0, "", (TEXT,))
WRITING = Writing(
    {"accuracy": 0.97, "texts": 96, "layer": 15},
    replace(WRITTEN, name="unsteered", alpha=0.0),
    [replace(WRITTEN, derailed="repeats itself: 50% of 3-grams, unsteered 2%")],
    [replace(WRITTEN, part=0.5), replace(WRITTEN, part=1.5)],
    [replace(WRITTEN, alpha=9.0, derailed="unlikely text: -5.0 nats a token, unsteered -2.0")],
)


def show_compare():
    cost = {row.name: TIMING for row in ROWS} | {"unsteered again": TIMING}
    settings = {"data": SPLIT, "max_kl": 0.1}
    compare.show(
        SimpleNamespace(
            settings=settings,
            trials=[TRIAL],
            unsteered=UNSTEERED,
            held_out=ROWS,
            cost=cost,
            left_out=["a"],
            writing=WRITING,
        ),
        1,
    )


def show_tune():
    trials = [TRIAL, replace(TRIAL, k=3)]
    tune.show(
        SimpleNamespace(
            settings={"data": SPLIT}, trials=trials, unsteered=UNSTEERED, held_out=ROWS, left_out=["a"], writing=WRITING
        ),
        0.1,
        10,
        2,
    )


def show_causal():
    size = Difference(0.01234, 0.01111, -0.123456, -0.234567, 0.345678, 1.2e-12)
    spread = Agreement(75, CORRELATION, CORRELATION)
    mixed = Agreement(125, CORRELATION, CORRELATION, CORRELATION, (0.512, -0.123, 0.845), (1.012, -0.912, 1.134))
    findings = Findings(size, size, (0.5, 0.4, 0.6), CORRELATION, CORRELATION, spread, mixed)
    ways = {"scale": findings, "deviation": findings}
    verdict = {"scale": ["a sentence"], "deviation": ["another"]}
    kinds = ("random", "momentum", "effect", "per_side_effect")
    means, kl = dict.fromkeys(kinds, (-10.123, 9.876)), dict.fromkeys(kinds, 0.01234)
    strengths = [Strength(alpha, (0.912, 0.812, 0.965), (0.754, 0.612, 0.891), means, kl) for alpha in (1, 4.0, 16)]
    together = Together([None] * 32, strengths)
    about = {"n": 25, "site": "attention", "items": 32, "log_odds": 1.0}
    causal.show(SimpleNamespace(**about, findings=ways, verdict=verdict, together=together))


def show_demo():
    timings = dict.fromkeys(("unsteered", "unsteered again", LONG), TIMING)
    parts = {"pairs": {"held-out": 48}, "unsteered": UNSTEERED, "held_out": ROWS, "max_kl": 0.1}
    demo.show(SimpleNamespace(**parts, generations={}, timings=timings), console)


def show_evaluation():
    known = {"accuracy": INTERVAL, "exact": INTERVAL, "margin": INTERVAL, "margin_change": INTERVAL}
    numbers = {"accuracy_p": 1.2e-12, "exact_p": 2.3e-12, "kl": 0.123, "rise": 0.123}
    rows = [SimpleNamespace(name=name, alpha=12.3, k=10240, **known, **numbers) for name in (LONG, "b")]
    between = [SimpleNamespace(first=LONG, second=LONG[::-1], accuracy_p=1.2e-12, exact_p=2.3e-12)]
    about = {
        "task": "task",
        "kind": "choice",
        "items": 40,
        "groups": 8,
        "model": LONG,
        "chat_template": False,
        "grouped_by": "own",
    }
    evaluate_text.show(SimpleNamespace(**about, seconds={"task": 12.0}, variants=rows, between=between))


def show_lm_eval():
    scores = {"task_of_a_long_name": {"exact_match,flexible-extract": 0.1234, "acc": 0.5, "acc_stderr": 0.0123}}
    evaluate_text.show_lm_eval({"unsteered": scores, LONG.replace(" ", "-"): scores, "other": scores})


def show_bench():
    content = synthetic_results.inference("model-of-a-very-long-name-with-many-parts-135M")
    report.show(SimpleNamespace(parent=SimpleNamespace(name="cpu")), content)


def show_changes():
    before, after = synthetic_results.inference(), synthetic_results.inference(columns=(90.0, 0.1))
    changes.show(changes.compare(before, after), console)


SHOWS = [show_compare, show_tune, show_causal, show_demo, show_evaluation, show_lm_eval, show_bench, show_changes]
RATES = ["--bandwidth", "2e10", "--flops", "1e11", "--launch", "1e-6", "--host-us", "200"]
COMMANDS = [["evaluate", "--templates"], ["cost", "demo", "--k", "1000", *RATES]]


@pytest.fixture
def given_cells(monkeypatch):
    """What the commands give to be printed at 80 columns: [headings, rows] of each table."""
    kept = []

    def fitting(headings, rows, *more, **options):
        kept.append([headings, rows])
        return tables_of(headings, rows, *more, **options)

    tables_of = tables.fitting
    for module in (tables, report):
        monkeypatch.setattr(module, "fitting", fitting)
    monkeypatch.setattr(console, "_width", 80)
    return kept


def expect_whole(printed, given_cells):
    assert given_cells and "…" not in printed
    found = printed.split()
    for headings, rows in given_cells:
        for cell in [*headings, *(cell for row in rows for cell in row)]:
            text = cell.plain if isinstance(cell, Text) else cell
            assert all(word in found or len(word) > 20 for word in text.split()), text


@pytest.mark.parametrize("show", SHOWS, ids=lambda show: show.__name__)
def test_names_and_values_of_each_command(show, given_cells, capsys):
    show()
    expect_whole(capsys.readouterr().out, given_cells)


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda arguments: arguments[0])
def test_names_and_values_of_commands_that_need_no_model(arguments, given_cells):
    expect_whole(CliRunner().invoke(app, arguments).output, given_cells)


def commands(group, path=()):
    """The path and the options of every command."""
    found = getattr(group, "commands", {})
    for name, command in found.items():
        yield from commands(command, (*path, name))
    if not found:
        yield path, [name for option in group.params for name in (*option.opts, *option.secondary_opts)]


@pytest.mark.parametrize("path, options", list(commands(typer.main.get_command(app))), ids=" ".join)
def test_names_of_options_in_the_help(path, options, monkeypatch):
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 80)
    printed = CliRunner().invoke(app, [*path, "--help"]).output
    assert "…" not in printed and max(map(len, printed.splitlines())) <= 80
    for name in options:
        assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", printed) or not name.startswith("-"), name
