"""Streams of pairs: the same pairs from every format, again and again, in little memory, with complaints in time."""

import copy
import csv
import datetime
import gzip
import io
import json
import os
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from austeer import Pair, Pairs, PairsError, PairStream, load_pairs, stream_pairs

FIELDS = ("prompt", "positive", "negative")
ROWS = [dict(zip(FIELDS, row)) for row in [("a", " b", " c"), ("d", " e", " f"), ("g", " h", " h"), ("i", " j", " k")]]
EXPECTED = [Pair(**row) for row in ROWS]

# Line ends of other systems, what str.splitlines takes for one, spaces of their own, and quotes.
AWKWARD = "\r\n\u2028\u2029\x85\x0b\x0c\x1c\ufeff\xa0\t \",\\'{}"
texts = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), st.sampled_from(AWKWARD)),
    min_size=1,
    max_size=12,
).filter(str.strip)
triples = st.lists(st.tuples(texts, texts, texts), min_size=2, max_size=20).filter(
    lambda rows: any(positive != negative for _, positive, negative in rows)
)


def write(path, rows):
    """Rows in the format and compression that the path's suffixes tell."""
    if path.suffix == ".parquet":
        pytest.importorskip("pyarrow.parquet").write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), path)
        return path
    suffix = path.suffixes[0]
    text = io.StringIO("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), newline="")
    if suffix == ".json":
        text = io.StringIO(json.dumps(rows, ensure_ascii=False), newline="")
    if suffix == ".csv":
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    content = text.getvalue().encode()
    if path.suffix == ".gz":
        content = gzip.compress(content)
    if path.suffix == ".zst":
        content = pytest.importorskip("zstandard").ZstdCompressor().compress(content)
    path.write_bytes(content)
    return path


FILES = [f"p{suffix}{packed}" for suffix in (".jsonl", ".json", ".csv") for packed in ("", ".gz", ".zst")]


# --- what comes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FILES, "p.parquet"])
@settings(max_examples=40, deadline=None)
@given(rows=triples)
def test_any_pairs_come_back_from_every_format(tmp_path_factory, name, rows):
    path = write(tmp_path_factory.mktemp("any") / name, [dict(zip(FIELDS, row)) for row in rows])
    stream = stream_pairs(path)
    assert list(stream) == list(stream) == list(load_pairs(path)) == [Pair(*row) for row in rows]


@settings(max_examples=20, deadline=None)
@given(rows=triples)
def test_any_pairs_come_back_from_datasets(tmp_path_factory, rows):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    dataset = datasets.Dataset.from_list([dict(zip(FIELDS, row)) for row in rows])
    saved = tmp_path_factory.mktemp("any") / "saved"
    dataset.save_to_disk(saved)
    for source in (dataset, dataset.to_iterable_dataset(), saved):
        assert list(stream_pairs(source)) == [Pair(*row) for row in rows]


@pytest.mark.parametrize("name", ["pairs.ndjson", "PAIRS.JSONL"])
def test_other_names_of_jsonl(tmp_path, name):
    assert list(load_pairs(write(tmp_path / name, ROWS))) == EXPECTED


def test_rows_beyond_the_limit_are_not_even_read(tmp_path):
    path = write(tmp_path / "pairs.jsonl", ROWS[:2])
    path.write_text(path.read_text() + "not JSON\n")
    assert len(load_pairs(path, limit=2)) == 2


@pytest.mark.parametrize("name", [*FILES, "p.parquet"])
def test_fields_where_and_limit(tmp_path, name):
    rows = [{"q": f"p{i}", "good": " a", "bad": f" {i}", "kind": "xy"[i % 2]} for i in range(9)]
    path = write(tmp_path / name, rows)
    options = {"prompt": "q", "positive": "good", "negative": "bad", "where": {"kind": "y"}}
    stream = stream_pairs(path, **options)
    assert isinstance(stream, PairStream) and (stream.source, stream.chat_template) == (str(path), False)
    assert [pair.prompt for pair in stream] == ["p1", "p3", "p5", "p7"]
    limited = stream_pairs(path, limit=3, **options)
    assert [pair.prompt for pair in limited] == [pair.prompt for pair in limited] == ["p1", "p3", "p5"]
    assert load_pairs(path, limit=3, **options) == Pairs(tuple(limited), str(path))


@pytest.mark.parametrize(
    "wanted, count",
    [({"ok": "true"}, 4), ({"ok": True}, 4), ({"n": "3"}, 2), ({"day": "2026-01-02"}, 2)],
)
def test_where_on_what_is_no_text(tmp_path, wanted, count):
    rows = [{**row, "ok": i % 2 == 0, "n": i, "day": datetime.date(2026, 1, i + 1)} for i, row in enumerate(ROWS)]
    assert len(list(stream_pairs(write(tmp_path / "p.parquet", rows * 2), where=wanted))) == count


def test_every_iteration_opens_the_source_anew(tmp_path):
    path = write(tmp_path / "p.jsonl", ROWS)
    stream = stream_pairs(path)
    first, second = iter(stream), iter(stream)
    assert [next(first), next(first), next(second), next(first)] == [EXPECTED[i] for i in (0, 1, 0, 2)]
    first.close()
    assert list(second) == EXPECTED[1:]
    write(path, ROWS[:2])
    assert list(stream) == EXPECTED[:2]
    path.unlink()
    with pytest.raises(PairsError, match=r"p\.jsonl.*opened"):
        list(stream)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are counted where Linux shows them")
@pytest.mark.parametrize("name", ["p.jsonl", "p.csv.gz", "p.jsonl.zst", "p.parquet"])
def test_an_iteration_that_is_left_closes_its_file(tmp_path, name):
    path = write(tmp_path / name, ROWS * 10)

    def opened():
        links = Path("/proc/self/fd").iterdir()
        return sum(link.exists() and link.samefile(path) for link in links)

    stream = stream_pairs([path, write(tmp_path / f"q{path.suffix}", ROWS)] if name == "p.jsonl" else path)
    for number, _ in enumerate(stream):
        assert opened() == 1
        if number == 3:
            break
    assert opened() == 0


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv", "p.jsonl.gz", "p.jsonl.zst"])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    rows = 20_000
    path = tmp_path / name
    part = [{"prompt": f"{i} " + "word " * 10, "positive": " good", "negative": " bad"} for i in range(1000)]
    if path.suffix == ".csv":
        part *= rows // 1000
    write(path, part)
    if path.suffix != ".csv":  # files put one behind another are one file
        path.write_bytes(path.read_bytes() * (rows // 1000))
    stream = stream_pairs(path)
    tracemalloc.start()
    try:
        assert sum(1 for _ in stream) == rows
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * 2**20, "and the pairs by themselves would be 5 MB or more"


def test_memory_does_not_grow_with_a_parquet_file(tmp_path):
    pa = pytest.importorskip("pyarrow")
    rows = [
        {"prompt": f"{i} " + "word " * 50, "positive": " good", "negative": f" {i}", "x": "y" * i} for i in range(999)
    ]
    path = write(tmp_path / "p.parquet", rows * 50)  # one row group
    assert pa.parquet.ParquetFile(path).num_row_groups == 1
    before, peak = pa.total_allocated_bytes(), 0
    for _ in stream_pairs(path):
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert 0 < peak < 8 * 2**20


# --- how far ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FILES, "p.parquet"])
def test_the_fraction_tells_how_many_pairs_are_left(tmp_path, name):
    rows = [{**ROWS[0], "prompt": os.urandom(40).hex()} for _ in range(8000)]
    stream = stream_pairs(write(tmp_path / name, rows))
    assert stream.fraction == 0.0
    seen = [stream.fraction for _ in stream]
    assert seen == sorted(seen) and stream.fraction == 1.0
    for i in range(4000, 8000):
        assert (i + 1) / seen[i] == pytest.approx(8000, rel=0.1)
    for _ in stream:
        assert stream.fraction < 0.2, "the newest iteration's"
        break


def test_the_fraction_up_to_a_limit(tmp_path):
    path = write(tmp_path / "p.jsonl", ROWS * 500)
    stream = stream_pairs(path, limit=10)
    seen = [stream.fraction for _ in stream]
    assert seen == pytest.approx([max(i / 10, seen[0]) for i in range(1, 11)]) and seen[0] < 0.5
    assert stream.fraction == 1.0
    stream = stream_pairs(path, limit=10**6)
    assert len(list(stream)) == 2000 and stream.fraction == 1.0


def test_a_fraction_that_is_not_known():
    dataset = pytest.importorskip("datasets").Dataset.from_list(ROWS).to_iterable_dataset()
    stream = stream_pairs(dataset)
    assert [stream.fraction for _ in stream] == [None] * 4 and stream.fraction == 1.0
    stream = stream_pairs(dataset, limit=3)
    assert [stream.fraction for _ in stream] == pytest.approx([1 / 3, 2 / 3, 1])


# --- what is wrong, and when it is said ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv", "p.parquet"])
def test_a_damaged_row_is_told_when_it_is_reached(tmp_path, name):
    path = write(tmp_path / name, [*ROWS[:2], {**ROWS[2], "negative": "\n"}, ROWS[3]])
    found = []
    with pytest.raises(PairsError, match=f"{name}, (line 3|line 5|row 2): .*'negative'.*empty"):
        found.extend(stream_pairs(path))
    assert found == EXPECTED[:2]


@pytest.mark.parametrize(
    "rows, options, message",
    [
        ([], {}, "0 pairs"),
        (ROWS[:1], {}, "1 pair"),
        (ROWS[2:3] * 5, {}, "5 pairs.*equal"),
        (ROWS, {"where": {"prompt": "a"}}, "1 pair"),
        (ROWS, {"where": {"prompt": "z"}}, r"no row.*\{'prompt': 'z'\}"),
        (ROWS[2:3] * 5 + ROWS, {"limit": 5}, "5 pairs.*equal"),
    ],
)
def test_what_only_the_end_can_tell(tmp_path, rows, options, message):
    stream = stream_pairs(write(tmp_path / "p.jsonl.gz", rows), **options)
    for _ in range(2):
        found = []
        with pytest.raises(PairsError, match=message):
            found.extend(stream)
        where, limit = options.get("where", {}), options.get("limit")
        assert found == [Pair(**row) for row in rows if where.items() <= row.items()][:limit]


@pytest.mark.parametrize("options, message", [({"limit": 1}, "limit.*1"), ({"split": "a"}, "'a'.*no splits")])
def test_what_is_refused_before_anything_is_read(tmp_path, options, message):
    with pytest.raises(PairsError, match=message):
        stream_pairs(write(tmp_path / "p.jsonl", ROWS), **options)
    with pytest.raises(PairsError, match=r"missing\.jsonl"):
        stream_pairs(tmp_path / "missing.jsonl")


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.csv", "p.parquet"])
def test_a_lead_is_read_from_every_format(tmp_path, name):
    rows = [
        {"prompt": f"Q{i} (", "positive": "A", "negative": "B", "worse": "C", "lead": lead}
        for i, lead in enumerate([" (", ""])
    ]
    assert [pair.lead for pair in stream_pairs(write(tmp_path / name, rows))] == [" (", ""]
    # Where fields have names of their own, the file is somebody else's, and so is what it calls a lead.
    rows[0]["lead"] = "Ada Lovelace"
    assert [pair.lead for pair in stream_pairs(write(tmp_path / name, rows), negative="worse")] == ["", ""]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_damage_gives_pairs_or_a_pairs_error(tmp_path_factory, suffix, data):
    path = write(tmp_path_factory.mktemp("damage") / f"pairs{suffix}", ROWS)
    content = bytearray(path.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=3)):
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        pairs = load_pairs(path)
    except PairsError as error:
        assert str(path) in str(error)
    else:
        assert all(text.strip() for pair in pairs for text in (pair.prompt, pair.positive, pair.negative))


# --- chat templates, and into memory ---------------------------------------------------------------------------------


def test_chat_templates_are_rendered_when_a_pair_is_read(demo, tmp_path):
    path = write(tmp_path / "p.jsonl", ROWS)
    for options in ({}, {"system": "Be brief."}):
        stream = stream_pairs(path).with_chat_template(demo[1], **options)
        assert stream.chat_template == (options or True)
        assert Pairs.of(stream) == load_pairs(path).with_chat_template(demo[1], **options)
    stream = stream_pairs(path, chat_template=demo[1], where={"prompt": "a"})
    assert next(iter(stream)).prompt.endswith("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n")
    write(path, [ROWS[0], {**ROWS[1], "positive": ""}])
    assert next(iter(stream)).positive == " b", "the row behind is not read yet"


def test_chat_templates_are_refused_at_once(demo, tmp_path):
    stream = stream_pairs(write(tmp_path / "p.jsonl", ROWS))
    with pytest.raises(PairsError, match=r"p\.jsonl.*chat template already"):
        stream.with_chat_template(demo[1]).with_chat_template(demo[1])
    tokenizer = copy.deepcopy(demo[1])
    tokenizer.chat_template = "{{ raise_exception('no system message') if messages[0].role == 'system' }}"
    stream.with_chat_template(tokenizer)
    with pytest.raises(PairsError, match="no system message"):
        stream.with_chat_template(tokenizer, system="Be brief.")
    tokenizer.chat_template = None
    with pytest.raises(PairsError, match="no chat template"):
        stream_pairs(tmp_path / "p.jsonl", chat_template=tokenizer)
