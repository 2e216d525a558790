"""Chrome traces: every way in a range of its own, steered while it is traced; and what is refused."""

import gzip
import io
import json

import pytest
import torch
from rich.console import Console

from austeer.errors import AusteerError
from bench import catalogue, steps, trace
from bench.lineup import Case
from bench.plain_ways import Formula
from bench.steered import UnavailableError, Way
from tiny_models import tiny_model

CASE = Case(k=30, prompt_tokens=6)


def absent(model, plan, alpha):
    raise UnavailableError("absent [1.0]: found no module 'absent'")


def ways(*names):
    return catalogue.chosen(names) | {
        "crooked": Way("crooked", lambda model, plan, alpha: Formula(model, plan, alpha / 2)),
        "absent": Way("absent", absent),
        "whole": Way("whole", Formula, module=False),
    }


def annotations(events):
    return {e["name"]: (e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == "user_annotation"}


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """(rows, events of the file)"""
    path = tmp_path_factory.mktemp("trace") / "steps.json.gz"
    model = tiny_model()
    rows = trace.write_trace(model, CASE, ways("public", "dense hook", "fold"), path)
    assert all(map(torch.equal, model.parameters(), tiny_model().parameters()))
    with gzip.open(path) as file:
        return rows, json.load(file)["traceEvents"]


def row_of(rows, way, phase):
    (row,) = (row for row in rows if (row["way"], row["phase"]) == (way, phase))
    return row


def test_each_way_has_its_range_one_after_the_other(traced):
    _, events = traced
    found = annotations(events)
    names = ["unsteered", "unsteered again", "public", "dense hook", "fold", "whole"]
    assert [name for name in found if ":" not in name] == names
    ends = [0.0]
    for name in names:
        begin, end = found[name]
        assert begin >= ends[-1]
        ends.append(end)
        for phase in ("generate",) if name == "whole" else ("prefill", "decode"):
            assert begin <= found[f"{name}: {phase}"][0] <= found[f"{name}: {phase}"][1] <= end


def test_a_range_holds_the_operations_of_its_way(traced):
    _, events = traced
    found = annotations(events)

    def count(name, operation):
        begin, end = found[name]
        return sum(e.get("name") == operation and begin <= e["ts"] < end for e in events if e.get("cat") == "cpu_op")

    base = {
        operation: count("unsteered: decode", operation) for operation in ("aten::mul", "aten::mul_", "aten::copy_")
    }
    decoded = 3 * trace.STEPS  # layers times steps
    assert count("public: decode", "aten::mul") == base["aten::mul"] + decoded
    assert count("public: decode", "aten::copy_") == base["aten::copy_"] + decoded
    assert count("dense hook: decode", "aten::mul_") == base["aten::mul_"] + decoded
    assert count("dense hook: prefill", "aten::mul_") == base["aten::mul_"] + 3
    assert all(count("fold: decode", operation) == base[operation] for operation in base)


def test_the_table_has_a_line_for_each_way_and_phase(traced):
    rows, _ = traced
    assert [row["way"] for row in rows] == [
        *("unsteered", "unsteered", "unsteered again", "unsteered again", "public", "public"),
        *("dense hook", "dense hook", "fold", "fold", "crooked", "absent", "whole"),
    ]
    for row in rows:
        if not row["reason"]:
            assert 0 < row["host_seconds"] < 10
    json.dumps(rows)


def test_what_is_wrong_or_missing_is_not_in_the_trace_and_says_why(traced):
    rows, events = traced
    assert "differs from the formula" in row_of(rows, "crooked", "")["reason"]
    assert "found no module 'absent'" in row_of(rows, "absent", "")["reason"]
    assert not {"crooked", "absent"} & set(annotations(events))
    console = Console(file=io.StringIO(), width=160)
    trace.show_trace(rows, "t.json", console)
    shown = console.file.getvalue()
    assert "absent [1.0]: found no module" in " ".join(shown.split()) and "dense hook" in shown


def test_a_compiled_step_has_no_prefill(tmp_path, monkeypatch):
    """Everything but the compiler; the file is not compressed."""
    monkeypatch.setattr(torch, "compile", lambda call, **options: call)
    path, model, seen = tmp_path / "steps.json", tiny_model(), []
    before = [p.clone() for p in model.parameters()]

    class Watched(steps.Step):
        def advance(self, count):
            super().advance(count)
            seen.append(not all(map(torch.equal, model.parameters(), before)))

    monkeypatch.setattr(steps, "Step", Watched)
    found = trace.write_trace(model, Case("compile", k=30, prompt_tokens=6), ways("fold"), path)
    assert [(row["way"], row["phase"]) for row in found] == [
        *(("unsteered", "decode"), ("unsteered again", "decode"), ("fold", "decode")),
        *(("crooked", ""), ("absent", ""), ("whole", "")),
    ]
    assert seen == [False, False, True] * 2, "folded while it is traced, in the warm-up and in the trace, and only then"
    assert found[-1]["reason"] == "skipped: it runs eagerly only"
    assert "fold: decode" in annotations(json.loads(path.read_text())["traceEvents"])
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize(
    "name, message",
    [
        ("trace.txt", "found the name 'trace.txt', expected one that ends in .json or .json.gz"),
        (".json.gz", "found the name '.json.gz'"),
        ("folder.json", "folder.json cannot be written"),
        ("none/trace.json", "trace.json cannot be written"),
    ],
)
def test_a_path_that_cannot_be_written_is_refused_before_any_work(tmp_path, name, message):
    (tmp_path / "folder.json").mkdir()
    worked = []
    with pytest.raises(AusteerError, match=message):
        trace.write_trace(tiny_model(), CASE, ways(), tmp_path / name, on_way=worked.append)
    assert not worked


def test_a_case_that_cannot_be_is_refused_before_any_work(tmp_path):
    worked = []
    with pytest.raises(AusteerError, match="found a CPU, expected a GPU"):
        trace.write_trace(tiny_model(), Case("graph"), ways(), tmp_path / "a.json", on_way=worked.append)
    assert not worked and not list(tmp_path.iterdir())


@pytest.mark.gpu
def test_a_trace_of_a_gpu_has_its_kernels(tmp_path):
    model = tiny_model().cuda()
    trace.write_trace(model, CASE, catalogue.chosen(["columns", "fold"]), tmp_path / "a.json")
    events = json.loads((tmp_path / "a.json").read_text())["traceEvents"]
    assert any(e.get("cat") == "kernel" for e in events)
