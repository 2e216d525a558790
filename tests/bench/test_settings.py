"""Settings that are tried for the kernels, and the table that is written from what was measured of them."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch

from austeer.costs.ceilings import Ceilings
from austeer_kernels import launch
from bench import cases, dispatch, files, graphs, kernel_tables, report, settings

ROOT = Path(__file__).parents[2]
H200 = ROOT / "bench" / "results" / "nvidia-h200" / "settings-2026-11-27.json"
CPU = torch.device("cpu")
FAST = Ceilings(1e12, 1e14, 0.0, "made up")


@pytest.fixture
def own_tables(tmp_path, monkeypatch):
    """A folder of tables with a copy of the shipped ones, looked up anew before and after."""
    folder = tmp_path / "tables"
    folder.mkdir()
    for file in launch.TABLES.glob("*.json"):
        (folder / file.name).write_text(file.read_text())
    monkeypatch.setattr(launch, "TABLES", folder)
    launch.forget()
    yield folder
    monkeypatch.undo()
    launch.forget()


@pytest.fixture(autouse=True)
def loud():
    yield
    report.quiet = False


@pytest.fixture(scope="module")
def tried():
    """A quick result, of the CPU."""
    options = dispatch.parse(["--quick", "--commit", "abc", "--rounds", "2", "--shapes", "48x40"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "SAMPLE_SECONDS", {"cpu": 1e-6})
        *_, content = settings.run(options, CPU)
    return json.loads(files.dumps(content))


def measured(path, **changes):
    """A result file like the H200's with something changed."""
    content = copy.deepcopy(json.loads(H200.read_text())) | changes
    path.write_text(json.dumps(content))
    return path


def form(m, us, columns_us, n=64, k=32, rows=False):
    shape = {"n": n, "k": k, "m": m, "at_input": False, "rows": rows}
    best = dict(zip(("block_m", "block_n", "block_k", "num_warps", "num_stages", "splits"), (16, 32, 64, 4, 3, 2)))
    return shape | {"best us": us, "columns us": columns_us, "best": best}


# --- what is tried ---------------------------------------------------------------------------------------------------


def test_a_run_tries_every_form_and_kernel(tried):
    assert tried["complete"] and tried["environment"]["commit"] == "abc" and tried["environment"]["architecture"]
    rows = [(r["n"], r["k"], r["m"], launch.form(r["at_input"], r["rows"])) for r in tried["forms"]]
    assert sorted(rows) == sorted((48, 40, m, form) for m in (1, 16) for form in launch.FORMS)
    for row in tried["forms"]:
        assert row["best"] in settings.candidates(row["m"], torch.bfloat16) and row["tried"] == 2 and row["bad"] == 0
        assert min(row[f"{name} us"] for name in ("plain", "columns", "now", "best")) > 0
    assert set(tried["sparse us"]) == {"w40 m3 k10", "w40 m3 k100"}
    assert len(tried["counting"]) == 2


def test_a_run_makes_a_table(tried, tmp_path, own_tables):
    path = tmp_path / "settings-2000-01-01.json"
    path.write_text(json.dumps(tried))
    file = kernel_tables.write([path])
    table = next(t for t in launch.tables() if t.file == file.stem)
    assert {e.op for e in table.entries} == set(launch.OPERATIONS)
    assert {limit.op for limit in table.fused} == set(launch.FORMS)
    row = tried["forms"][0]
    device = tried["environment"]["architecture"], tried["environment"]["device"]
    found = launch.nearest(launch.form(row["at_input"], row["rows"]), row["m"], 48, 40, torch.bfloat16, *device)
    assert found in table.entries and found.block_k == row["best"]["block_k"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 16, 17, 64])
def test_candidates_hold_all_tokens_in_a_tile_and_are_launchable(tokens, dtype):
    found = settings.candidates(tokens, dtype)
    assert 15 < len(found) < 40
    for one in found:
        assert tokens <= one["block_m"] < max(17, 2 * tokens)
        assert all(size >= 16 and size & (size - 1) == 0 for size in (one["block_m"], one["block_n"], one["block_k"]))


def test_what_was_best_on_an_h200_would_be_tried_again():
    splits = set()
    for row in json.loads(H200.read_text())["forms"]:
        best = {name: value for name, value in row["best"].items() if name != "form"}
        near = [c for c in settings.candidates(row["m"], torch.bfloat16) if c | {"splits": 0} == best | {"splits": 0}]
        assert near, row
        splits.add(best["splits"])
    assert splits - set(settings.SPLITS) == {9}, "for which 8 will do"


def test_settings_that_fail_get_no_time(monkeypatch):
    case = cases.Case(32, 48, 4, torch.float32, CPU)
    fails = iter([False, True, False])

    def check(name, found, plain, exact):
        if name.startswith("fused") and next(fails, False):
            raise graphs.WrongResultError(f"{name}: made up")
        return 0.0, 0.0

    monkeypatch.setattr(cases, "check", check)
    row = settings.one_form(case, False, False, FAST, 2, 2)
    assert (row["tried"], row["bad"]) == (2, 1)
    assert row["best"] == settings.candidates(4, torch.float32)[1]


# --- from times to a table -------------------------------------------------------------------------------------------


def test_the_committed_table_is_that_of_the_committed_result(own_tables):
    shipped = (own_tables / "nvidia-h200.json").read_text()
    (own_tables / "nvidia-h200.json").unlink()
    assert dispatch.main(["--table-from", str(H200)]) == 0
    assert (own_tables / "nvidia-h200.json").read_text() == shipped
    source = json.loads(shipped)["source"]
    assert all(part in source for part in (H200.name, "NVIDIA H200", "2026-11-27", "30a7754", "2.11.0", "3.6.0"))


def test_a_table_from_another_kind_of_result_is_refused(own_tables, capsys):
    shipped = (own_tables / "nvidia-h200.json").read_text()
    assert dispatch.main(["--table-from", str(H200.with_name("dispatch-2026-11-27.json"))]) == 1
    assert "found a result of kind 'dispatch', expected 'settings'" in capsys.readouterr().err
    assert (own_tables / "nvidia-h200.json").read_text() == shipped


def test_a_limit_ends_at_the_first_number_of_tokens_that_is_slower():
    def found(*ratios):
        rows = [form(m, ratio, 1.0) for m, ratio in zip((1, 4, 16, 64), ratios)]
        return [limit.m for limit in kernel_tables.limits_of(rows[::-1], "bfloat16")]

    assert found(0.9, 1.0, 0.99, 1.2) == [16]
    assert found(0.9, 1.01, 0.5, 0.5) == [1]
    assert found(1.1, 0.5, 0.5, 0.5) == [0], "measured, and never worth while"
    assert found(0.9, 0.9, 0.9, 0.9) == [64]


def test_each_form_and_shape_has_its_own_limit():
    rows = [form(1, 0.9, 1.0), form(1, 1.1, 1.0, n=8), form(4, 0.9, 1.0, rows=True), form(1, 0.9, 1.0, rows=True)]
    assert kernel_tables.limits_of(rows, "float16") == [
        launch.Limit("steered_linear_output", ("float16",), 64, 32, 1),
        launch.Limit("steered_linear_output", ("float16",), 8, 32, 0),
        launch.Limit("steered_linear_output_rows", ("float16",), 64, 32, 4),
    ]


def test_settings_of_columns_are_judged_over_all_widths():
    found = {"w8 m4 k2": {"now": 0.1, "1 64 w4": 1.1, "1 128 w4": 1.0}, "w9 m4 k2": {"1 64 w4": 1.0, "1 128 w4": 1.05}}
    content = json.loads(H200.read_text()) | {"sparse us": found, "forms": [], "counting": {}}
    (entry,) = kernel_tables.entries_of(content, ("bfloat16",))
    assert (entry.op, entry.m, entry.n, entry.block_m, entry.block_n) == ("steer_columns_", 4, 2, 1, 128)


def test_later_results_count_and_each_dtype_has_its_own(tmp_path, own_tables):
    first = measured(tmp_path / "settings-2000-01-01.json", forms=[form(1, 0.9, 1.0), form(1, 0.9, 1.0, n=128)])
    again = measured(tmp_path / "settings-2000-01-02.json", forms=[form(1, 1.2, 1.0)])
    half = measured(tmp_path / "settings-2000-01-03.json", forms=[form(4, 0.9, 1.0)], dtype="float16")
    kernel_tables.write([first, again, half])
    table = next(t for t in launch.tables() if t.file == "nvidia-h200")
    assert {(x.dtypes, x.n, x.m) for x in table.fused} == {
        (("bfloat16",), 64, 0),
        (("bfloat16",), 128, 1),
        (("float16",), 64, 4),
    }
    assert {e.dtypes for e in table.entries} == {("bfloat16",), ("float16",)}
    assert all(path.name in table.source for path in (first, again, half))
    kernel_tables.write([first])
    assert {e.dtypes for e in launch.tables()[0].entries} == {("bfloat16", "float16")}


def test_a_bracket_in_a_devices_name_is_no_pattern(tmp_path, own_tables):
    environment = json.loads(H200.read_text())["environment"] | {"device": "NVIDIA H100 [80GB] HBM3"}
    kernel_tables.write([measured(tmp_path / "a.json", environment=environment)])
    table = launch.tables()[0]
    assert table.file == "nvidia-h100-80gb-hbm3"
    assert table.fits("sm_90", "NVIDIA H100 [80GB] HBM3") and not table.fits("sm_90", "NVIDIA H100 8 HBM3")
    taken = launch.entries_for("steered_linear_output", 1, torch.bfloat16, "sm_90", "NVIDIA H100 [80GB] HBM3")
    assert set(taken) <= set(table.entries), "before the table of a relative"


def test_results_of_two_devices_make_no_table(tmp_path, own_tables):
    other = json.loads(H200.read_text())["environment"] | {"device": "NVIDIA B200"}
    path = measured(tmp_path / "settings-2000-01-01.json", environment=other)
    with pytest.raises(files.ResultsError, match=r"2000-01-01\.json: found settings measured on NVIDIA B200.*H200"):
        kernel_tables.write([H200, path])
    with pytest.raises(files.ResultsError, match="found no counting"):
        path.write_text(json.dumps({k: v for k, v in json.loads(H200.read_text()).items() if k != "counting"}))
        kernel_tables.write([path])


def test_an_entry_is_written_without_its_defaults(own_tables, tmp_path):
    kernel_tables.write([H200])
    content = json.loads((own_tables / "nvidia-h200.json").read_text())
    for row in content["entries"]:
        for field in dataclasses.fields(launch.Entry):
            assert field.name not in row or row[field.name] != field.default
