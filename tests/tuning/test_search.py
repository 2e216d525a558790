"""Scoring, calibration and halving: rows of a batch equal one steering at a time; what is known is not run again."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import austeer
from austeer.baselines.arm import Arm, Candidate
from austeer.errors import FileFormatError, TaskError
from austeer.tasks import Item, Task, option_scores
from austeer.tuning import calibrate as calibration
from austeer.tuning import schedule
from austeer.tuning import scorer as scoring
from austeer.tuning.budget import Budget
from austeer.tuning.calibrate import NEAR, STRONGEST, WEAKEST, calibrate
from austeer.tuning.record import Record
from austeer.tuning.scorer import Scorer
from austeer.tuning.search import search
from searches import NEUTRAL, arms_of, material_of, words


@pytest.fixture(scope="module")
def small(one_lively, demo):
    return material_of(one_lively, demo[1])


@pytest.fixture
def scorer(small):
    return Scorer(small.model, small.tokenizer, words(), NEUTRAL)


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def naive_kl(small, candidate):
    """Text by text through the whole model, one steering after another."""
    total = rise = count = 0
    arm = candidate.arm
    for text in NEUTRAL:
        ids = small.tokenizer(text)["input_ids"]
        base = logits_of(small.model, ids)[:-1]
        with austeer.steer(small.model, arm.plan, candidate.strength, k=arm.k):
            steered = logits_of(small.model, ids)[:-1]
        total += float((base.exp() * (base - steered)).sum())
        rows = torch.arange(len(ids) - 1), torch.tensor(ids[1:])
        rise += float((base[rows] - steered[rows]).sum())
        count += len(ids) - 1
    return total / count, rise / count


def mixed(small):
    """A plan for two sites, each with its own strength."""
    plans = [small.momentum.select(site, k=4, operation="shift") for site in ("attention", "ffn")]
    return Arm("momentum", plans[0] + plans[1], 8, "4 + 4", {"attention": 2.0, "ffn": 0.5})


def test_rows_of_one_batch_equal_one_steering_at_a_time(small, scorer):
    candidates = [Candidate(arm, alpha) for arm in arms_of(small) for alpha in (0.5, 3.0)]
    candidates += [Candidate(mixed(small), 1.5)]
    changes = scorer.changes(candidates, range(len(scorer.task)))
    base = option_scores(small.model, small.tokenizer, scorer.task).margins(scorer.task)[0]
    for candidate, change in zip(candidates, changes):
        arm = candidate.arm
        with austeer.steer(small.model, arm.plan.top(arm.k), candidate.strength):
            alone = option_scores(small.model, small.tokenizer, scorer.task).margins(scorer.task)[0]
        torch.testing.assert_close(change, alone - base, atol=2e-5, rtol=1e-4)
        assert change.abs().max() > 1e-3  # it does something


def test_side_effects_equal_the_full_model_text_by_text(small, scorer):
    candidates = [Candidate(arm, 4.0) for arm in arms_of(small)] + [Candidate(mixed(small), 3.0)]
    for candidate, (kl, rise) in zip(candidates, scorer.side_effects(candidates)):
        assert (kl, rise) == pytest.approx(naive_kl(small, candidate), abs=2e-6, rel=1e-3)
        assert kl > 1e-5


def test_what_is_known_is_not_run_again(small, scorer, monkeypatch, tmp_path):
    record = Record(tmp_path / "search.jsonl", {})
    scorer.record = record
    candidates = [Candidate(arm, 2.0) for arm in arms_of(small)]
    first = scorer.changes(candidates, [3, 1, 4])
    effects = scorer.side_effects(candidates, 2)
    runs = []
    plain = scoring.option_scores
    monkeypatch.setattr(
        scoring, "option_scores", lambda m, t, task, *a, **k: runs.append(len(task)) or plain(m, t, task, *a, **k)
    )
    monkeypatch.setattr(scoring, "side_effects", None)
    again = Scorer(small.model, small.tokenizer, words(), NEUTRAL, Record(tmp_path / "search.jsonl", {}))
    told = []
    assert torch.equal(again.changes(candidates, [3, 1, 4], told.append), first)
    assert again.side_effects(candidates, 2) == effects
    assert not runs and sum(told) == 3 * len(candidates)
    wider = again.changes(candidates, [4, 1, 3, 5])
    assert runs and set(runs) == {1}  # only item 5
    torch.testing.assert_close(wider[:, [2, 1, 0]], first, atol=0, rtol=0)


def test_scores_of_other_items_or_strengths_are_not_confused(small, scorer):
    arm = arms_of(small)[0]
    one, two = Candidate(arm, 1.0), Candidate(arm, 2.0)
    both = scorer.changes([one, two, one], [0, 1])
    assert torch.equal(both[0], both[2]) and not torch.equal(both[0], both[1])
    other = Scorer(small.model, small.tokenizer, words(kind="continuation"), NEUTRAL, scorer.record, name="test")
    other.changes([one], [0])
    assert set(scorer.record.get(f"tune items {one.key}")) == {"0", "1"}


def test_a_numeric_task_cannot_be_searched(small):
    task = Task("sums", "numeric", (Item("1 + 1 =", answer=2.0), Item("2 + 2 =", answer=4.0)))
    with pytest.raises(TaskError, match=r"numeric.*austeer pairs make task"):
        Scorer(small.model, small.tokenizer, task, NEUTRAL)


# --- calibration -----------------------------------------------------------------------------------------------------


def test_every_arm_is_brought_to_the_limit(small, scorer):
    arms = [*arms_of(small, ("attention", "ffn"), ("scale", "push", "shift")), mixed(small)]
    done = []
    limits = calibrate(scorer, arms, 0.02, on_arm=lambda: done.append(1))
    assert len(done) == len(arms)
    reached = [arm for arm in arms if limits[arm.digest].reached]
    assert len(reached) >= len(arms) - 1
    for arm in reached:
        limit = limits[arm.digest]
        assert NEAR * 0.02 <= limit.kl <= 0.02
        assert (limit.kl, limit.rise) == pytest.approx(naive_kl(small, Candidate(arm, limit.alpha)), abs=2e-6, rel=1e-3)


class Curves:
    """Side effects from formulas, in place of a model."""

    def __init__(self, curve):
        self.curve, self.asked = curve, 0

    def side_effects(self, candidates, texts=None):
        self.asked += len(candidates)
        return [(self.curve(c.alpha), 0.0) for c in candidates]


@given(st.floats(1e-6, 1e6), st.floats(0.5, 4.0))
def test_a_power_law_is_solved_in_a_few_steps(small_arm, factor, power):
    curves = Curves(lambda alpha: factor * alpha**power)
    limit = calibrate(curves, [small_arm], 0.1)[small_arm.digest]
    exact = (0.1 / factor) ** (1 / power)
    assert curves.asked <= calibration.STEPS
    if WEAKEST * 1.1 < exact < STRONGEST and 1e-4 < exact < 1e4:
        assert limit.alpha is not None and limit.alpha <= exact * (1 + 1e-9)
        if 1.5 <= power <= 3:
            assert limit.reached
    if exact < WEAKEST:
        assert limit.alpha is None


def test_strengths_that_break_the_model_are_beyond_the_limit(small_arm):
    wall = Curves(lambda alpha: math.nan if alpha > 0.3 else 1e-3 * alpha**2)
    limit = calibrate(wall, [small_arm], 0.1)[small_arm.digest]
    assert limit.alpha is not None and 0.1 < limit.alpha <= 0.3 and not limit.reached
    nothing = calibrate(Curves(lambda alpha: 0.0), [small_arm], 0.1)[small_arm.digest]
    assert nothing.alpha == STRONGEST and not nothing.reached
    broken = calibrate(Curves(lambda alpha: math.inf), [small_arm], 0.1)[small_arm.digest]
    assert broken.alpha is None


@pytest.fixture(scope="module")
def small_arm(small):
    return Arm("momentum", small.momentum.select("attention", k=4), 4)


# --- halving ---------------------------------------------------------------------------------------------------------


def by_operation(arm):
    return arm.operation


def test_the_best_of_every_group_is_found(small, scorer):
    arms = arms_of(small, ("attention", "ffn"), ks=(1, 2, 4, 8, 16))
    found = search(scorer, arms, group=by_operation, max_kl=0.05)
    everything = range(len(scorer.task))
    assert len(found.schedule.items) > 1  # there was something to halve
    assert len(found.standings) == len(arms) * 2  # both strengths of every arm
    finalists = [s for s in found.standings if len(s.items) == len(scorer.task)]
    for operation in ("scale", "shift"):
        best = found.best_of(operation=operation)
        mine = [s for s in finalists if s.group == operation]
        assert best in mine and best.effect == max(s.effect for s in mine)
        torch.testing.assert_close(best.change, scorer.changes([best.candidate], best.items)[0])
    assert found.best().effect == max(s.effect for s in finalists)
    assert sorted(found.best().items) == list(everything)
    for standing in found.standings:
        assert standing.candidate.alpha == standing.limit.alpha * standing.fraction
    effects = [s.effect for s in finalists]
    assert effects == sorted(effects, reverse=True)


def test_those_of_the_last_round_are_at_the_limit_on_more_texts(small, scorer, monkeypatch):
    """A first calibration on one text of three; the last round's candidates keep to the limit on all of them."""
    monkeypatch.setattr(schedule, "TEXTS", 1)
    found = search(scorer, arms_of(small, ks=(1, 2, 4, 8, 16)), group=by_operation, max_kl=0.02)
    assert (found.schedule.texts, found.schedule.final_texts) == (1, len(NEUTRAL))
    last = [s for s in found.standings if len(s.items) == len(scorer.task)]
    assert last and len(last) < len(found.standings)
    for standing in last:
        whole = Candidate(standing.candidate.arm, standing.limit.alpha)
        assert standing.limit.kl == pytest.approx(naive_kl(small, whole)[0], abs=2e-6, rel=1e-3)
        assert standing.limit.kl <= 0.02 and (standing.limit.reached or standing.limit.alpha == STRONGEST)
        assert standing.candidate.alpha == standing.limit.alpha * standing.fraction
        change = scorer.changes([standing.candidate], standing.items)[0]
        torch.testing.assert_close(standing.change, change, atol=0, rtol=0)
    rough = [standing for standing in found.standings if standing not in last]
    texts = {s.limit.kl == scorer.side_effects([Candidate(s.candidate.arm, s.limit.alpha)], 1)[0][0] for s in rough}
    assert texts == {True}, "those that fell out before were brought to it on the first text alone"


def test_an_interrupted_search_goes_on_and_finds_the_same(small, tmp_path, monkeypatch):
    arms = arms_of(small, ks=(1, 2, 4, 8))
    plain = search(Scorer(small.model, small.tokenizer, words(), NEUTRAL), arms, group=by_operation, max_kl=0.05)
    calls, original = [], scoring.option_scores

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(scoring, "option_scores", interrupted)

    def attempt():
        record = Record(tmp_path / "search.jsonl", {"of": "words"})
        return search(
            Scorer(small.model, small.tokenizer, words(), NEUTRAL, record), arms, group=by_operation, max_kl=0.05
        )

    with pytest.raises(KeyboardInterrupt):
        attempt()
    assert not austeer.is_steered(small.model)
    before = (tmp_path / "search.jsonl").read_bytes()
    resumed = attempt()
    assert (tmp_path / "search.jsonl").read_bytes().startswith(before)
    assert [(s.candidate.key, s.items) for s in resumed.standings] == [
        (s.candidate.key, s.items) for s in plain.standings
    ]
    for mine, theirs in zip(resumed.standings, plain.standings):
        torch.testing.assert_close(mine.change, theirs.change, atol=2e-5, rtol=1e-4)
    with pytest.raises(FileFormatError, match=r"search.jsonl.*another search"):
        Record(tmp_path / "search.jsonl", {"of": "other words"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_kl": 0.0}, r"max_kl.*0\.0"),
        ({"max_kl": math.nan}, "max_kl.*nan"),
        ({"max_kl": 0.05, "budget": Budget(1e-3)}, "budget.* 0 s"),
    ],
)
def test_bad_input(small, scorer, options, message):
    before = {name: p.clone() for name, p in small.model.named_parameters()}
    with pytest.raises(TaskError, match=message):
        search(scorer, arms_of(small), group=by_operation, **options)
    assert all(torch.equal(p, before[name]) for name, p in small.model.named_parameters())


def test_no_arm_or_no_strength_within_the_limit(small, scorer, monkeypatch):
    with pytest.raises(TaskError, match="no arm"):
        search(scorer, [], group=by_operation, max_kl=0.1)
    monkeypatch.setattr(scorer, "side_effects", lambda candidates, texts=None: [(9.0, 9.0)] * len(candidates))
    with pytest.raises(TaskError, match=r"4 arms.*0\.05"):
        search(scorer, arms_of(small), group=by_operation, max_kl=0.05)


def test_arms_tell_themselves_apart_by_what_they_steer(small):
    plan = small.momentum.select("attention", k=8)
    assert Arm("other name", plan, 8, "detail").digest == Arm("m", plan, 8).digest
    assert Arm("m", plan, 8).digest != Arm("m", plan.take(torch.arange(8).flip(0)), 8).digest
    assert Arm("m", plan, 4).digest == Arm("m", plan.top(4), 4).digest != Arm("m", plan, 5).digest
    assert Arm("m", plan, 4).digest != Arm("m", plan.with_operation("push"), 4).digest
