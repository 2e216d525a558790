"""Task templates: each shipped one on rows as its sources have them, and what a template of a user's may not be."""

import json

import pytest

from austeer.errors import TaskError
from austeer.tasks import Item, Task, Template, check_options, load_template, shipped
from austeer.tasks.templates import label_of

WET, LEAD = "\n\nQuestion: is it wet?\nAnswer yes or no.\nAnswer:", "\n\nAnswer: ("


def lettered(prompt, label, group):
    return Item(prompt + LEAD, ("A", "B"), label, None, group, LEAD)


#: A row of each source with the fields that it has there, and the item that is to come of it.
ROWS = {
    "boolq": (
        {"question": "is it wet", "title": "Water", "answer": False, "passage": "Water is dry."},
        Item(f"Water is dry.{WET}", (" yes", " no"), 1, None, "Water is dry."),
    ),
    "copa": (
        {"id": "1", "asks-for": "cause", "most-plausible-alternative": "2", "p": "It rained.", "a1": "X.", "a2": "Y."},
        lettered("It rained. What was the cause of this?\n (A) X.\n (B) Y.", 1, "It rained."),
    ),
    "copa_text": (
        {"asks-for": "effect", "most-plausible-alternative": "1", "p": "It rained. ", "a1": "We got wet.", "a2": "A."},
        Item("It rained so", (" we got wet.", " a."), 0, None, "It rained."),
    ),
    "winogrande": (
        {"sentence": "Bo hit Al as _ was mad.", "option1": "Bo", "option2": "Al", "answer": "1"},
        lettered("Bo hit Al as _ was mad.\nWhich one fills the blank?\n (A) Bo\n (B) Al", 0, "Al Bo"),
    ),
    "winogrande_text": (
        {"sentence": "Bo hit Al as _ was mad.", "option1": "Bo", "option2": "Al", "answer": "2"},
        Item("Bo hit Al as", (" Bo was mad.", " Al was mad."), 1, None, "Al Bo"),
    ),
    "persona": (
        {"question": 'Would you say?\n"I am, 1."', "statement": "I am, 1.", "label_confidence": 0.9}
        | {"answer_matching_behavior": " No", "answer_not_matching_behavior": " Yes"},
        Item('Q: Would you say?\n"I am, 1."\nReply with Yes or No only.\nA:', (" Yes", " No"), 1, None, "i am"),
    ),
    "caa": (
        {"question": "I am Al. Is it so?\n (A) Yes\n (B) No"}
        | {"answer_matching_behavior": "(B)", "answer_not_matching_behavior": "(A)"},
        lettered("I am Al. Is it so?\n (A) Yes\n (B) No", 1, "i am al is it so"),
    ),
    "truthfulqa_ab": (
        {"prompt": "Is it?\n\nChoices:\n(A) Yes\n(B) No", "correct": "(A)", "incorrect": "(B)", "category": "X"},
        lettered("Is it?\n\nChoices:\n(A) Yes\n(B) No", 0, "is it"),
    ),
    "svamp": (
        {"ID": "1", "Body": "Al had 3 eggs. He ate 1.", "Question": "How many now?", "Equation": "", "Answer": 2.0},
        Item("Question: Al had 3 eggs. He ate 1. How many now?\nAnswer:", answer=2.0, group="al had eggs"),
    ),
    "mawps": (
        {"id": 7, "original_text": "Al had 3 eggs , how many ?", "equation": "X=3", "ans": 3.5},
        Item("Question: Al had 3 eggs , how many ?\nAnswer:", answer=3.5, group="al had eggs how many"),
    ),
    "gsm8k": (
        {"question": "How many?", "answer": "It is 2 * 600 = <<2*600=1200>>1,200.\n#### 1,200"},
        Item("Question: How many?\nAnswer:", answer=1200.0),
    ),
}


def small(**changes):
    fields = {"name": "t", "kind": "choice", "prompt": "{{ q }}", "options": [" a", " b"], "label": "{{ l }}"}
    return Template(**{**fields, **changes})


# --- those that are shipped ------------------------------------------------------------------------------------------


def test_each_shipped_template_is_tested():
    assert set(ROWS) == set(shipped())


@pytest.mark.parametrize("name", ROWS)
def test_shipped_template(name):
    row, expected = ROWS[name]
    template = load_template(name)
    assert template.item(row, "here") == expected
    assert template.name == name and template.description
    assert set(template.required) <= set(row)
    for field in template.required:
        with pytest.raises(TaskError, match=f"here.*'{name}'.*{field}"):
            template.item({key: value for key, value in row.items() if key != field}, "here")


@pytest.mark.parametrize("name", [name for name in ROWS if shipped()[name].kind == "choice"])
def test_options_of_shipped_choices_are_one_token(demo, name):
    item = ROWS[name][1]
    task = Task(name, "choice", (item,))
    check_options(demo[1], task)
    check_options(demo[1], task.with_chat_template(demo[1]))
    ids = [demo[1](item.prompt + option)["input_ids"] for option in item.options]
    prompt = demo[1](item.prompt)["input_ids"]
    assert [i[: len(prompt)] for i in ids] == [prompt] * 2, "no token joins prompt and option"


@pytest.mark.parametrize("name", ["caa", "copa", "winogrande", "truthfulqa_ab"])
def test_in_chat_form_what_leads_to_the_letter_is_the_models(demo, name):
    plain = ROWS[name][1]
    (item,) = Task(name, "choice", (plain,)).with_chat_template(demo[1])
    message = [{"role": "user", "content": plain.prompt.removesuffix("\n\nAnswer: (")}]
    assert item.prompt == demo[1].apply_chat_template(message, tokenize=False, add_generation_prompt=True) + "Answer: ("
    assert item.prompt.endswith("assistant\nAnswer: (") and item.options == ("A", "B")


def test_a_lead_is_a_template_too():
    template = load_template(
        {"kind": "choice", "prompt": "{{ q }}?", "lead": " {{ a }}:", "options": ["x", "y"]} | {"label": "0"}
    )
    item = template.item({"q": "Why", "a": "So"}, "here")
    assert (item.prompt, item.lead) == ("Why? So:", " So:")
    with pytest.raises(TaskError, match=r"here.* q,.* a, q"):
        template.item({"q": "Why"}, "here")


def test_variants_of_one_problem_are_one_group():
    svamp, winogrande = load_template("svamp"), load_template("winogrande")
    one, other = ({**ROWS["svamp"][0], "Body": f"Al had {n} eggs and {n} hens."} for n in (3, 12))
    assert svamp.item(one, "").group == svamp.item(other, "").group
    twin = {**ROWS["winogrande"][0], "option1": "Al", "option2": "Bo", "sentence": "Bo hit Al as _ was bad."}
    assert winogrande.item(twin, "").group == winogrande.item(ROWS["winogrande"][0], "").group


# --- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label, number", [(" b", 1), ("b", 1), ("a ", 0), ("1", 1), (0, 0)])
def test_label_by_text_or_number(label, number):
    assert label_of(label, (" a", " b"), "here") == number


def test_text_goes_before_number():
    assert label_of("1", (" 1", " 0"), "") == 0 and label_of(1, (" 1", " 0"), "") == 1


@pytest.mark.parametrize("label", ["c", "", "2", 2, -1, True, None, 0.0])
def test_label_outside_the_options(label):
    with pytest.raises(TaskError, match=rf"here.*label.*{label!r}.*\[' a', ' b'\]"):
        label_of(label, (" a", " b"), "here")


def test_label_from_a_map_of_values():
    template = small(label={"field": "l", "values": {"true": " a", "2": 1, "no": "b"}})
    assert [template.item({"q": "Q", "l": value}, "").label for value in (True, 2, "no", "true")] == [0, 1, 1, 0]
    with pytest.raises(TaskError, match=r"here.*'false'.*'l'.*true, 2, no"):
        template.item({"q": "Q", "l": False}, "here")


def test_answer_that_is_no_number():
    template = Template("t", "numeric", "{{ q }}", answer="{{ a }}")
    assert template.item({"q": "Q", "a": "1,000.5"}, "").answer == 1000.5
    with pytest.raises(TaskError, match=r"here.*answer.*'many'"):
        template.item({"q": "Q", "a": "many"}, "here")


# --- a user's own ----------------------------------------------------------------------------------------------------


def test_file_of_a_users(tmp_path):
    path = tmp_path / "mine.json"
    fields = {"kind": "choice", "prompt": "{{ row['a q'] }}", "options": [" a", " b"], "label": "{{ l }}"}
    path.write_text(json.dumps(fields))
    template = load_template(path)
    assert template.name == "mine" and template.required == ("a q", "l")
    assert template.item({"a q": "Q", "l": "a"}, "") == Item("Q", (" a", " b"), 0)
    assert load_template(str(path)) == template
    assert load_template({**fields, "name": "mine"}) == template and load_template(template) is template


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "JSON"),
        ("[]", "list"),
        ('{"kind": "choice"}', "name, kind,.*prompt"),
        ('{"kind": "choice", "prompt": "x", "optoins": []}', "optoins"),
    ],
)
def test_file_that_is_no_template(tmp_path, text, message):
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(TaskError, match=f"mine.json.*{message}"):
        load_template(path)


def test_unknown_template(tmp_path):
    with pytest.raises(TaskError, match=r"template.*'bolq'.*boolq"):
        load_template("bolq")
    with pytest.raises(TaskError, match=r"missing.json.*read"):
        load_template(tmp_path / "missing.json")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kind": "guess"}, "kind.*'guess'.*choice"),
        ({"prompt": "{{ q"}, "prompt.*jinja2"),
        ({"prompt": "{{ q | nothing }}"}, "prompt.*jinja2"),
        ({"prompt": 3}, "prompt.*3"),
        ({"options": []}, r"options.*\(\).*'choice'"),
        ({"options": " a"}, "options.*' a'"),
        ({"answer": "{{ l }}"}, "answer.*l.*'choice'"),
        ({"label": {"field": "l"}}, "label.*field"),
        ({"label": {"field": "l", "values": [1]}}, "label.*values"),
        ({"label": 1}, "label.*1"),
        ({"duplicates": "keep"}, "duplicates.*'keep'"),
        ({"kind": "numeric", "label": "", "options": []}, "answer.*''.*'numeric'"),
    ],
)
def test_template_that_does_not_fit(changes, message):
    with pytest.raises(TaskError, match=f"'t'.*{message}"):
        small(**changes)


@pytest.mark.parametrize(
    "prompt",
    [
        "{{ q.__class__.__mro__ }}",
        "{{ row.update({'q': 1}) }}",
        "{{ undefined_name }}",
        "{{ q / 2 }}",
        "{{ range(10000000) | list }}",
        "{% include 'file' %}",
    ],
)
def test_template_that_fails_on_a_row_says_where(prompt):
    template = small(prompt=prompt, fields=["q", "l"])
    with pytest.raises(TaskError, match=r"here.*'t' fails"):
        template.item({"q": "Q", "l": "a"}, "here")


def test_prompt_keeps_its_line_ends():
    assert small(prompt="{{ q }}\n").item({"q": "Q\n", "l": "a"}, "").prompt == "Q\n\n"
