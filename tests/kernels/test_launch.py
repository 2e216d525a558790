"""Tables of launch settings: their contents, and which entry a shape on a device gets."""

import json
from pathlib import Path

import pytest
import torch

from austeer_kernels import launch

CPU = torch.device("cpu")
OUTPUT = "steered_linear_output"
H200, H100, A100 = ("sm_90", "NVIDIA H200"), ("sm_90", "NVIDIA H100 80GB HBM3"), ("sm_80", "NVIDIA A100-SXM4-80GB")
SETTINGS = Path(__file__).parents[2] / "bench" / "results" / "nvidia-h200" / "settings-2026-11-27.json"


@pytest.fixture
def fresh():
    """Forgets what was looked up, before and after a test that replaces tables."""

    launch.forget()
    yield
    launch.forget()


def write_table(folder, name, entries, **content):
    content = {"source": "test", "architectures": ["*"], "devices": ["*"], "entries": entries, **content}
    (folder / f"{name}.json").write_text(json.dumps(content))


def entry(block_m, m=1, n=64, k=64, **changes):
    row = {"op": OUTPUT, "dtypes": ["float32"], "m": m, "n": n, "k": k}
    return {**row, "block_m": block_m, "block_n": 64, "block_k": 64, "num_warps": 4, **changes}


def test_every_table_says_where_its_numbers_come_from():
    for table in launch.tables():
        assert table.source, table.file
    assert "not measured" in launch.tables()[-1].source and launch.tables()[-1].file == "default"


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_operation_and_dtype_has_an_entry(architecture):
    listed = {(e.op, d) for _, e in launch.shipped(architecture) for d in e.dtypes}
    assert listed == {(op, d) for op in launch.OPERATIONS for d in ("float16", "bfloat16", "float32")}


def test_entries_are_launchable():
    for table in launch.tables():
        for e in table.entries:
            for number in (e.block_m, e.block_n, e.num_warps, max(e.block_k, 1)):
                assert number & (number - 1) == 0 and number > 0, (table.file, e)
            if e.op in launch.FORMS:
                assert min(e.block_m, e.block_n, e.block_k) >= 16, (table.file, e)
                assert e.m <= launch.MOST_TOKENS, (table.file, e, "which no launch is near to")


def test_the_nearest_entry_is_taken(fresh, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "TABLES", tmp_path)
    entries = [entry(16), entry(32, m=64), entry(64, m=64, n=4096, k=4096)]
    write_table(tmp_path, "default", entries)

    def block_m(m, n, k):
        return launch.settings(OUTPUT, m, n, k, torch.float32, CPU).block_m

    assert block_m(1, 64, 64) == block_m(5, 100, 30) == 16
    assert block_m(60, 64, 64) == block_m(4000, 64, 64) == 32
    assert block_m(1, 4096, 4096) == 64, "the nearest N and K come before the nearest M"


def test_the_table_that_names_a_device_wins(fresh, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "TABLES", tmp_path)
    write_table(tmp_path, "default", [entry(16)])
    write_table(tmp_path, "hopper", [entry(32, m=64)], architectures=["sm_90"])
    write_table(tmp_path, "a-h200", [entry(128)], architectures=["sm_90"], devices=["*H200*", "*H100*"])
    write_table(tmp_path, "h200", [entry(64)], architectures=["sm_90"], devices=["*H200*"])
    found = [
        launch.entries_for(OUTPUT, 1, torch.float32, *d)[0].block_m for d in (H200, H100, ("sm_90", "NVIDIA H20"), A100)
    ]
    assert found == [64, 128, 32, 16]
    # A device of this architecture can be given the first three; the last is covered by "hopper".
    assert [name for name, _ in launch.shipped("sm_90")] == ["h200", "a-h200", "hopper"]


def test_more_tokens_than_a_table_knows_go_to_the_next(fresh, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "TABLES", tmp_path)
    write_table(tmp_path, "default", [entry(64, m=32)])
    write_table(tmp_path, "h200", [entry(16, m=16)], architectures=["sm_90"])

    def block_m(m):
        return launch.nearest(OUTPUT, m, 64, 64, torch.float32, *H200).block_m

    assert [block_m(m) for m in (1, 16, 17, 64)] == [16, 16, 64, 64]
    assert [(name, e.m) for name, e in launch.shipped("sm_90")] == [("h200", 16), ("default", 32)]


def test_an_operation_that_a_table_lacks_comes_from_the_next(fresh, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "TABLES", tmp_path)
    write_table(tmp_path, "default", [entry(16), entry(32, dtypes=["bfloat16"])])
    write_table(tmp_path, "hopper", [entry(64, m=64)], architectures=["sm_90"])
    assert launch.entries_for(OUTPUT, 1, torch.bfloat16, "sm_90", "x")[0].block_m == 32
    assert [(n, e.dtypes) for n, e in launch.shipped("sm_90")] == [("hopper", ("float32",)), ("default", ("bfloat16",))]


def test_a_broken_entry_is_named(fresh, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "TABLES", tmp_path)
    write_table(tmp_path, "default", [{"op": OUTPUT, "dtypes": ["float32"]}])
    with pytest.raises(ValueError, match=r"default\.json: entry .*steered_linear_output.* does not fit"):
        launch.tables()


@pytest.mark.parametrize("unknown", [{"splits": 3}, {"op": "steered_linear"}])
def test_an_unknown_key_or_operation_is_refused(fresh, tmp_path, monkeypatch, unknown):
    monkeypatch.setattr(launch, "TABLES", tmp_path)
    write_table(tmp_path, "default", [entry(16, **unknown)])
    with pytest.raises(ValueError, match=r"default\.json: entry .* does not fit: .*(splits|'steered_linear')"):
        launch.tables()


def test_a_dtype_without_an_entry_is_named():
    with pytest.raises(ValueError, match=r"no table in .* for momentum_update in torch\.float64"):
        launch.settings("momentum_update", 1, 1, 0, torch.float64, CPU)


def test_few_columns_and_many_rows_fill_the_gpu():
    e = next(e for _, e in launch.shipped("sm_90") if e.op == "momentum_update")
    blocks = 576 // e.block_n + 1
    assert blocks * e.splits(100_000, 576, 0, 132) > 132
    assert e.splits(1000, 1 << 20, 0, 132) == 1, "many columns need no split"
    assert e.splits(1, 576, 0, 132) == 1, "one row cannot be split"


@pytest.mark.parametrize(("m", "k"), [(1, 4096), (1, 14336), (16, 576), (1, 1), (1, 0), (64, 1000)])
def test_splits_cover_k_without_an_idle_one(m, k):
    found = set()
    for _, e in launch.shipped("sm_90"):
        if e.op in launch.FORMS:
            splits, tiles = e.splits(m, 4096, k, 132), -(-k // e.block_k)
            assert 1 <= splits <= e.max_splits
            share = -(-tiles // splits)
            assert share * splits >= tiles and (splits == 1 or share * (splits - 1) < tiles)
            found.add(splits)
    assert k < 64 or max(found) > 1, "a small output is not split"


def test_a_repeated_look_up_is_one_in_a_cache():
    shape = (OUTPUT, 7, 576, 1536, torch.float32, CPU)
    assert launch.settings(*shape) is launch.settings(*shape)


# --- the H200's table, measured ---------------------------------------------------------------------------------------


@pytest.fixture(params=[H200, H100], ids=["H200", "H100"])
def hopper(request, monkeypatch):
    """A device that says it is one of the two; both have 132 multiprocessors."""
    launch.forget()
    monkeypatch.setattr(launch, "device_profile", lambda device: (*request.param, 132))
    yield torch.device("cuda", 0)
    launch.forget()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_measured_shape_gets_the_settings_that_were_best(hopper, dtype):
    forms = json.loads(SETTINGS.read_text())["forms"]
    assert len(forms) == 32 and {launch.form(row["at_input"], row["rows"]) for row in forms} == set(launch.FORMS)
    for row in forms:
        op = launch.form(row["at_input"], row["rows"])
        best = {name: value for name, value in row["best"].items() if name != "form"}
        found = launch.settings(op, row["m"], row["n"], row["k"], dtype, hopper)
        assert found == launch.Settings(**best), row


def test_other_kernels_get_what_was_best(hopper):
    assert launch.settings("momentum_update", 1000, 131072, 0, torch.bfloat16, hopper) == launch.Settings(
        block_m=4, block_n=256, block_k=0, num_warps=4, num_stages=4, splits=1
    )
    for tokens, count, block in ((1, 100, (1, 128)), (4096, 100, (1, 128)), (1, 10, (1, 128)), (4096, 10, (16, 16))):
        found = launch.settings("steer_columns_", tokens, count, 0, torch.bfloat16, hopper)
        assert (found.block_m, found.block_n, found.num_warps) == (*block, 4)


def test_a_form_is_fused_where_it_was_no_slower_than_product_and_columns(hopper):
    def limits(n, k, dtype=torch.bfloat16):
        forms = [(False, False), (False, True), (True, False), (True, True)]
        return [launch.fused_up_to(n, k, dtype, hopper, at_input=side, rows=rows) for side, rows in forms]

    assert limits(4096, 4096) == limits(4096, 14336) == limits(4608, 4096) == [16, 16, 16, 16]
    assert limits(3584, 14336) == limits(8192, 8192) == [16, 16, 16, 0], "slower; not what its neighbour may do"
    assert limits(576, 1536) == limits(4096, 4096, torch.float16) == [0, 0, 0, 0], "not measured"


def test_an_a100_has_no_measured_table(fresh, monkeypatch):
    monkeypatch.setattr(launch, "device_profile", lambda device: (*A100, 108))
    device = torch.device("cuda", 0)
    assert launch.fused_up_to(4096, 14336, torch.bfloat16, device) == 0
    assert launch.nearest(OUTPUT, 1, 4096, 14336, torch.bfloat16, *A100) in launch.tables()[-1].entries


def test_many_tokens_and_float32_have_the_estimates_of_the_default_table(hopper):
    default = launch.tables()[-1].entries
    for op in launch.FORMS:
        assert launch.nearest(op, 64, 4096, 4096, torch.bfloat16, *launch.names_of(hopper)) in default
        assert launch.nearest(op, 1, 4096, 4096, torch.float32, *launch.names_of(hopper)) in default
