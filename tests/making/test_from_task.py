"""Pairs from labelled tasks: options, numbers that rows exchange, balance."""

import random
from collections import Counter

import pytest

from austeer import PairsError
from austeer.making import pairs_from_task
from austeer.making.from_task import balanced, partners, written
from austeer.pairs.pair import Pair
from austeer.tasks import Item, Task, load_task
from places import SHARED_DATA as DATA


def choice(*items, **options):
    return Task("t", "choice", tuple(Item(*item) for item in items), **options)


def numeric(answers, **options):
    return Task("n", "numeric", tuple(Item(f"Row {i}. Answer:", (), 0, a) for i, a in enumerate(answers)), **options)


def rows(made):
    return [(p.prompt, p.positive, p.negative) for p in made.pairs]


def test_the_wanted_option_against_each_other_one():
    made = pairs_from_task(choice(("Q1", (" a", " b", " c"), 1), ("Q2", (" a", " b"), 0)), ending=".")
    assert rows(made) == [("Q1", " b.", " a."), ("Q1", " b.", " c."), ("Q2", " a.", " b.")]
    assert made.pairs.source == "memory" and not made.dropped


@pytest.mark.parametrize(
    "number, text", [(51.0, "51"), (-3.0, "-3"), (0.25, "0.25"), (1e-7, "0.0000001"), (1e6, "1000000")]
)
def test_numbers_are_written_as_people_do(number, text):
    assert written(number) == text


@pytest.mark.parametrize("seed", range(20))
def test_rows_exchange_different_texts_of_one_form(seed):
    rng = random.Random(seed)
    texts = [str(rng.choice([rng.randrange(10), rng.randrange(10, 100), 7, 0.5])) for _ in range(rng.randrange(2, 60))]
    found = partners(texts, seed)
    assert all(found[found[i]] == i and texts[i] != texts[found[i]] for i in found)
    # No two rows that differ are both left over.
    assert len({texts[i] for i in range(len(texts)) if i not in found}) <= 1
    forms = {}
    for text in texts:
        forms.setdefault("0.0" if "." in text else "0" * len(text), []).append(text)
    alone = sum(
        max(len(own) % 2, 2 * max(Counter(own).values()) - len(own)) for own in forms.values()
    )  # without a partner of their own form
    assert len(texts) - len(found) + sum(len(texts[i]) != len(texts[j]) for i, j in found.items()) <= alone


def test_a_number_alone_tells_nothing():
    answers = [3.0, *map(float, range(1, 200))]
    made = pairs_from_task(numeric(answers), seed=3)
    found = rows(made)
    assert all(p.startswith(" ") and p != n for _, p, n in found)
    assert Counter(p for _, p, _ in found) == Counter(n for _, _, n in found)
    larger = sum(float(p) > float(n) for _, p, n in found)
    assert larger * 2 == len(found), "each exchange has the larger number on either side once"
    assert not made.dropped
    assert pairs_from_task(numeric(answers[1:])).dropped == {"no other row's number fits": 1}
    assert sum(len(p) != len(n) for _, p, n in found) <= 4
    assert rows(pairs_from_task(numeric(answers), seed=3)) == found
    assert rows(pairs_from_task(numeric(answers), seed=4)) != found


def test_no_blank_where_one_stands_or_a_template_ends():
    task = Task("n", "numeric", (Item("One is ", (), 0, 1.0), Item("Two is\n", (), 0, 2.0)))
    assert rows(pairs_from_task(task)) == [("One is ", "1", "2"), ("Two is\n", "2", "1")]
    made = pairs_from_task(numeric([1.0, 2.0], chat_template=True))
    assert rows(made)[0][1:] == ("1", "2") and made.pairs.chat_template


def test_equal_answers_have_no_wrong_one():
    with pytest.raises(PairsError, match=r"memory: .*different answers"):
        pairs_from_task(numeric([4.0, 4.0, 4.0]))


def test_balance_leaves_out_what_one_answer_has_too_many_of():
    items = [(f"Q{i}", (" yes", " no"), int(i >= 7)) for i in range(10)]
    made = pairs_from_task(choice(*items), balance=True, seed=1)
    assert Counter(p for _, p, _ in rows(made)) == {" yes": 3, " no": 3}
    assert made.dropped == {"left out to balance": 4}
    assert rows(made) == rows(pairs_from_task(choice(*items), balance=True, seed=1))
    one_way = [Pair(f"Q{i}", " good", " bad") for i in range(5)]
    assert balanced(one_way, 0) == one_way, "a contrast that has one direction only is meant so"


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")
@pytest.mark.parametrize(
    "name, template", [("svamp_first500", "svamp"), ("mawps_train", "mawps"), ("gsm8k_train", "gsm8k")]
)
def test_real_numeric_tasks(name, template):
    task = load_task(DATA / f"{name}.jsonl", template, limit=400, duplicates="drop")
    made = pairs_from_task(task)
    found = rows(made)
    assert len(found) >= 0.98 * len(task)
    assert Counter(p for _, p, _ in found) == Counter(n for _, _, n in found)
    assert sum(len(p) == len(n) for _, p, n in found) > 0.9 * len(found)
    assert {p for p, *_ in found} <= {item.prompt for item in task}
