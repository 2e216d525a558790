"""Rows of Parquet files and Hugging Face datasets: only what is needed, in order, and damage named by its row."""

import json
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from austeer import PairsError
from austeer.pairs.parquet import BATCH
from austeer.pairs.readers import open_source

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

FIELDS = ("prompt", "positive", "negative")


@pytest.fixture(autouse=True)
def no_network(tmp_path, monkeypatch):
    """The Hub is out of reach, and what the library keeps lies in the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def rows_of(count, **more):
    return [{"prompt": f"p{i}", "positive": " a", "negative": f" {i}"} | more for i in range(count)]


def parquet(path, rows, **options):
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def read(source, columns=FIELDS, split=None):
    return list(open_source(source, split).read(columns))


def prompts(source, split=None):
    return [row["prompt"] for _, row in read(source, split=split)]


def not_utf8(values):
    """Text of bytes that no one has checked."""
    return pa.array(values, pa.binary()).view(pa.string())


# --- Parquet ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, BATCH - 1, BATCH, BATCH + 1, 3 * BATCH + 7])
@pytest.mark.parametrize("group", [100, 10_000])
def test_parquet_rows_in_order_with_places_and_fraction(tmp_path, count, group):
    path = tmp_path / "p.parquet"
    schema = pa.schema([(name, pa.string()) for name in FIELDS])
    pq.write_table(pa.Table.from_pylist(rows_of(count), schema), path, row_group_size=group)
    reading = open_source(path).read(FIELDS)
    found = [(where, row, reading.fraction) for where, row in reading]
    assert found == [(f"{path}, row {i}", row, (i + 1) / count) for i, row in enumerate(rows_of(count))]
    assert reading.fraction == 1.0


def test_only_the_columns_that_are_needed_are_read(tmp_path):
    table = pa.table({"a.b": ["1", "2"], "a": ["3", "4"], "unread": not_utf8([b"\xff", b"\xff"])})
    pq.write_table(table, tmp_path / "p.parquet")
    assert [row for _, row in read(tmp_path / "p.parquet", ["a"])] == [{"a": "3"}, {"a": "4"}]
    both = [row for _, row in read(tmp_path / "p.parquet", ["a.b", "a"])]
    assert both == [{"a.b": "1", "a": "3"}, {"a.b": "2", "a": "4"}]


def test_all_columns_are_told_where_one_is_missing(tmp_path):
    path = parquet(tmp_path / "p.parquet", rows_of(2, more=1))
    assert set(read(path, ["prompt", "absent"])[0][1]) == {*FIELDS, "more"}


@pytest.mark.parametrize("kind", ["parquet", "dataset"])
def test_optional_columns_are_read_where_there_are_any(tmp_path, kind):
    def fields(rows, wanted):
        source = parquet(tmp_path / "p.parquet", rows) if kind == "parquet" else datasets.Dataset.from_list(rows)
        with closing(open_source(source).read(wanted, ["lead", "prompt"])) as reading:
            return set(next(reading)[1])

    assert fields(rows_of(2, more=1), ["prompt", "positive"]) == {"prompt", "positive"}
    assert fields(rows_of(2, more=1, lead=""), ["prompt", "positive"]) == {"prompt", "positive", "lead"}
    assert fields(rows_of(2, more=1, lead=""), ["absent"]) == {*FIELDS, "more", "lead"}


def test_bytes_that_are_not_utf8_tell_their_row(tmp_path):
    pq.write_table(pa.table({"prompt": not_utf8([b"a"] * 300 + [b"caf\xe9"])}), tmp_path / "p.parquet")
    with pytest.raises(PairsError, match=r"p\.parquet.*row 300.*UnicodeDecodeError"):
        read(tmp_path / "p.parquet", ["prompt"])


def test_a_column_name_twice(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    pq.write_table(table, tmp_path / "p.parquet")
    with pytest.raises(PairsError, match=r"p\.parquet.*prompt, prompt"):
        read(tmp_path / "p.parquet")


@settings(max_examples=40, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_parquet_file_that_is_cut_off(tmp_path_factory, share):
    path = parquet(tmp_path_factory.mktemp("cut") / "p.parquet", rows_of(500))
    blob = path.read_bytes()
    path.write_bytes(blob[: int(len(blob) * share)])
    with pytest.raises(PairsError, match=r"p\.parquet.*Arrow"):
        read(path)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(share=st.floats(0, 1, exclude_max=True))
def test_damaged_data_of_a_parquet_file(tmp_path_factory, share):
    path = tmp_path_factory.mktemp("damage") / "p.parquet"
    parquet(path, rows_of(500), compression="none", use_dictionary=False, write_page_checksum=True)
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    start, size = column.data_page_offset, column.total_compressed_size
    blob = bytearray(path.read_bytes())
    blob[start + size // 2 + int(share * (size - size // 2))] ^= 1
    path.write_bytes(blob)
    with pytest.raises(PairsError, match=r"p\.parquet.*row 0.*CRC"):
        read(path)


# --- datasets --------------------------------------------------------------------------------------------------------


def test_datasets_given_as_objects():
    whole = datasets.Dataset.from_list(rows_of(5, unread=[1]))
    for dataset in (whole, whole.to_iterable_dataset(), whole.to_iterable_dataset(num_shards=3)):
        for _ in range(2):
            assert read(dataset) == [(f"dataset, row {i}", row) for i, row in enumerate(rows_of(5))]
    assert prompts(whole.select([3, 1])) == ["p3", "p1"]
    assert prompts(whole.filter(lambda row: row["prompt"] > "p2").to_iterable_dataset()) == ["p3", "p4"]


def test_the_fraction_of_a_dataset():
    whole = datasets.Dataset.from_list(rows_of(5))
    reading = open_source(whole).read(FIELDS)
    assert [reading.fraction for _ in reading] == [0.2, 0.4, 0.6, 0.8, 1.0]
    reading = open_source(whole.to_iterable_dataset()).read(FIELDS)
    assert [reading.fraction for _ in reading] == [None] * 5 and reading.fraction == 1.0


def test_columns_that_a_transform_makes():
    whole = datasets.Dataset.from_list([{"prompt": "p", "sides": [" a", " b"]}] * 3)
    whole.set_transform(lambda rows: {"prompt": rows["prompt"], "positive": [sides[0] for sides in rows["sides"]]})
    assert read(whole, ["prompt"]) == [(f"dataset, row {i}", {"prompt": "p", "positive": " a"}) for i in range(3)]
    lazy = whole.with_format(None).to_iterable_dataset().map(lambda row: {"positive": row["sides"][0]})
    assert [row["positive"] for _, row in read(lazy, ["prompt", "positive"])] == [" a"] * 3


def test_rows_that_a_format_makes_into_something_else():
    pytest.importorskip("pandas")
    with pytest.raises(PairsError, match=r"row 0.*DataFrame"):
        read(datasets.Dataset.from_list(rows_of(3)).with_format("pandas"))


def test_an_error_of_the_dataset_itself_tells_its_row():
    def fail(row, i):
        if i == 2:
            raise KeyError("no such thing\nand a long story")
        return row

    lazy = datasets.Dataset.from_list(rows_of(5)).to_iterable_dataset().map(fail, with_indices=True)
    with pytest.raises(PairsError, match=r"row 2.*KeyError.*no such thing"):
        read(lazy)


@pytest.mark.parametrize("kind", ["dictionary", "lazy dictionary", "folder"])
def test_splits(tmp_path, kind):
    splits = datasets.DatasetDict({name: datasets.Dataset.from_list(rows_of(n)) for name, n in [("a", 2), ("b", 3)]})
    source, name = splits, "dataset"
    if kind == "lazy dictionary":
        source = datasets.IterableDatasetDict({name: split.to_iterable_dataset() for name, split in splits.items()})
    if kind == "folder":
        source, name = tmp_path / "saved", str(tmp_path / "saved")
        splits.save_to_disk(source)
    assert prompts(source, "a") == ["p0", "p1"] and prompts(source, "b") == ["p0", "p1", "p2"]
    assert open_source(source, "a").name == f"{name}, split a"
    with pytest.raises(PairsError, match=f"{name}.*a, b.*split=.*--split"):
        open_source(source)
    with pytest.raises(PairsError, match=r"a, b.*'c'.*split="):
        open_source(source, "c")


def test_a_folder_that_save_to_disk_wrote(tmp_path):
    whole = datasets.Dataset.from_list(rows_of(500))
    whole.save_to_disk(tmp_path / "one", num_shards=3)
    datasets.DatasetDict({"train": whole}).save_to_disk(tmp_path / "dict")
    assert read(tmp_path / "one") == [(f"{tmp_path / 'one'}, row {i}", row) for i, row in enumerate(rows_of(500))]
    assert prompts(str(tmp_path / "dict")) == whole["prompt"][:]
    size = sum(file.stat().st_size for file in (tmp_path / "one").glob("*.arrow"))
    assert open_source(tmp_path / "one").size == size
    assert prompts([tmp_path / "one", tmp_path / "dict"]) == whole["prompt"][:] * 2
    with pytest.raises(PairsError, match=r"one.*'train'.*no splits"):
        open_source(tmp_path / "one", "train")
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(PairsError, match=r"one.*JSONDecodeError"):
        open_source(tmp_path / "one")


# --- the Hub, in whose place the library takes a folder of that name --------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    def publish(card="", **splits):
        for name, count in splits.items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(count)))
        (folder / "README.md").write_text(f"---\n{card}\n---\n")

    return publish


def test_a_dataset_of_the_hub_whose_card_tells_the_fraction(hub):
    sizes = "dataset_info:\n  splits:\n  - {name: train, num_bytes: 100, num_examples: 4}"
    hub(card=sizes, train=5)
    reading = open_source("hf:org/name").read(FIELDS)
    assert [reading.fraction for _ in reading] == [0.25, 0.5, 0.75, 1.0, 1.0]
    hub(card="", train=5)
    for _ in range(2):
        reading = open_source("hf:org/name").read(FIELDS)
        found = [(where, row, reading.fraction) for where, row in reading]
        assert found == [(f"hf:org/name, split train, row {i}", row, None) for i, row in enumerate(rows_of(5))]


def test_splits_and_configurations_of_the_hub(hub):
    hub(card="configs:\n- {config_name: c, data_files: [{split: x, path: train.jsonl}]}", train=2, test=3)
    assert prompts("hf:org/name:c") == prompts("hf:org/name:c", "x") == ["p0", "p1"]
    with pytest.raises(PairsError, match=r"hf:org/name:d.*'d'"):
        open_source("hf:org/name:d")
    hub(train=2, test=3)
    assert prompts("hf:org/name", "test") == ["p0", "p1", "p2"]
    with pytest.raises(PairsError, match=r"hf:org/name.*train, test.*split="):
        open_source("hf:org/name")


def test_a_dataset_that_is_not_there(hub):
    with pytest.raises(PairsError, match=r"hf:no/such.*name"):
        open_source("hf:no/such")


@pytest.mark.parametrize("name", ["", ":c", "a/b/c", "//datasets/a/b", "a b", "a/b:"])
def test_names_that_are_none(name):
    with pytest.raises(PairsError, match=f"hf:{name}.*hf:ORG/NAME"):
        open_source(f"hf:{name}")
