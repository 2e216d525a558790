"""Tasks in memory: what an item must be, pairs of it, and splits that keep groups whole."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from austeer import Pair, Pairs, PairsError
from austeer.errors import TaskError
from austeer.tasks import Item, Task
from austeer.tasks.task import grouped


def numbered(count, groups=None):
    """Items 0, 1, 2 ..., each in the group of its number, or in ``groups[i]``."""
    items = (Item(f"Q{i}", (" a", " b"), i % 2, group="" if groups is None else str(groups[i])) for i in range(count))
    return Task("numbers", "choice", tuple(items))


def prompts(task):
    return {item.prompt for item in task}


@pytest.mark.parametrize(
    "kind, item, message",
    [
        ("guess", Item("Q", (" a", " b")), "kind.*'guess'.*choice, continuation, numeric"),
        ("numeric", Item(" \n", answer=1.0), "prompt.*' .n'"),
        ("choice", Item("Q\ud800", (" a", " b")), "prompt.*ud800"),
        ("choice", Item("Q", (" a",)), r"options.*\(' a',\)"),
        ("choice", Item("Q", (" a", " a")), r"options.*\(' a', ' a'\)"),
        ("continuation", Item("Q", (" a", "")), r"options.*\(' a', ''\)"),
        ("choice", Item("Q", (" a", " b"), 2), "label.*2"),
        ("choice", Item("Q", (" a", " b"), -1), "label.*-1"),
        ("choice", Item("Q", (" a", " b"), lead=" ("), r"lead.*' \('.*'Q'"),
        ("numeric", Item("Q"), "answer.*None"),
        ("numeric", Item("Q", answer=float("nan")), "answer.*nan"),
    ],
)
def test_what_is_no_item(kind, item, message):
    fine = Item("Q", (" a", " b"), answer=1.0)
    with pytest.raises(TaskError, match=message):
        Task("t", kind, (fine, item), "here")


def test_no_items():
    with pytest.raises(TaskError, match=r"here.*no item"):
        Task("t", "choice", (), "here")


def test_pairs_set_the_wanted_option_against_each_other_one():
    task = Task("t", "continuation", (Item("Q", (" a", " b", " c"), 1), Item("R", (" x", " y"), 0)), "here")
    expected = [Pair("Q", " b", " a"), Pair("Q", " b", " c"), Pair("R", " x", " y")]
    assert task.pairs() == Pairs(tuple(expected), "here")
    with pytest.raises(TaskError, match="numeric"):
        Task("t", "numeric", (Item("Q", answer=1.0),)).pairs()


def test_pairs_and_back():
    pairs = Pairs.of([("Q", " a", " b"), ("R", " x", " x"), ("S", " c", " d")])
    task = Task.of_pairs(pairs)
    assert task.kind == "continuation" and [item.label for item in task] == [0, 0], "equal sides say nothing"
    assert [vars(p) for p in task.pairs()] == [vars(pairs[0]), vars(pairs[2])]


# --- splits ----------------------------------------------------------------------------------------------------------

fractions = st.lists(st.floats(0.05, 0.5), min_size=1, max_size=4).map(
    lambda values: {f"part {i}": value / max(1, sum(values)) for i, value in enumerate(values)}
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), fractions, st.integers(0, 5), st.randoms())
def test_parts_are_disjoint_keep_groups_whole_and_do_not_depend_on_the_order(groups, parts, seed, random):
    task = numbered(len(groups), groups)
    try:
        found = task.split(parts, seed)
    except TaskError as error:
        # Said rightly: some part can have no group of its own.
        assert "too few" in str(error)
        return
    assert list(found) == list(parts)
    of_part = {name: {item.group for item in part} for name, part in found.items()}
    for name, part in found.items():
        assert len(part) and list(part) == [item for item in task if item in part.items], "in the task's own order"
        assert prompts(part) == {item.prompt for item in task if item.group in of_part[name]}, "whole groups"
    assert sum(map(len, of_part.values())) == len(set().union(*of_part.values())), "disjoint"
    if sum(parts.values()) > 1 - 1e-9:
        assert sum(map(len, found.values())) == len(task), "complete"
    shuffled = list(task)
    random.shuffle(shuffled)
    again = Task("numbers", "choice", tuple(shuffled)).split(parts, seed)
    assert {name: prompts(part) for name, part in again.items()} == {name: prompts(p) for name, p in found.items()}


def test_parts_have_their_fractions_and_depend_on_the_seed():
    task = numbered(1000)
    found = task.split({"a": 0.5, "b": 0.2}, seed=1)
    assert [len(part) for part in found.values()] == [500, 200]
    assert prompts(task.split({"a": 0.5, "b": 0.2}, seed=2)["a"]) != prompts(found["a"])
    assert prompts(task.split({"a": 0.5}, seed=1)["a"]) == prompts(found["a"])


def test_one_group_is_never_divided():
    task = numbered(6, [0] * 6)
    with pytest.raises(TaskError, match=r"memory.*6 items in 1 group .*'b'"):
        task.split({"a": 0.5, "b": 0.5})


@pytest.mark.parametrize("prompt", ["Sentence:", ""])
def test_a_prompt_that_all_share_divides_by_texts(prompt):
    pairs = Pairs.of([(prompt, f" now {i % 50}", f" then {i % 50}") for i in range(100)])
    task = Task.of_pairs(pairs)
    parts = task.split({"a": 0.5, "b": 0.25, "c": 0.25})
    assert task.grouped_by == "texts" and [len(part) for part in parts.values()] == [50, 26, 24]
    options = [{item.options for item in part} for part in parts.values()]
    assert not options[0] & options[1] and not options[1] & options[2], "equal texts stay together"


def test_prompts_that_tell_items_apart_are_the_groups():
    four = Task.of_pairs(Pairs.of([(f"Q{i % 4}", f" a{i}", f" b{i}") for i in range(12)]))
    assert four.grouped_by == "prompt" and {item.group for item in four} == {"Q0", "Q1", "Q2", "Q3"}
    two = Task.of_pairs(Pairs.of([(f"Q{i % 2}", f" a{i}", f" b{i}") for i in range(12)]))
    assert two.grouped_by == "texts" and len({item.group for item in two}) == 12
    own = grouped([Item("Q", (" a", " b"), group="x"), Item("Q", (" c", " d"))])
    assert own[1] == "own" and [item.group for item in own[0]] == ["x", "Q"]


@pytest.mark.parametrize("parts", [{}, {"a": 0.0}, {"a": 0.7, "b": 0.4}, {"a": -0.5, "b": 0.5}])
def test_fractions_that_are_none(parts):
    with pytest.raises(TaskError, match=f"split.*{re.escape(str(parts))}"):
        numbered(10).split(parts)


# --- samples, chat, digests ------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 3))
def test_a_larger_sample_has_the_smaller_one(a, b, seed):
    task = numbered(30)
    small, large = (task.take(count, seed) for count in sorted((a, b)))
    assert len(small) == min(a, b, 30) and prompts(small) <= prompts(large)
    assert len(prompts(small)) == len(small)


def test_chat_template_opens_the_answer_and_options_lose_their_blank(demo):
    tokenizer = demo[1]
    task = numbered(2).with_chat_template(tokenizer)
    message = [{"role": "user", "content": "Q0"}]
    rendered = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    assert task[0].prompt == rendered and task[0].options == ("a", "b") and task.chat_template
    assert task[0].group == "Q0", "a group does not depend on the template"
    assert task.pairs().chat_template
    with pytest.raises(PairsError, match="chat template already"):
        task.with_chat_template(tokenizer)


def test_digests_tell_other_items_apart():
    task = numbered(3)
    others = [
        task.pick([0, 1]),
        task.pick([1, 0, 2]),
        Task("t", "continuation", task.items),
        Task("t", "choice", (*task.items[:2], Item("Q2", (" a", " b"), 1))),
    ]
    assert len({t.digest() for t in [task, *others]}) == 5
    assert Task("another name", "choice", task.items, "elsewhere").digest() == task.digest()
