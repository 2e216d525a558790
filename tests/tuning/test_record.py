"""The record of a search: what is written comes back, also after a line that was cut off; others are refused."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from austeer.errors import FileFormatError
from austeer.tuning.record import Record

SETTINGS = {"model": "m", "ks": (1, 2)}


def test_values_and_cells_come_back(tmp_path):
    path = tmp_path / "folder" / "search.jsonl"
    record = Record(path, SETTINGS)
    assert record.get("a") is None
    record.put("a", [1.5, float("inf")])
    record.add("b", {"0": [0.25, True]})
    record.add("b", {"3": [-1e-300, False]})
    again = Record(path, SETTINGS)
    assert again.get("a") == [1.5, float("inf")] and again.get("b") == {"0": [0.25, True], "3": [-1e-300, False]}


@settings(deadline=None)  # each line is brought to the disk
@given(cut=st.integers(min_value=1))
def test_a_file_cut_anywhere_behind_its_header_loses_its_last_line_only(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("record") / "search.jsonl"
    record = Record(path, SETTINGS)
    head = path.stat().st_size
    for i in range(3):
        record.put(f"key {i}", {"näme": i})
    whole = path.read_bytes()
    kept = head + cut % (len(whole) - head)
    path.write_bytes(whole[:kept])
    again = Record(path, SETTINGS)
    complete = whole[head:kept].count(b"\n")
    assert [again.get(f"key {i}") for i in range(3)] == [{"näme": i} if i < complete else None for i in range(3)]
    again.put("more", 1)
    assert Record(path, SETTINGS).get("more") == 1  # the rest of the cut line is gone


def test_another_search_is_refused_and_untouched(tmp_path):
    path = tmp_path / "search.jsonl"
    Record(path, SETTINGS | {"seed": 9})
    Record(path, SETTINGS).put("a", 1)  # a header alone is in nobody's way
    before = path.read_bytes()
    with pytest.raises(FileFormatError, match=r"ks \[1, 2\].*\[1, 3\].*--force"):
        Record(path, {**SETTINGS, "ks": (1, 3)})
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "record of a search"),
        ("pairs\n", "record of a search"),
        ("[1]\n", "record of a search"),
        (json.dumps({"format": "austeer-search", "version": 1}) + "\n", "'austeer-search' version 2"),
        (
            json.dumps({"format": "austeer-search", "version": 2, "settings": {"model": "m", "ks": [1, 2]}}) + "\n{}\n",
            "inconsistent",
        ),
    ],
)
def test_foreign_files_are_refused(tmp_path, text, message):
    path = tmp_path / "search.jsonl"
    path.write_text(text)
    with pytest.raises(FileFormatError, match=f"{path}.*{message}"):
        Record(path, SETTINGS)
    assert path.read_text() == text


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileFormatError, match=f"{tmp_path}.*used"):
        Record(tmp_path / "file" / "search.jsonl", SETTINGS)
