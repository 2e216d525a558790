"""Reading results: each file that cannot be compared says what was found, what was expected, and what to do."""

import json

import pytest

import synthetic_results
from austeer.errors import AusteerError
from bench import files, inference
from bench.result_files import complete, kind_of, read_result


@pytest.fixture
def put(tmp_path):
    def write(content):
        path = tmp_path / "result.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write


def test_a_result_is_read_as_it_was_written(tmp_path):
    content = synthetic_results.inference()
    files.write(tmp_path / "a" / "result.json", content)
    found = read_result(tmp_path / "a" / "result.json", "inference")
    assert found == read_result(str(tmp_path / "a" / "result.json")) and found == json.loads(files.dumps(content))
    assert complete(found) and kind_of(found) == "inference"
    assert not complete(found | {"complete": False})


def test_json_of_pytest_benchmark_is_read_too(put):
    path = put({"machine_info": {}, "commit_info": {}, "benchmarks": [], "datetime": "", "version": "5"})
    assert kind_of(read_result(path)) == "pytest-benchmark"
    with pytest.raises(AusteerError, match="found kind 'pytest-benchmark', expected 'inference'"):
        read_result(path, "inference")


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", r"result.json: found Expecting .*, expected a result as JSON"),
        ("\0", "expected a result as JSON"),
        ([1], "found no kind, expected 'inference' or 'pytest-benchmark'"),
        ({}, "found no kind"),
        ({"kind": "host", "batches": []}, "found kind 'host', expected 'inference' or 'pytest-benchmark'"),
        ({"kind": ["inference"]}, "found kind .*inference.*, expected"),
        ({"kind": "inference", "schema": 2}, "found schema 2, expected 1: made by a newer version; update this one"),
        ({"kind": "inference", "schema": 0}, "found schema 0, expected 1: made by an older version; measure again"),
        ({"kind": "inference"}, "found schema None, expected 1: made by an older version"),
        ({"kind": "inference", "schema": 1, "cases": []}, "found no environment, model, .*, expected them in a result"),
        ({"benchmarks": []}, "found no machine_info, commit_info"),
    ],
)
def test_what_is_no_result_is_refused(put, content, message):
    with pytest.raises(AusteerError, match=message):
        read_result(put(content))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(AusteerError, match=r"none.json: found no such file, expected a result; make one with: austeer"):
        read_result(tmp_path / "none.json")
    with pytest.raises(AusteerError, match="expected a result as JSON"):
        read_result(tmp_path)


def test_the_schema_is_the_one_that_is_written():
    assert (inference.KIND, inference.SCHEMA) == ("inference", 1)
