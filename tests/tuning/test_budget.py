"""A time budget: whenever it is over, what was found so far is given, after one more unit of work at most."""

import pytest
import torch

from austeer.errors import TaskError
from austeer.forward import timing
from austeer.tuning import scorer
from austeer.tuning.budget import HELD_OUT, Budget
from austeer.tuning.compare import ROUNDS, time_tokens
from austeer.tuning.held_out import hold_out
from austeer.tuning.schedule import FRACTIONS, Costs
from austeer.tuning.scorer import Scorer
from austeer.tuning.search import no_bars, search
from searches import NEUTRAL, arms_of, material_of, words

SECONDS = 100.0


@pytest.fixture(scope="module")
def small(one_lively, demo):
    return material_of(one_lively, demo[1])


class Clock:
    """Time that stands still, but for the call of the model at which it jumps to ``to``."""

    def __init__(self, monkeypatch, at, to=SECONDS):
        self.now, self.calls, self.at, self.to, self.late = 0.0, 0, at, to, 0
        monkeypatch.setattr("austeer.tuning.budget.perf_counter", lambda: self.now)
        monkeypatch.setattr(Scorer, "costs", Costs(0.0, 0.0, 0.0))  # all of it is planned
        for module, name in ((scorer, "option_scores"), (scorer, "side_effects"), (timing, "_decode")):
            monkeypatch.setattr(module, name, self.counted(getattr(module, name)))

    def counted(self, run):
        def ran(*args, **options):
            self.late += self.now > 0
            self.calls += 1
            if self.calls == self.at:
                self.now = self.to
            return run(*args, **options)

        return ran


def by_operation(arm):
    return arm.operation


@pytest.mark.parametrize("at", range(2, 20))
def test_a_search_ends_where_time_is_up_and_says_what_is_left_out(at, small, monkeypatch):
    monkeypatch.setattr("austeer.tuning.search.AT_ONCE", 4)  # the clock is looked at after four items
    arms = arms_of(small, ks=(1, 2, 4, 8, 16))
    own = Scorer(small.model, small.tokenizer, words(), NEUTRAL)
    clock, budget = Clock(monkeypatch, at), Budget(SECONDS)
    try:
        found = search(own, arms, group=by_operation, max_kl=0.05, budget=budget)
    except TaskError as error:
        assert clock.late <= 1 and "budget: found 100 s" in str(error), "in the first step towards the limit"
        return
    assert clock.late <= 2, "one unit of work"
    most = max(len(standing.items) for standing in found.standings)
    assert found.best().items == tuple(own.order[:most])
    keys = [(standing.candidate.arm.digest, standing.fraction) for standing in found.standings]
    assert len(set(keys)) == len(keys), "every candidate stands once"
    for standing in found.standings:
        torch.testing.assert_close(standing.change, own.changes([standing.candidate], standing.items)[0])
    planned = most == len(own.order) and len(keys) == len(arms) * len(FRACTIONS)
    assert bool(budget.left_out) != planned
    if most < len(own.order):
        assert f"tuning items that the best were judged by: {most} of {len(own.order)}" in budget.left_out


@pytest.mark.parametrize("at", [1, 2])
def test_held_out_items_are_as_many_as_time_allows_and_the_same_for_all(at, small, monkeypatch):
    own = Scorer(small.model, small.tokenizer, words(), NEUTRAL, name="test")
    found = search(own, arms_of(small), group=by_operation, max_kl=0.05)
    candidates = [found.best_of(operation=operation).candidate for operation in ("scale", "shift")]
    whole, _ = hold_out(own, candidates)
    Clock(monkeypatch, at, to=HELD_OUT * SECONDS)
    monkeypatch.setattr("austeer.tuning.search.AT_ONCE", 12)
    budget = Budget(SECONDS)
    other = Scorer(small.model, small.tokenizer, words(), NEUTRAL, name="other")
    unsteered, rows = hold_out(other, candidates, budget=budget)
    cut = ["held-out neutral texts: 1 of 3", "held-out items: 4 of 16"]  # the first text says how long others take
    assert (whole.items, unsteered.items) == (16, 4) and budget.left_out == cut[at - 1 :]
    assert [(row.kl, row.rise) for row in rows] == other.side_effects(candidates, at if at == 1 else 3)
    items = sorted(other.order[:4])
    margins = other.base(items).margin[0]
    assert unsteered.log_odds == pytest.approx(float(margins.mean()))
    for row, candidate in zip(rows, candidates):
        assert row.effect == pytest.approx(float(other.changes([candidate], items).mean()))


@pytest.mark.parametrize(("at", "rounds"), [(1, 0), (3, 2), (12, 5), (100, ROUNDS)])
def test_times_of_tokens_are_as_many_as_time_allows(at, rounds, small, monkeypatch):
    Clock(monkeypatch, at)
    budget = Budget(SECONDS)
    found = time_tokens(small.model, small.tokenizer, {}, "The soup was", no_bars, budget)
    assert {timing.rounds for timing in found.values()} == ({rounds} if rounds else set())
    said = f"rounds of times of a token: {rounds} of {ROUNDS}"
    assert budget.left_out == ([said] if rounds < ROUNDS else [])
    if rounds < ROUNDS:
        assert time_tokens(small.model, small.tokenizer, {}, "The soup was", no_bars, budget) == {}


def test_what_is_kept_for_other_searches_is_no_part_of_the_time(monkeypatch):
    now = [10.0]
    monkeypatch.setattr("austeer.tuning.budget.perf_counter", lambda: now[0])
    budget = Budget(SECONDS)
    now[0] += 20
    with pytest.raises(KeyboardInterrupt), budget.paused():
        now[0] += 300
        raise KeyboardInterrupt
    assert (budget.spent, budget.total) == (20, 320) and not budget.is_over(0.5)
