"""The file of made pairs: read back as it was, whole or not there."""

import json

import pytest

from austeer import PairsError, load_pairs
from austeer.making import write_pairs
from austeer.making.check import read_unchecked
from austeer.pairs.pair import Pair

PAIRS = [Pair('Größe, "quoted"\nand so on', " gut", " schlecht"), Pair("b (", "c", " d\t東", "(")]


def test_pairs_are_read_back_as_they_were(tmp_path):
    path = write_pairs(tmp_path / "new" / "pairs.jsonl", PAIRS)
    assert list(load_pairs(path)) == list(read_unchecked(path)) == PAIRS
    first, second = map(json.loads, path.read_text().splitlines())
    assert list(first) == ["prompt", "positive", "negative"] and list(second) == [*first, "lead"]


def test_a_file_that_is_interrupted_is_not_there(tmp_path):
    def broken():
        yield from PAIRS
        raise RuntimeError

    write_pairs(tmp_path / "pairs.jsonl", PAIRS)
    before = (tmp_path / "pairs.jsonl").read_bytes()
    for name in ("pairs.jsonl", "other.jsonl"):
        with pytest.raises(RuntimeError):
            write_pairs(tmp_path / name, broken())
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]
    assert (tmp_path / "pairs.jsonl").read_bytes() == before


def test_places_that_cannot_be(tmp_path):
    with pytest.raises(PairsError, match=r"pairs.csv: .*'.csv'.*.jsonl"):
        write_pairs(tmp_path / "pairs.csv", PAIRS)
    (tmp_path / "file").write_text("")
    with pytest.raises(PairsError, match=r"pairs.jsonl: .*written"):
        write_pairs(tmp_path / "file" / "pairs.jsonl", [Pair("a", "b", "c")])
