"""Numeric answers: every rule of the extraction, that stopping early changes nothing, and rows under several plans."""

from decimal import Decimal

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from austeer import steer
from austeer.errors import TaskError
from austeer.tasks import Item, Task, last_number, numeric_answers
from austeer.tasks.numeric import answer_end, equal_numbers, is_answered, parse_number
from dense_formula import formula_at, random_plan

# --- which number ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, number",
    [
        # The last one counts, without a full stop, unit or percent sign.
        ("3 and 4 make 7.", 7),
        ("It is 12.", 12),
        ("It costs $12.50.", 12.5),
        ("50%", 50),
        # Commas between thousands, and no others.
        ("1,234", 1234),
        ("1,234,567.5", 1234567.5),
        ("1,2", 2),
        ("12,34", 34),
        ("1,2345", 2345),
        # Decimal points.
        ("0.5", 0.5),
        (".5", 0.5),
        ("$.5", 0.5),
        ("1.2.3", 3),
        ("end.5", 5),
        # Signs, currency.
        ("-3", -3),
        ("\u22123", -3),
        ("-$5", -5),
        ("$-5", -5),
        ("$5", 5),
        ("5-3", 3),
        ("(5)-3", 3),
        ("10 - 3", 3),
        ("x-3", 3),
        # Nothing is calculated.
        ("1/2", 2),
        ("2e3", 3),
        ("10:30", 30),
        # None.
        ("", None),
        ("-", None),
        ("9" * 400, None),
        # Where an answer ends.
        ("#### 42\nThat is 6 times 7.", 42),
        ("#### $1,000 in all\nand 5", 1000),
        ("####\n42", 42),
        ("The answer is 8.\nBut 9 is near.", 8),
        ("the answer is: 3 + 5 = 8\n9", 8),
        ("The answer is near.\nIt is 9", 9),
        ("12\n\nQuestion: Al had 3 eggs.\nAnswer: 3", 12),
        ("12\n Q: 3", 12),
        ("12. Question: 3", 3),
        ("Question: 3", 3),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == number


numbers = st.one_of(st.integers(-(10**9), 10**9).map(float), st.integers(-(10**8), 10**8).map(lambda n: n / 100))


@given(numbers, st.sampled_from(["{:,.2f}", "{:.2f}", "{:,.3f}"]), st.sampled_from(["", "$", "£", "€"]))
def test_a_number_is_found_as_it_is_written(number, form, currency):
    written = form.format(abs(number))
    sign = "-" if number < 0 else ""
    for text in (f"So 3 less 4 is {sign}{currency}{written}.", f"= {sign}{written} dollars"):
        assert last_number(text) == pytest.approx(number, abs=1e-9)


@given(st.text("0123456789,.-+$/: \nx", max_size=14))
def test_what_is_found_is_written_there(text):
    """Digits alone, in their order: nothing is made up, and a text has a number if it has a digit."""
    found = last_number(text)
    digits = "".join(c for c in text if c in "0123456789")
    assert (found is None) == (not digits)
    if found is not None:
        shown = format(Decimal(f"{abs(found):.15g}"), "f")
        assert shown.replace(".", "").lstrip("0") in digits


@given(
    st.lists(
        st.sampled_from(["####", "answer is", " 4", "2", ",000", ".5", "\n", "Question:", "Q:", " $", "-", "text"]),
        max_size=14,
    ),
    st.text("0123456789,.-\n Q:#", max_size=12),
)
@example(["answer is", " 4"], "2\n")
@example(["\n", "Question"], ":")
def test_what_is_answered_stays_so(parts, more):
    """Stopping as soon as a text is answered gives the same number as writing on."""
    text = "".join(parts)
    if is_answered(text):
        assert last_number(text + more) == last_number(text)
        assert answer_end(text + more) == answer_end(text)
    # Token by token: the number at the first stop is the number of the whole.
    stopped = next((text[:i] for i in range(len(text) + 1) if is_answered(text[:i])), text)
    assert last_number(stopped) == last_number(text)


# --- whether it is right ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "found, wanted, right",
    [(3.0, 3.0, True), (3.0009, 3.0, True), (3.002, 3.0, False), (None, 0.0, False), (-3.0, 3.0, False)],
)
def test_equal_numbers(found, wanted, right):
    assert equal_numbers(found, wanted) is right


def test_tolerance_is_absolute():
    assert equal_numbers(10.33, 10 + 1 / 3, 0.01) and not equal_numbers(1000.0, 1001.0)


@pytest.mark.parametrize(
    "text, number",
    [("3", 3), (" -3.50 ", -3.5), ("1,234", 1234), (".5", 0.5), ("3.", 3), ("1e3", 1000), ("+2", 2), ("70,000", 70000)],
)
def test_whole_text_that_is_a_number(text, number):
    assert parse_number(text) == number


@pytest.mark.parametrize("text", ["", "three", "3 eggs", "1,2", "1/2", "nan", "inf", "1e999", "--3", "0x10"])
def test_whole_text_that_is_none(text):
    assert parse_number(text) is None


# --- what the model writes -------------------------------------------------------------------------------------------


def greedy(model, tokenizer, prompt, count, special=True):
    """The likeliest next token, again and again, without a cache; up to where the answer ends."""
    ids = tokenizer(prompt, add_special_tokens=special)["input_ids"]
    start = len(ids)
    while len(ids) - start < count:
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id or is_answered(tokenizer.decode(ids[start:])):
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


QUESTIONS = ["Question: 2 + 3?\nAnswer:", "Question: I had 7 eggs and ate 2 of them. How many are left?\nAnswer:", "1"]


@pytest.mark.parametrize("batch_rows", [1, 4, 32])
def test_rows_under_plans_equal_a_loop_under_each(lively, demo, batch_rows):
    task = Task("sums", "numeric", tuple(Item(q, answer=5.0) for q in QUESTIONS))
    plans = {name: random_plan(lively, "attention", 20, "shift", seed) for seed, name in enumerate(("a", "b"))}
    with steer(lively, plans, {"a": 3.0, "b": -5.0}) as steering:
        found = numeric_answers(
            lively, demo[1], task, steering, [None, "a", "b"], max_new_tokens=6, batch_rows=batch_rows
        )
    expected = [[greedy(lively, demo[1], q, 6) for q in QUESTIONS]]
    for name, alpha in (("a", 3.0), ("b", -5.0)):
        with formula_at(lively, plans[name], alpha):
            expected.append([greedy(lively, demo[1], q, 6) for q in QUESTIONS])
    assert found == expected and len({tuple(texts) for texts in found}) == 3


def test_a_row_stops_where_its_answer_ends(demo):
    """SmolLM2 goes on counting after these lines unless it is stopped."""
    prompts = ["Question: 1 + 1?\nThe answer is 2.\n\nQuestion: 2 + 2?\n", "#### 4\n#### 5\n#### 6\n"]
    task = Task("t", "numeric", tuple(Item(p, answer=4.0) for p in prompts))
    done = []
    (texts,) = numeric_answers(*demo, task, max_new_tokens=12, on_items=done.append)
    assert [text.rstrip("\n") for text in texts] == ["The answer is 4.", "#### 7"]
    assert [last_number(text) for text in texts] == [4, 7] and sum(done) == 2


def test_rendered_chat_gets_no_more_special_tokens(lively, demo):
    task = Task("t", "numeric", (Item("2 + 3?", answer=5.0),)).with_chat_template(demo[1])
    found = numeric_answers(lively, demo[1], task, max_new_tokens=4)
    assert found == [[greedy(lively, demo[1], task[0].prompt, 4, special=False)]]


def test_task_with_options(lively, demo):
    with pytest.raises(TaskError, match=r"'choice'.*numeric"):
        numeric_answers(lively, demo[1], Task("t", "choice", (Item("Q", (" a", " b")),)))
