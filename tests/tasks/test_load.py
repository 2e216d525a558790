"""Tasks from files: templates, the neutral format, and what is wrong in a row, by file and line."""

import json

import pytest

from austeer import PairsError
from austeer.errors import TaskError
from austeer.tasks import Item, check_options, load_task
from places import SHARED_DATA as DATA

CHOICES = [
    {"prompt": "Sky?", "options": [" blue", " red"], "label": 0, "group": None},
    {"prompt": "Grass?", "options": [" red", " blue", " green"], "label": " green", "group": "plants"},
    {"prompt": "Rose?", "options": [" red", " blue"], "label": "red"},
]


@pytest.fixture
def file(tmp_path):
    """Writes rows as JSONL and gives the path."""

    def write(*rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


# --- the neutral format ----------------------------------------------------------------------------------------------


def test_options(file):
    path = file(*CHOICES)
    task = load_task(path)
    assert task.items == (
        Item("Sky?", (" blue", " red"), 0),
        Item("Grass?", (" red", " blue", " green"), 2, None, "plants"),
        Item("Rose?", (" red", " blue"), 0),
    )
    assert (task.name, task.kind, task.source) == ("rows", "continuation", str(path))
    assert load_task(path, kind="choice").kind == "choice"
    assert load_task(path, limit=2).items == task.items[:2]


def test_numbers(file):
    task = load_task(file({"prompt": "1 + 1", "answer": 2}, {"prompt": "1 / 2", "answer": "0.5"}))
    assert task.kind == "numeric" and [item.answer for item in task] == [2.0, 0.5]


def test_pairs_are_as_load_pairs_reads_them(file):
    rows = [
        {"prompt": "P", "positive": " a", "negative": " b", "topic": "x"},
        {"prompt": "Q", "positive": " a", "negative": " a"},
        {"prompt": "R", "positive": " c", "negative": " d", "group": "x"},
        {"prompt": "P", "positive": " a", "negative": " b"},
    ]
    task = load_task(file(*rows))
    assert task.kind == "continuation"
    # Equal sides, and twice the same, are left out.
    assert task.items == (Item("P", (" a", " b")), Item("R", (" c", " d"), group="x"))
    with pytest.raises(PairsError, match=r"rows.jsonl.*line 2.*'positive'"):
        load_task(file(rows[0], {"prompt": "Q", "negative": " a"}))


def test_datasets():
    rows = [{**row, "label": i, "group": row.get("group")} for i, row in zip((0, 2, 0), CHOICES)]
    task = load_task(pytest.importorskip("datasets").Dataset.from_list(rows))
    assert [(item.prompt, item.label) for item in task] == [("Sky?", 0), ("Grass?", 2), ("Rose?", 0)]


def test_several_files_and_where(file):
    file({**CHOICES[0], "part": "a"}, {**CHOICES[1], "part": "b"}, name="1.jsonl")
    path = file({**CHOICES[2], "part": "b"}, name="2.jsonl")
    task = load_task(str(path.parent / "*.jsonl"), where={"part": "b"})
    assert [item.prompt for item in task] == ["Grass?", "Rose?"]
    with pytest.raises(TaskError, match=r"no row.*{'part': 'c'}"):
        load_task(str(path.parent / "*.jsonl"), where={"part": "c"})


# --- templates -------------------------------------------------------------------------------------------------------


def test_template_asks_for_what_the_file_lacks(file):
    path = file({"passage": "P", "question": "q", "answer": True}, {"passage": "P", "question": "r"})
    with pytest.raises(TaskError, match=r"rows.jsonl.*line 2.*passage, question.*answer, pass"):
        load_task(path, "boolq")
    task = load_task(path, "boolq", limit=1)
    assert (task.name, task.kind) == ("boolq", "choice") and task[0].label == 0


# --- bad rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "Q", "options": [" a", " b"], "label": 2}, "label.*2"),
        ({"prompt": "Q", "options": " a", "label": 0}, "options.*' a'"),
        ({"prompt": "Q", "options": [" a", 3], "label": 0}, r"options.*\[' a', 3\]"),
        ({"prompt": 3, "options": [" a", " b"], "label": 0}, "prompt.*3"),
        ({"prompt": "Q", "options": [" a", " b"]}, "prompt, options,.*prompt, options, label"),
        ({"prompt": "Q", "options": [" a", " b"], "label": None}, "prompt, options,.*, label.*label is null"),
        ({"prompt": "Q", "options": [" a", " b"], "label": 0, "extra": 1}, "extra.*prompt, options, label"),
    ],
)
def test_bad_row_is_named(file, row, message):
    with pytest.raises(TaskError, match=f"rows.jsonl.*line 2.*{message}"):
        load_task(file(CHOICES[0], row))


@pytest.mark.parametrize("answer", ["many", True, "", "1/2"])
def test_answer_that_is_no_number(file, answer):
    with pytest.raises(TaskError, match=f"rows.jsonl.*line 1.*answer.*{answer!r}"):
        load_task(file({"prompt": "Q", "answer": answer}))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q", "choices": [" a", " b"], "label": 0},
        {"prompt": "Q", "options": [" a", " b"], "label": 0, "gruop": "x"},
        {"prompt": "Q", "options": [" a", " b"], "label": 0, "answer": 3},
        {"question": "Q"},
    ],
)
def test_fields_that_no_form_has(file, row):
    with pytest.raises(TaskError, match=f"line 1.*{', '.join(row)}.*prompt, options, label.*prompt, answer"):
        load_task(file(row))


@pytest.mark.parametrize("template", [None, "boolq"])
def test_empty_file(file, template):
    with pytest.raises(TaskError, match=r"rows.jsonl.*no row"):
        load_task(file(), template)


def test_duplicates(file):
    path = file(*CHOICES, CHOICES[1])
    with pytest.raises(TaskError, match=r"line 4.*line 2"):
        load_task(path)
    assert load_task(path, duplicates="drop").items == load_task(file(*CHOICES, name="once.jsonl")).items


@pytest.mark.parametrize("duplicates", [None, "drop"])
def test_two_answers_to_one_question(file, duplicates):
    path = file(CHOICES[0], {**CHOICES[0], "label": 1})
    with pytest.raises(TaskError, match=r"line 2.*line 1.*' red'"):
        load_task(path, duplicates=duplicates)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"limit": 0}, "limit.*0"),
        ({"kind": "numeric"}, "kind.*'numeric'"),
        ({"duplicates": "keep"}, "duplicates.*'keep'"),
        ({"kind": "choice", "template": "boolq"}, "kind.*'choice'.*template"),
    ],
)
def test_options_that_are_none(file, options, message):
    with pytest.raises(TaskError, match=message):
        load_task(file(CHOICES[0]), **options)


# --- real files ------------------------------------------------------------------------------------------------------

FILES = [
    ("boolq", "boolq_a", 1000, 951),
    ("copa", "copa_dev", 500, None),
    ("copa_text", "copa_dev", 500, None),
    ("winogrande", "winogrande_a", 633, 443),
    ("winogrande_text", "winogrande_a", 633, 443),
    ("persona", "persona_agreeableness", 1000, None),
    ("persona", "persona_extraversion", 1000, None),
    ("persona", "persona_openness", 1000, None),
    ("caa", "caa_sycophancy_generate", 1000, None),
    ("caa", "caa_sycophancy_test_ab", 50, None),
    ("caa", "caa_hallucination_generate", 1000, None),
    ("caa", "caa_hallucination_test_ab", 50, None),
    ("truthfulqa_ab", "truthfulqa_ab_first400", 400, 400),
    ("svamp", "svamp_first500", 500, 159),
    ("mawps", "mawps_train", 970, None),
    ("gsm8k", "gsm8k_train", 1000, 1000),
]


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")
@pytest.mark.parametrize("template, name, count, groups", FILES)
def test_real_files(demo, template, name, count, groups):
    task = load_task(DATA / f"{name}.jsonl", template)
    assert len(task) == count
    found = {item.group for item in task}
    assert len(found) == groups if groups else len(found) > 20
    if task.kind != "numeric":
        labels = [item.label for item in task]
        assert min(labels.count(label) for label in set(labels)) > 0.3 * count and len(set(labels)) == 2
        some = task.take(200)
        check_options(demo[1], some)
        check_options(demo[1], some.with_chat_template(demo[1]))
    parts = task.split({"a": 0.5, "b": 0.5})
    assert not {item.group for item in parts["a"]} & {item.group for item in parts["b"]}
