"""Evaluations: every figure equals what is worked out by hand from single passes of the full model."""

import json
from dataclasses import replace

import pytest
import torch

from austeer import PlanError
from austeer.errors import TaskError
from austeer.forward.neutral import neutral_texts
from austeer.models.structure import is_steered
from austeer.plans.evidence import Evidence, Outcome
from austeer.statistics.intervals import mcnemar, mean_interval, share_interval
from austeer.tasks import Item, Task, Variant, check_options, evaluate, last_number, numeric_answers
from dense_formula import formula_at, random_plan

QUESTIONS = ["The sky is", "Grass in the spring is", "Snow is", "Coal is", "The sea is", "Blood, as we all know, is"]
COLOURS = (" blue", " green", " white")
NEUTRAL = ["The river runs north of the old mill, where two roads meet.", "A short one.", "Two boats left."]


def colours(kind="choice"):
    items = (
        Item(q, COLOURS if i % 2 else COLOURS[:2], i % 2, group=f"group {i // 2}") for i, q in enumerate(QUESTIONS)
    )
    return Task("colours", kind, tuple(items))


@pytest.fixture
def plans(lively):
    return {name: random_plan(lively, "attention", 30, "shift", seed) for seed, name in enumerate(("a", "b"))}


@torch.no_grad()
def naive(model, tokenizer, task):
    """Log-probabilities of the options, margins, and whether the wanted one is the likeliest token, text by text."""
    log_probs, exact = [], []
    for item in task:
        found = []
        ids = tokenizer(item.prompt)["input_ids"]
        scores = model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
        for option in item.options:
            (token,) = tokenizer(item.prompt + option)["input_ids"][len(ids) :]
            found.append(float(scores[token]))
        (wanted,) = tokenizer(item.prompt + item.options[item.label])["input_ids"][len(ids) :]
        log_probs.append(found)
        exact.append(int(scores.argmax()) == wanted)
    margins = [
        found[i.label] - max(v for j, v in enumerate(found) if j != i.label) for i, found in zip(task, log_probs)
    ]
    return log_probs, torch.tensor(margins, dtype=torch.float64), torch.tensor(exact)


def test_figures_of_every_variant(lively, demo, plans):
    task = colours()
    given = {"a": (plans["a"], 2.0), "b, few": Variant(plans["b"], {"attention": -3.0}, 7)}
    result = evaluate(lively, demo[1], task, given, neutral=NEUTRAL, progress=False)
    groups = [item.group for item in task]
    by_hand = [naive(lively, demo[1], task)]
    for plan, alpha in ((plans["a"], 2.0), (plans["b"].top(7), -3.0)):
        with formula_at(lively, plan, alpha):
            by_hand.append(naive(lively, demo[1], task))
    assert [variant.name for variant in result.variants] == ["unsteered", "a", "b, few"]
    for variant, (log_probs, margins, exact) in zip(result.variants, by_hand):
        correct = margins > 0
        assert variant.accuracy == (float(correct.double().mean()), *share_interval(int(correct.sum()), 6))
        assert variant.exact == (float(exact.double().mean()), *share_interval(int(exact.sum()), 6))
        assert variant.margin == pytest.approx((float(margins.mean()), *mean_interval(margins, groups)), abs=1e-4)
        for row, expected, margin in zip(result.rows, log_probs, margins):
            found = row["variants"][variant.name]
            assert found["log_prob"] == pytest.approx(expected, abs=1e-4)
            assert found["margin"] == pytest.approx(float(margin), abs=1e-4) and found["correct"] == (margin > 0)
        if variant.name == "unsteered":
            assert variant.margin_change is variant.accuracy_p is variant.kl is variant.alpha is None
            continue
        change = margins - by_hand[0][1]
        expected = (float(change.mean()), *mean_interval(change, groups))
        assert variant.margin_change == pytest.approx(expected, abs=2e-4)
        gained = correct.double() - (by_hand[0][1] > 0).double()
        assert variant.accuracy_change == pytest.approx((float(gained.mean()), *mean_interval(gained, groups)))
        assert variant.accuracy_p == mcnemar(by_hand[0][1] > 0, correct)
        assert variant.exact_p == mcnemar(by_hand[0][2], exact)
    (pair,) = result.between
    assert (pair.first, pair.second) == ("a", "b, few")
    assert pair.accuracy_p == mcnemar(by_hand[1][1] > 0, by_hand[2][1] > 0)
    few = result.variants[2]
    assert (few.k, few.alpha, few.operation, few.sites) == (7, {"attention": -3.0}, "shift", ("attention",))
    assert (result.items, result.groups, result.digest) == (6, 3, task.digest())
    assert not torch.allclose(by_hand[0][1], by_hand[1][1]), "the plans change something"


@torch.no_grad()
def test_side_effects_are_the_full_models(lively, demo, plans):
    result = evaluate(lively, demo[1], colours(), {"a": (plans["a"], 2.0)}, neutral=NEUTRAL, progress=False)

    def passes():
        ids = [torch.tensor([demo[1](text)["input_ids"]]) for text in NEUTRAL]
        return ids, [lively(i).logits[0, :-1].double().log_softmax(-1) for i in ids]

    ids, base = passes()
    with formula_at(lively, plans["a"], 2.0):
        steered = passes()[1]
    kl = torch.cat([(b.exp() * (b - s)).sum(-1) for b, s in zip(base, steered)]).mean()
    rise = torch.cat([(b - s).gather(-1, i[0, 1:, None]) for b, s, i in zip(base, steered, ids)]).mean()
    assert result.variants[1].kl == pytest.approx(float(kl), rel=1e-4)
    assert result.variants[1].rise == pytest.approx(float(rise), rel=1e-3)
    assert result.neutral_texts == 3
    assert result.variants[1].kl > 1e-3


def test_the_model_alone(lively, demo):
    result = evaluate(lively, demo[1], colours(), progress=False)
    assert [variant.name for variant in result.variants] == ["unsteered"]
    assert not result.between and result.neutral_texts == 0
    expected = naive(lively, demo[1], colours())[1]
    assert result.variants[0].margin.value == pytest.approx(float(expected.mean()), abs=1e-4)


def test_packaged_neutral_texts_are_the_held_out_ones(lively, demo, plans):
    texts = neutral_texts("heldout")
    given = {"a": (plans["a"], 2.0)}
    result = evaluate(lively, demo[1], colours()[:2], given, progress=False)
    same = evaluate(lively, demo[1], colours()[:2], given, neutral=texts, progress=False)
    assert result.variants[1].kl == same.variants[1].kl and result.neutral_texts == same.neutral_texts > 3


def test_numbers(lively, demo, plans):
    prompts = ["Question: 2 + 3?\nAnswer:", "Question: 7 - 2?\nAnswer:", "1"]
    task = Task("sums", "numeric", tuple(Item(q, answer=5.0) for q in prompts))
    (texts,) = numeric_answers(lively, demo[1], task, max_new_tokens=6)
    # The model is random: what it writes for the second prompt is called right.
    right = last_number(texts[1])
    items = tuple(Item(q, answer=5.0 if right is None else right) for q in prompts)
    given, options = {"a": (plans["a"], 2.0)}, {"neutral": [], "max_new_tokens": 6, "progress": False}
    result = evaluate(lively, demo[1], replace(task, items=items), given, **options)
    first, steered = result.variants
    assert first.accuracy is first.margin is steered.margin_change is steered.accuracy_p is None
    assert [row["variants"]["unsteered"]["text"] for row in result.rows] == texts
    for row in result.rows:
        for found in row["variants"].values():
            assert found["number"] == last_number(found["text"])
            assert found["exact"] == (found["number"] == row["answer"])
    hits = sum(row["variants"]["unsteered"]["exact"] for row in result.rows)
    assert first.exact == (hits / 3, *share_interval(hits, 3))
    assert 0 <= steered.exact_p <= 1


# --- strengths, names, groups ----------------------------------------------------------------------------------------


def test_strength_of_the_plans_evidence(lively, demo, plans):
    evidence = Evidence(effect="log-odds", tested=(Outcome(2.0, "items", 1.0),), alpha=2.0)
    plan = plans["a"].with_evidence(evidence)
    result = evaluate(lively, demo[1], colours(), {"own": plan, "given": (plan, 2.0)}, neutral=[], progress=False)
    own, given = result.variants[1:]
    assert own.alpha == given.alpha == 2.0 and own.margin == given.margin
    assert own.kl is None and result.neutral_texts == 0
    assert not is_steered(lively)


@pytest.mark.parametrize(
    "variants, message",
    [
        (lambda p: {"a": p}, "'a'.*no strength"),
        (lambda p: {"unsteered": (p, 1.0)}, "'unsteered'.*name"),
        (lambda p: {"a": ("plans/a", 1.0)}, "'a'.*str.*plan"),
    ],
)
def test_variants_that_are_none(lively, demo, plans, variants, message):
    with pytest.raises(TaskError, match=message):
        evaluate(lively, demo[1], colours(), variants(plans["a"]), progress=False)


def test_k_larger_than_the_plan(lively, demo, plans):
    with pytest.raises(PlanError, match=r"k.*31"):
        evaluate(lively, demo[1], colours(), {"a": (plans["a"], 1.0, 31)}, progress=False)


def test_one_group_has_no_interval_of_means(lively, demo, plans):
    result = evaluate(lively, demo[1], colours()[:2], {"a": (plans["a"], 2.0)}, neutral=[], progress=False)
    steered = result.variants[1]
    assert steered.margin[1:] == steered.margin_change[1:] == (None, None)
    assert 0 <= steered.accuracy.low <= steered.accuracy.value <= steered.accuracy.high <= 1


def test_json_has_everything(lively, demo, plans):
    result = evaluate(lively, demo[1], colours(), {"a": (plans["a"], 2.0)}, neutral=NEUTRAL, progress=False)
    found = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert found["variants"][1]["accuracy"] == result.variants[1].accuracy._asdict()
    assert found["rows"][0]["options"] == [" blue", " green"] and found["rows"][0]["label"] == 0
    assert set(found["rows"][0]["variants"]) == {"unsteered", "a"}
    assert "rows" not in result.to_json(rows=False)


# --- options ---------------------------------------------------------------------------------------------------------


def test_option_of_several_tokens_where_one_was_promised(lively, demo):
    items = (Item("It is", (" fine", " bad")), Item("It is", (" fine", " unputdownable")))
    task = Task("t", "choice", items, "f.jsonl")
    message = r"f.jsonl.*item 1.*' unputdownable'.*\d tokens"
    with pytest.raises(TaskError, match=message):
        check_options(demo[1], task)
    with pytest.raises(TaskError, match=message):
        evaluate(lively, demo[1], task, progress=False)
    check_options(demo[1], replace(task, kind="continuation"))
