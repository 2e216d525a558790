"""Schedules: every group keeps its chance, later rounds have more items, and a budget is kept to."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from austeer.errors import TaskError
from austeer.tuning.schedule import (
    CALIBRATION,
    ETA,
    FEWEST,
    FINAL_STEPS,
    FINAL_TEXTS,
    FINALISTS,
    NEUTRAL_COST,
    RESERVE,
    STEPS,
    TEXTS,
    Costs,
    Schedule,
    make_schedule,
)

groups_of = st.lists(st.sampled_from("abcd"), min_size=1, max_size=40)


def work(schedule, groups):
    """Candidates times items of all rounds, from the rules in words: a third of each group goes on."""
    sizes = {g: len(schedule.fractions) * sum(groups[a] == g for a in schedule.arms) for g in set(groups)}
    total = before = 0
    for number, items in enumerate(schedule.items, 1):
        if number == len(schedule.items) and schedule.final_texts > schedule.texts:
            before = 0  # at other strengths
        total += sum(sizes.values()) * (items - before)
        before = items
        sizes = {g: max(1, -(-size // ETA)) for g, size in sizes.items()}
    return total


def finalists(schedule, groups):
    """Candidates of the last round."""
    sizes = [len(schedule.fractions) * sum(groups[a] == g for a in schedule.arms) for g in set(groups)]
    for _ in schedule.items[1:]:
        sizes = [-(-size // ETA) for size in sizes]
    return sum(sizes)


@given(groups_of, st.integers(1, 500), st.integers(1, 40))
def test_without_a_budget_everything_is_tried_and_finalists_see_all_items(groups, items, texts):
    schedule = make_schedule(groups, items, texts)
    assert schedule.arms == tuple(range(len(groups)))
    assert schedule.texts == min(texts, TEXTS) and schedule.final_texts == min(texts, FINAL_TEXTS)
    assert schedule.items[-1] == items and list(schedule.items) == sorted(schedule.items)
    largest = len(schedule.fractions) * max(groups.count(g) for g in set(groups))
    for _ in schedule.items[1:]:
        assert largest > FINALISTS
        largest = -(-largest // ETA)
    assert largest <= FINALISTS


@given(groups_of, st.integers(1, 500), st.floats(1, 3000), st.floats(1e-4, 1.0), st.floats(1e-4, 1.0))
def test_a_budget_is_kept_to_or_refused(groups, items, budget, item, text):
    costs = Costs(item, text, spent=0.1 * budget)
    try:
        schedule = make_schedule(groups, items, 12, budget, costs)
    except TaskError as error:
        assert "too little" in str(error)
        needed = len(set(groups)) * (STEPS * NEUTRAL_COST * text / (1 - CALIBRATION) + min(FEWEST, items) * item)
        assert needed > (1 - RESERVE - 0.1) * budget
        return
    assert {groups[a] for a in schedule.arms} == set(groups)
    steps = len(schedule.arms) * schedule.texts * STEPS
    if schedule.final_texts > schedule.texts:
        steps += finalists(schedule, groups) * schedule.final_texts * FINAL_STEPS
    seconds = steps * NEUTRAL_COST * text + work(schedule, groups) * item
    assert seconds <= (1 - RESERVE - 0.1) * budget * (1 + 1e-9)
    assert min(schedule.items) >= min(FEWEST, items)


def test_more_time_is_used():
    groups = [f"{operation} {site}" for operation in "ab" for site in "cd" for _ in range(5)]
    costs = Costs(item=0.05, text=0.2)
    small, large = (make_schedule(groups, 100, 12, budget, costs) for budget in (60, 600))
    assert work(large, groups) > 3 * work(small, groups)
    assert large.texts > small.texts and large.final_texts > small.final_texts


def test_json_gives_it_back():
    schedule = make_schedule(["a", "b"] * 6, 50, 12)
    assert Schedule.from_json(json.loads(json.dumps(schedule.to_json()))) == schedule


@given(groups_of, st.integers(1, 500), st.floats(1e-3, 1.0), st.floats(1e-3, 1.0))
def test_the_refusal_says_what_is_enough(groups, items, item, text):
    costs = Costs(item, text, spent=2.0)
    with pytest.raises(TaskError, match=f"2 s.* {len(set(groups))} kinds") as found:
        make_schedule(groups, items, 12, 2.0, costs)
    enough = int(str(found.value).split("at least ")[1].split(" s")[0])
    assert {groups[a] for a in make_schedule(groups, items, 12, enough, costs).arms} == set(groups)
