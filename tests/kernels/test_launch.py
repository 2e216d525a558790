"""Tables of launch settings: their contents, and which entry a shape on a device gets."""

import json

import pytest
import torch

from austeer_kernels import launch

CPU = torch.device("cpu")
OPS = ("momentum_update", "steer_columns_", "steered_linear", "steered_linear_rows")


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
    row = {"op": "steered_linear", "dtypes": ["float32"], "m": m, "n": n, "k": k}
    return {**row, "block_m": block_m, "block_n": 64, "block_k": 64, "num_warps": 4, **changes}


def test_every_table_says_where_its_numbers_come_from():
    for table in launch.tables():
        assert table.source, table.file
    assert "not measured" in launch.tables()[-1].source and launch.tables()[-1].file == "default"


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_operation_and_dtype_has_an_entry(architecture):
    listed = {(e.op, d) for _, e in launch.shipped(architecture) for d in e.dtypes}
    assert listed == {(op, d) for op in OPS for d in ("float16", "bfloat16", "float32")}


def test_entries_are_launchable():
    for table in launch.tables():
        for e in table.entries:
            for number in (e.block_m, e.block_n, e.num_warps, max(e.block_k, 1)):
                assert number & (number - 1) == 0 and number > 0, (table.file, e)
            if e.op.startswith("steered_linear"):
                assert min(e.block_m, e.block_n, e.block_k) >= 16, (table.file, e)
                assert e.m <= launch.MOST_TOKENS, (table.file, e, "which no launch is near to")


def test_the_nearest_entry_is_taken(fresh, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "TABLES", tmp_path)
    entries = [entry(16), entry(32, m=64), entry(64, m=64, n=4096, k=4096)]
    write_table(tmp_path, "default", entries)

    def block_m(m, n, k):
        return launch.settings("steered_linear", m, n, k, torch.float32, CPU).block_m

    assert block_m(1, 64, 64) == block_m(5, 100, 30) == 16
    assert block_m(60, 64, 64) == block_m(4000, 64, 64) == 32
    assert block_m(1, 4096, 4096) == 64, "the nearest N and K come before the nearest M"


def test_the_table_that_names_a_device_wins(fresh, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "TABLES", tmp_path)
    write_table(tmp_path, "default", [entry(16)])
    write_table(tmp_path, "hopper", [entry(32)], architectures=["sm_90"])
    write_table(tmp_path, "h200", [entry(64)], architectures=["sm_90"], devices=["*H200*"])
    found = [
        launch.entries_for("steered_linear", torch.float32, *d)[0].block_m
        for d in (
            ("sm_90", "NVIDIA H200"),
            ("sm_90", "NVIDIA H100 80GB HBM3"),
            ("sm_80", "NVIDIA A100"),
        )
    ]
    assert found == [64, 32, 16]
    # A device of this architecture can be given the first two; the third is covered by "hopper".
    assert [name for name, _ in launch.shipped("sm_90")] == ["h200", "hopper"]


def test_an_operation_that_a_table_lacks_comes_from_the_next(fresh, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "TABLES", tmp_path)
    write_table(tmp_path, "default", [entry(16), entry(32, dtypes=["bfloat16"])])
    write_table(tmp_path, "hopper", [entry(64)], architectures=["sm_90"])
    assert launch.entries_for("steered_linear", torch.bfloat16, "sm_90", "x")[0].block_m == 32
    assert [(n, e.dtypes) for n, e in launch.shipped("sm_90")] == [("hopper", ("float32",)), ("default", ("bfloat16",))]


def test_a_broken_entry_is_named(fresh, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "TABLES", tmp_path)
    write_table(tmp_path, "default", [{"op": "steered_linear", "dtypes": ["float32"]}])
    with pytest.raises(ValueError, match=r"default\.json: entry .*steered_linear.* does not fit"):
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
        if e.op.startswith("steered_linear"):
            splits, tiles = e.splits(m, 4096, k, 132), -(-k // e.block_k)
            assert 1 <= splits <= e.max_splits
            share = -(-tiles // splits)
            assert share * splits >= tiles and (splits == 1 or share * (splits - 1) < tiles)
            found.add(splits)
    assert k < 64 or max(found) > 1, "a small output is not split"


def test_a_repeated_look_up_is_one_in_a_cache():
    shape = ("steered_linear", 7, 576, 1536, torch.float32, CPU)
    assert launch.settings(*shape) is launch.settings(*shape)
