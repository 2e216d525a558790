"""Which source a name means, several files as one, and what is refused before anything is read."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from austeer import PairsError
from austeer.pairs.readers import open_source


def rows_of(numbers):
    return [{"prompt": f"p{i}", "positive": " a", "negative": " b"} for i in numbers]


def write(path, numbers):
    content = "".join(json.dumps(row) + "\n" for row in rows_of(numbers)).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def read(source, columns=("prompt",)):
    return list(open_source(source).read(columns))


# --- one file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, content, places",
    [
        ("p.jsonl", '{"prompt": "p0"}\n\n{"prompt": "p1"}\n', ["line 1", "line 3"]),
        ("p.json", '[{"prompt": "p0"},\n{"prompt": "p1"}]', ["entry 1", "entry 2"]),
        ("p.csv", 'prompt,x\np0,"a\nb"\np1,c\n', ["line 3", "line 4"]),
    ],
)
def test_rows_come_with_their_places(tmp_path, name, content, places):
    path = tmp_path / name
    path.write_text(content)
    for source in (path, str(path), [path]):
        found = read(source)
        assert [where for where, _ in found] == [f"{path}, {place}" for place in places]
        assert [row["prompt"] for _, row in found] == ["p0", "p1"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("p.jsonl", b'{"a": 1}\n{"a": ' + b"1" * 5000 + b"}\n", "line 2.*number"),
        ("p.jsonl", b'{"a": 1}\n' + b"[" * 100_000, "line 2.*nested"),
        ("p.jsonl", b'{"prompt": "a"\n', "line 1: .*JSON"),
        ("p.jsonl", b'\n\n["a", "b", "c"]\n', "line 3: .*list.*object"),
        ("p.json", b'[{"prompt": "a"},\n oops]', "line 2: .*JSON"),
        ("p.json", b'{"prompt": "a"}', "dict at the top.*list"),
        ("p.json", b'["text"]', "entry 1: .*str.*object"),
        ("p.csv", b"prompt,positive,positive,negative\na,b,c,d\n", "column.*twice"),
        ("p.csv", b'prompt,positive,negative\n"' + b"a" * 200_000 + b'",b,c\n', "CSV.*larger"),
        ("p.json", b'[{"a": ' + b"1" * 5000 + b"}]", "number"),
        ("p.json", b'[\n{"a": "caf\xe9"}]', "line 2.*UTF-8"),
        ("p.csv", b"a,b\nc,d\ne,caf\xe9\n", "line 3.*UTF-8"),
        ("p.csv", b'a,b\nc,d\ne,"f\ng,h\n', "line 3.*CSV.*end of data"),
        ("p.csv", b'a,b\nc,"d"e\n', "line 2.*CSV.*expected after"),
        ("p.csv", b"a,b\nc,d,e\n", "line 2.*2 fields"),
    ],
)
def test_damage_tells_its_line(tmp_path, name, content, message):
    if b"1" * 5000 in content and not hasattr(sys, "get_int_max_str_digits"):
        pytest.skip("this Python reads numbers of any length")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PairsError, match=f"{tmp_path / name}.*{message}"):
        read(tmp_path / name)


# --- several files ---------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 200), st.sampled_from([".jsonl", ".jsonl.gz"])), min_size=1, max_size=6))
def test_several_files_read_as_one(tmp_path_factory, parts):
    folder = tmp_path_factory.mktemp("several")
    count, paths = 0, []
    for i, (size, suffix) in enumerate(parts):
        paths.append(write(folder / f"part{i}{suffix}", range(count, count + size)))
        count += size
    for source in (str(folder / "*.jsonl*"), folder / "**" / "part?.*", paths, tuple(map(str, reversed(paths)))):
        reading = open_source(source).read(["prompt"])
        seen = [(row["prompt"], reading.fraction) for _, row in reading]
        assert [prompt for prompt, _ in seen] == [f"p{i}" for i in range(count)]
        assert [fraction for _, fraction in seen] == sorted(fraction for _, fraction in seen)
        assert reading.fraction == 1.0


def test_the_fraction_of_several_files_is_of_their_bytes(tmp_path):
    write(tmp_path / "a.jsonl", range(100))
    write(tmp_path / "b.jsonl", range(300))
    reading = open_source(str(tmp_path / "*.jsonl")).read(["prompt"])
    seen = [reading.fraction for _ in reading]
    share = (tmp_path / "a.jsonl").stat().st_size / open_source(str(tmp_path / "*.jsonl")).size
    assert seen[99] == pytest.approx(share) and share < seen[100] < 1 and seen[-1] == 1.0


def test_several_files_tell_which_one_a_row_is_of(tmp_path):
    write(tmp_path / "a.jsonl", range(2))
    (tmp_path / "b.jsonl").write_text('{"prompt": "p2"}\nnot JSON\n')
    places = []
    with pytest.raises(PairsError, match=r"b\.jsonl.*line 2.*JSON"):
        places.extend(where for where, _ in open_source(str(tmp_path / "*.jsonl")).read(["prompt"]))
    assert places == [f"{tmp_path}/{place}" for place in ("a.jsonl, line 1", "a.jsonl, line 2", "b.jsonl, line 1")]


def test_names_of_several_sources(tmp_path):
    paths = [write(tmp_path / f"{name}.jsonl", range(2)) for name in "cab"]
    assert open_source(paths).name == f"{tmp_path / 'a.jsonl'} and 2 more"
    assert open_source(paths[:1]).name == str(paths[0])
    assert open_source(str(tmp_path / "*.jsonl")).name == str(tmp_path / "*.jsonl")


def test_a_file_whose_name_looks_like_a_pattern(tmp_path):
    path = write(tmp_path / "pairs[1].jsonl", range(3))
    write(tmp_path / "pairs1.jsonl", range(5))
    assert len(read(path)) == len(read(str(path))) == 3


@pytest.mark.parametrize(
    "source, message",
    [
        ("*.csv", r"\*\.csv.*pattern"),
        (["b.jsonl", "a.jsonl", "b.jsonl"], "b.jsonl.*twice"),
        (["a.jsonl", "c.jsonl"], "c.jsonl.*no such file"),
    ],
)
def test_several_files_of_which_one_is_missing_or_twice(tmp_path, source, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("a.jsonl"), range(2))
    write(Path("b.jsonl"), range(2))
    with pytest.raises(PairsError, match=message):
        open_source(source)


# --- refused at once -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["p.txt", "p", "p.gz", "p.txt.gz", "p.parquet.gz", "p.gz.jsonl.zip"])
def test_suffixes_that_are_not_known(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(PairsError, match=rf"{name}.*\.jsonl.*\.csv.*\.gz.*\.parquet"):
        open_source(tmp_path / name)


@pytest.mark.parametrize("name", ["missing.csv.gz", "missing.parquet", "no/p.jsonl"])
def test_a_file_that_is_missing(tmp_path, name):
    with pytest.raises(PairsError, match=f"{name}.*no such file"):
        open_source(tmp_path / name)


def test_a_folder_that_is_no_dataset(tmp_path):
    with pytest.raises(PairsError, match=f"{tmp_path}.*folder.*save_to_disk"):
        open_source(tmp_path)


@pytest.mark.parametrize("source", [None, 3, [], [3], [{"prompt": "a"}], {"a": "b"}, b"p.jsonl"])
def test_what_is_no_source(source):
    with pytest.raises(PairsError, match=rf"{type(source).__name__}.*Pairs\.of"):
        open_source(source)


def test_a_text_in_place_of_a_path():
    with pytest.raises(PairsError, match=r"The soup was.*too long"):
        open_source("The soup was good. " * 100)


@pytest.mark.parametrize(
    "name, package", [("p.jsonl.zst", "zstandard"), ("p.parquet", "pyarrow"), ("hf:a/b", "datasets"), ("f", "datasets")]
)
def test_a_package_that_is_not_installed(tmp_path, monkeypatch, name, package):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "dataset_info.json").touch()
    if name.startswith("p"):
        (tmp_path / name).touch()
    for module in [package, *(module for module in sys.modules if module.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(PairsError, match=rf"{name}.*{package}.*austeer\[data\]"):
        open_source(name if name.startswith("hf:") else tmp_path / name)


def test_packages_are_imported_only_where_they_are_needed_and_print_nothing(tmp_path):
    pytest.importorskip("datasets")
    code = f"""
import sys
import austeer
optional = {{"datasets", "pyarrow", "zstandard", "pandas"}}
assert len(list(austeer.stream_pairs({str(write(tmp_path / "p.jsonl.gz", range(2)))!r}))) == 2
assert not optional & set(sys.modules), optional & set(sys.modules)
import datasets
rows = [{{"prompt": "p", "positive": "a", "negative": "b"}}] * 3
datasets.Dataset.from_list(rows).to_parquet({str(tmp_path / "p.parquet")!r})
assert len(list(austeer.stream_pairs({str(tmp_path / "p.parquet")!r}))) == 3
assert len(list(austeer.stream_pairs(datasets.Dataset.from_list(rows)))) == 3
"""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}" + code],
        capture_output=True,
        text=True,
        check=False,
        env={"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_CACHE": str(tmp_path)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
