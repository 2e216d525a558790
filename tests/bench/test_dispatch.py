"""The projection benchmark: what each variant computes, and the command."""

import json

import pytest
import torch

from austeer.costs.ceilings import Ceilings
from bench import cases, dispatch, files, report
from bench.graphs import WrongResultError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def loud():
    yield
    report.quiet = False


# --- cases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_variant_is_right_and_stays_right_after_timing(dtype):
    case = cases.Case(130, 120, 5, dtype, CPU)
    variants = case.variants()
    assert {*cases.RIVALS, *(r for rivals in cases.RIVALS.values() for r in rivals), cases.PLAIN} < set(variants)
    for variant in variants.values():
        error, own = variant.check()
        assert error <= 2 * own + 1e-4
    before = [x.abs().clone() for x in (*case.x, *case.y)]
    for variant in variants.values():
        for call in variant.calls:
            call()
    # Tables that only flip signs: what is steered in place again and again neither grows nor vanishes.
    assert all(torch.equal(x.abs(), y) for x, y in zip((*case.x, *case.y), before))
    for variant in variants.values():
        variant.check()


def test_the_fused_kernel_has_no_variant_beyond_its_tokens():
    few, many = (set(cases.Case(32, 48, tokens, torch.float32, CPU).variants()) for tokens in (64, 65))
    assert few - many == set(cases.RIVALS) and many < few


def test_a_kernel_that_leaves_an_output_unwritten_is_caught(monkeypatch):
    case = cases.Case(32, 32, 4, torch.float32, CPU)

    def lazy(x, weight, *rest, **options):
        y = torch.empty(x.shape[0], weight.shape[0])
        y[:, :-1] = torch.nn.functional.linear(x, weight)[:, :-1]
        return y

    monkeypatch.setattr(cases.ak, "steered_linear", lazy)
    with pytest.raises(WrongResultError, match=r"fused, 32x32, 4 tokens: errs by inf"):
        case.fused().check()


def test_bytes_and_operations():
    case = cases.Case(200, 300, 4, torch.bfloat16, CPU)
    moved = 2 * (200 * 300 + 4 * (200 + 300))
    assert case.plain().nbytes == moved and case.plain().operations == 2 * 4 * 200 * 300
    assert case.fused().nbytes == moved + 8 * 200
    assert case.fused(at_input=True).nbytes == moved + 8 * 300
    assert case.fused(rows=True).nbytes == moved + 8 * 8 * 200 + 4 * 4
    assert case.columns(count=10).nbytes == moved + 10 * (2 * 4 * 2 + 8 + 8)
    assert case.alone(10).nbytes == 10 * (2 * 4 * 2 + 8 + 8)


# --- the command -----------------------------------------------------------------------------------------------------


def test_quick_runs_everywhere_and_writes_its_result(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = ["--quick", "--out", str(tmp_path), "--shapes", "48x40", "--rounds", "2", "--commit", "abc"]
    assert dispatch.main(arguments) == 0
    assert dispatch.main([*arguments, "--json", "--tokens", "1"]) == 0
    first, second = sorted((tmp_path / "cpu").glob("dispatch-quick-*.json"), key=lambda p: len(p.name))
    out = capsys.readouterr().out
    content = json.loads(first.read_text())
    assert "PyTorch's plain product" in out and "these times mean nothing" in out
    assert [(r["n"], r["k"], r["tokens"]) for r in content["rows"]] == [(48, 40, 1), (48, 40, 16)]
    assert content["complete"] and content["environment"]["commit"] == "abc"
    assert content["environment"]["packages"]["torch"] == str(torch.__version__)
    ratio = content["rows"][0]["variants"][cases.FUSED]["ratio"]
    assert ratio["low"] <= ratio["median"] <= ratio["high"] and ratio["rounds"] == 2
    assert json.loads(out[out.index("\n{") :]) == json.loads(second.read_text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quick", "--write-table"], "--write-table: found no GPU, and a table may only hold what was measured"),
        ([], "on a CPU only --quick runs"),
        (["--shapes", "12by13"], "found '12by13', expected OUTxIN"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        dispatch.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--quick"], ["--tokens", "1", "16"]])
def test_a_table_needs_the_whole_series(arguments, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit):
        dispatch.parse([*arguments, "--write-table"])
    assert "expected the whole series" in capsys.readouterr().err


def test_a_result_reads_line_by_line(tmp_path):
    content = {"a": [{"x": 1 / 3, "y": "two  words"}, {"x": 2e-7, "y": {"z": [1.5, None]}}], "b": True}
    text = files.dumps(content)
    assert '{ "x": 0.333333, "y": "two  words" }' in text.splitlines()[2]
    content["a"][0]["x"] = 0.333333
    assert json.loads(text) == content


def test_results_are_never_replaced(tmp_path):
    first = files.new_file(tmp_path, CPU, "host")
    files.write(first, {"a": 1})
    second = files.new_file(tmp_path, CPU, "host")
    assert second != first and second.name == f"{first.stem}-2.json" and first.parent.name == "cpu"


@pytest.mark.gpu
def test_measuring_on_a_gpu():
    device = torch.device("cuda", torch.cuda.current_device())
    result = dispatch.measure(cases.Case(256, 512, 4, torch.bfloat16, device), Ceilings(1e12, 1e14, 0.0, "made up"), 3)
    assert all(v["seconds"]["median"] > 0 for v in result["variants"].values())
