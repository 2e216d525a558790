"""Contrastive pairs: reading with every complaint, splitting, chat templates."""

import copy
import csv
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import austeer
from austeer import Pair, Pairs, PairsError, load_pairs
from austeer.pairs.pair import render_chat
from austeer.tasks import Task
from places import SHARED_DATA as DATA

ROWS = [
    {"prompt": "The soup was", "positive": " good", "negative": " bad", "split": "train", "kept": True},
    {"prompt": "The bread was", "positive": " fresh", "negative": " stale", "split": "test", "kept": False},
    {"prompt": "Der Käse war", "positive": " köstlich 🧀", "negative": " übel", "split": "train", "kept": True},
    {
        "prompt": 'He said, "it is',
        "positive": ' fine"\nand left',
        "negative": ' awful"',
        "split": "train",
        "kept": True,
    },
]
EXPECTED = [Pair(row["prompt"], row["positive"], row["negative"]) for row in ROWS]

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)
triples = st.lists(st.tuples(texts, texts, texts), min_size=2, max_size=30).filter(
    lambda rows: any(row[1] != row[2] for row in rows)
)


def write(path, rows):
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.ndjson", "pairs.json", "pairs.csv", "PAIRS.JSONL"])
def test_every_format_gives_the_same_pairs(tmp_path, name):
    path = write(tmp_path / name, ROWS)
    pairs = load_pairs(path)
    assert list(pairs) == EXPECTED
    assert (pairs.source, pairs.chat_template, pairs.identical) == (str(path), False, 0)


def test_byte_order_mark_and_blank_lines_are_skipped(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\ufeff" + "\n\n".join(json.dumps(row) for row in ROWS) + "\n\n", encoding="utf-8")
    assert list(load_pairs(path)) == EXPECTED


def test_fields_may_have_other_names(tmp_path):
    names = {"prompt": "question", "positive": "good", "negative": "bad"}
    rows = [{names[field]: row[field] for field in names} for row in ROWS]
    assert list(load_pairs(write(tmp_path / "pairs.jsonl", rows), **names)) == EXPECTED


@pytest.mark.parametrize("where", [{"split": "train"}, {"split": "train", "kept": "True"}, {"kept": "True"}])
def test_where_keeps_matching_rows(tmp_path, where):
    assert list(load_pairs(write(tmp_path / "pairs.jsonl", ROWS), where=where)) == [EXPECTED[i] for i in (0, 2, 3)]


def test_where_and_limit_count_matching_rows(tmp_path):
    path = write(tmp_path / "pairs.jsonl", ROWS)
    assert list(load_pairs(path, where={"split": "train"}, limit=2)) == [EXPECTED[0], EXPECTED[2]]


@pytest.mark.parametrize("rows", [ROWS[1:], ROWS])
def test_rows_beyond_the_limit_are_not_even_read(tmp_path, rows):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]) + "not JSON\n", encoding="utf-8")
    assert len(load_pairs(path, limit=2)) == 2


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data sets lie beside the repository, not in it")
@pytest.mark.parametrize("name", ["persona_openness.jsonl", "caa_sycophancy_generate.jsonl"])
def test_real_data_by_field_mapping(name):
    fields = ("question", "answer_matching_behavior", "answer_not_matching_behavior")
    pairs = load_pairs(DATA / name, **dict(zip(("prompt", "positive", "negative"), fields)))
    with (DATA / name).open(encoding="utf-8") as file:
        assert [tuple(json.loads(line)[f] for f in fields) for line in file] == [
            (p.prompt, p.positive, p.negative) for p in pairs
        ]
    assert len(pairs) == 1000


def test_where_finds_what_json_writes(tmp_path):
    rows = [{"prompt": "p", "positive": " a", "negative": f" {i}", "ok": i % 2 == 0, "n": i} for i in range(6)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for wanted in ("true", True):
        assert [p.negative for p in load_pairs(tmp_path / "p.jsonl", where={"ok": wanted})] == [" 0", " 2", " 4"]
    assert len(load_pairs(tmp_path / "p.jsonl", where={"ok": "false"})) == 3


def test_what_is_no_pairs_and_a_limit_of_none_at_all(tmp_path):
    with pytest.raises(PairsError, match="NoneType"):
        Pairs.of(None)
    (tmp_path / "p.jsonl").write_text("{}")
    with pytest.raises(PairsError, match=r"limit: .* 0"):
        load_pairs(tmp_path / "p.jsonl", limit=0)


# --- bad files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@pytest.mark.parametrize("field", ["prompt", "positive", "negative"])
@pytest.mark.parametrize("value", ["", "  \n"])
def test_empty_field_names_file_line_and_field(tmp_path, suffix, field, value):
    rows = [*ROWS[:2], {**ROWS[2], field: value}]
    path = write(tmp_path / f"pairs{suffix}", rows)
    line = 3 if suffix == ".jsonl" else 4 + value.count("\n")  # CSV has a header and names the row's last line
    with pytest.raises(PairsError, match=rf"^{path}, line {line}: .*'{field}'.*empty"):
        load_pairs(path)


@pytest.mark.parametrize("field", ["prompt", "positive", "negative"])
@pytest.mark.parametrize("value", [None, "absent"])
def test_missing_field_names_what_is_there(tmp_path, field, value):
    row = {name: text for name, text in ROWS[1].items() if name != field}
    path = write(tmp_path / "pairs.jsonl", [ROWS[0], {**row, field: None} if value is None else row])
    with pytest.raises(PairsError, match=rf"line 2: .*'{field}'.*split.*--{field}-field"):
        load_pairs(path)


def test_missing_csv_column(tmp_path):
    path = write(tmp_path / "pairs.csv", [{"prompt": "a", "positive": " b"}] * 2)
    with pytest.raises(PairsError, match=r"line 2: .*'negative'.*prompt, positive"):
        load_pairs(path)


@pytest.mark.parametrize("value, kind", [(3, "int"), (["a"], "list"), ({"a": 1}, "dict"), (True, "bool"), (0, "int")])
def test_field_that_is_no_text(tmp_path, value, kind):
    path = write(tmp_path / "pairs.jsonl", [ROWS[0], {**ROWS[1], "positive": value}])
    with pytest.raises(PairsError, match=rf"line 2: .*'positive'.*{kind}"):
        load_pairs(path)


def test_entry_of_a_json_list_is_named(tmp_path):
    path = write(tmp_path / "pairs.json", [ROWS[0], {**ROWS[1], "negative": ""}])
    with pytest.raises(PairsError, match=r"pairs\.json, entry 2: .*'negative'"):
        load_pairs(path)


@pytest.mark.parametrize(
    "name, content, found",
    [
        ("p.jsonl", b'{"prompt": "a"\n', "line 1: .*JSON"),
        ("p.jsonl", b'\n\n["a", "b", "c"]\n', "line 3: .*list.*object"),
        ("p.jsonl", b"", "0 pairs.* 2"),
        ("p.jsonl", json.dumps(ROWS[0]).encode(), "1 pair,.* 2"),
        ("p.jsonl", b"[" * 100_000, "line 1: .*nested"),
        ("p.jsonl", b'{"prompt": "\\ud800", "positive": "b", "negative": "c"}', "line 1: .*'prompt'.*half"),
        ("p.jsonl", '{"prompt": "caf\xe9"}'.encode("latin-1"), "UTF-8"),
        ("p.json", '["caf\xe9"]'.encode("latin-1"), "UTF-8"),
        ("p.csv", "prompt,caf\xe9\n".encode("latin-1"), "UTF-8"),
        ("p.json", b'[{"prompt": "a"},\n oops]', "line 2: .*JSON"),
        ("p.json", b'{"prompt": "a"}', "dict at the top.*list"),
        ("p.json", b'["text"]', "entry 1: .*str.*object"),
        ("p.csv", b"", "0 pairs"),
        ("p.csv", b"prompt,positive,negative\n", "0 pairs"),
        ("p.csv", b"prompt,positive,negative\na,b\n", "line 2: .*'negative'"),
        ("p.csv", b'prompt,positive,negative\n"' + b"a" * 200_000 + b'",b,c\n', "CSV.*larger"),
    ],
)
def test_damaged_file(tmp_path, name, content, found):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(PairsError, match=rf"^{path}.*{found}"):
        load_pairs(path)


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


def test_suffix_must_be_known(tmp_path):
    with pytest.raises(PairsError, match=r"'\.txt'.*\.jsonl, \.ndjson, \.json, \.csv"):
        load_pairs(write(tmp_path / "pairs.txt", ROWS))


@pytest.mark.parametrize("name", ["missing.jsonl", "folder.jsonl"])
def test_no_such_file(tmp_path, name):
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(PairsError, match=f"{name}: no such file"):
        load_pairs(tmp_path / name)


def test_where_without_a_match(tmp_path):
    path = write(tmp_path / "pairs.jsonl", ROWS)
    with pytest.raises(PairsError, match=r"\{'split': 'other'\}"):
        load_pairs(path, where={"split": "other"})
    with pytest.raises(PairsError, match=r"1 pair,.* 2"):
        load_pairs(path, where={"split": "test"})


def test_all_sides_equal(tmp_path):
    rows = [{"prompt": f"p{i}", "positive": f"a{i}", "negative": f"a{i}"} for i in range(3)]
    with pytest.raises(PairsError, match=r"3 pairs .*equal"):
        load_pairs(write(tmp_path / "pairs.jsonl", rows))
    assert load_pairs(write(tmp_path / "some.jsonl", [*rows, ROWS[0]])).identical == 3


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("prompt,positive,negative\nThe food was,great, really great,bad\n", "line 2: .*3 fields"),
        ("prompt,positive,positive,negative\na,b,c,d\n", "column.*twice"),
    ],
)
def test_a_csv_that_would_be_misread_is_refused(tmp_path, text, found):
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(PairsError, match=rf"p.csv.*{found}"):
        load_pairs(tmp_path / "p.csv")


# --- from memory -----------------------------------------------------------------------------------------------------


def test_of_takes_pairs_mappings_and_triples():
    expected = Pairs(tuple(EXPECTED))
    assert (
        Pairs.of(EXPECTED)
        == Pairs.of(ROWS)
        == Pairs.of([(p.prompt, p.positive, p.negative) for p in EXPECTED])
        == expected
    )
    assert Pairs.of([p.prompt, p.positive, p.negative] for p in EXPECTED) == expected, "a generator of lists"
    assert Pairs.of(expected) is expected


@pytest.mark.parametrize(
    "entries, found",
    [
        ([], "memory: .*0 pairs"),
        ([("a", "b", "c")], "memory: .*1 pair,"),
        ([("a", "b", "c"), ("a", "b")], r"memory, pair 1: .*\('a', 'b'\).*\(prompt, positive, negative\)"),
        ([("a", "b", "c"), "abc"], "memory, pair 1: .*'abc'"),
        ([("a", "b", "c"), None], "memory, pair 1: .*None"),
        ([("a", "b", "c"), ("a", "b", None)], "memory, pair 1: .*'negative' is missing"),
        ([("a", "b", "c"), ("a", 1, "c")], "memory, pair 1: .*'positive' is int"),
        ([("a", "b", "c"), Pair("a", "b", " ")], "memory, pair 1: .*'negative' is empty"),
        ([{"prompt": "a", "positive": "b"}], "memory, pair 0: .*'negative'.*prompt, positive"),
        ([("a", "b", "b"), ("c", "d", "d")], "memory: .*2 pairs .*equal"),
    ],
)
def test_of_complains(entries, found):
    with pytest.raises(PairsError, match=found):
        Pairs.of(entries)


def test_measure_reads_triples_too_and_complains_alike(tiny, demo):
    with pytest.raises(PairsError, match=r"memory: .*1 pair,"):
        austeer.measure(tiny, demo[1], [("a", "b", "c")])


def test_index_and_slice_keep_what_is_known():
    pairs = Pairs(tuple(EXPECTED), "origin", chat_template=True)
    assert pairs[1] == EXPECTED[1] and pairs[-1] == EXPECTED[-1]
    assert pairs[1:3] == Pairs(tuple(EXPECTED[1:3]), "origin", chat_template=True)


# --- split -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(triples, st.floats(0, 1), st.integers(0, 2**32))
def test_split_is_a_partition_and_repeats(rows, fraction, seed):
    pairs = Pairs.of([(f"{i} {prompt}", positive, negative) for i, (prompt, positive, negative) in enumerate(rows)])
    size = round(len(pairs) * fraction)
    if min(size, len(pairs) - size) < 2:
        with pytest.raises(PairsError, match=f" {size} and {len(pairs) - size}"):
            pairs.split(fraction, seed)
        return
    first, second = pairs.split(fraction, seed)
    assert len(first) == size
    assert sorted(map(repr, [*first, *second])) == sorted(map(repr, pairs)), "a pair was lost or doubled"
    assert (first, second) == pairs.split(fraction, seed)


def test_split_depends_on_the_seed():
    pairs = Pairs.of([(f"p{i}", "a", "b") for i in range(40)])
    assert pairs.split(0.5, seed=1) != pairs.split(0.5, seed=2)


# --- chat templates --------------------------------------------------------------------------------------------------


def test_chat_template_wraps_the_prompt_and_opens_the_answer(demo):
    pairs = Pairs.of(EXPECTED).with_chat_template(demo[1])
    for before, after in zip(EXPECTED, pairs):
        assert after.prompt.endswith(f"<|im_start|>user\n{before.prompt}<|im_end|>\n<|im_start|>assistant\n")
        assert (after.positive, after.negative) == (before.positive, before.negative)
    assert pairs.chat_template and len(pairs) == len(EXPECTED)


@pytest.mark.parametrize("lead", ["\n\nAnswer: (", " Answer:"])
def test_pairs_and_the_task_of_them_read_the_same_in_a_chat_template(demo, lead):
    pairs = Pairs.of([Pair(f"Q{i}?{lead}", " a\n", " b", lead) for i in range(3)])
    made = Task.of_pairs(pairs)
    assert made.pairs() == pairs
    assert made.with_chat_template(demo[1]).pairs() == pairs.with_chat_template(demo[1])
    text = pairs.with_chat_template(demo[1])[0]
    assert (text.prompt + text.positive).endswith(f"user\nQ0?<|im_end|>\n<|im_start|>assistant\n{lead.strip()} a\n")


@pytest.mark.parametrize("lead", ["A:", 3, ["?"]])
def test_a_lead_that_is_not_the_prompts_end(lead):
    rows = [{"prompt": "Q0?", "positive": "a", "negative": "b", "lead": lead}] * 2
    with pytest.raises(PairsError, match=rf"memory, pair 0: .*{re.escape(repr(lead))}.*'lead'.*'Q0\?'"):
        Pairs.of(rows)


def test_system_message_comes_first(demo):
    pairs = Pairs.of(EXPECTED).with_chat_template(demo[1], system="Be brief.")
    assert pairs[0].prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")


def test_chat_template_is_put_on_once(demo, tmp_path):
    pairs = load_pairs(write(tmp_path / "pairs.jsonl", ROWS), chat_template=demo[1])
    assert pairs == load_pairs(tmp_path / "pairs.jsonl").with_chat_template(demo[1])
    with pytest.raises(PairsError, match="chat template already"):
        pairs.with_chat_template(demo[1])


def test_tokenizer_without_chat_template(demo):
    plain = copy.deepcopy(demo[1])
    plain.chat_template = None
    with pytest.raises(PairsError, match=r"tokenizer.*no chat template"):
        render_chat(plain, "Hello")
