"""Plans: what is a valid one, prefixes, sums, and the evidence that is of one plan only."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from austeer import AtomicUnit, PlanError
from austeer.plans.evidence import Evidence, Outcome
from small_plans import EVIDENCE, MODEL, PLAN, keys_of, plan_of

# --- validity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, found",
    [
        ({"operation": "add"}, "operation: .*'add'.*scale, push, shift"),
        ({"site": ()}, "one AU.*none"),
        ({"site": ("ffn", "ffn")}, r"layer: .*\[3\].*\[2\]"),
        ({"layer": PLAN.layer.long()}, "layer: .*int64.*int32"),
        ({"layer": [3, 0, 0]}, "layer: .*list.*int32"),
        ({"beta": torch.tensor([0.1, float("nan"), 0])}, "beta: .*NaN"),
        ({"beta": torch.tensor([0.1, -1.5, 0])}, "beta: .*1.5.*-1 to 1"),
        ({"site": ("ffn", "layer", "ffn")}, r"'layer'.*\['attention', 'ffn'\]"),
        ({"layer": torch.tensor([4, 0, 0]).int()}, "layer: .*0 to 4.*'ffn'.*0 to 3"),
        ({"layer": torch.tensor([0, -1, 0]).int()}, "layer: .*-1 to -1.*'attention'.*0 to 3"),
        ({"index": torch.tensor([0, 6, 0]).int()}, "index: .*6 to 6.*'attention'.*0 to 5"),
        ({"layer": torch.zeros(3).int(), "index": torch.zeros(3).int()}, "AU twice"),
        ({"site": ["ffn", "ffn", "ffn"]}, "site: .*list.*tuple"),
        ({"site": ("ffn", 5, "ffn")}, "17 pairs and sites"),
        ({"pairs": True}, "pairs: .*bool.*int"),
        ({"pairs": -1}, "-1 pairs"),
        ({"chat_template": 1}, "chat_template: .*int.*bool"),
        ({"evidence": {}}, "evidence: .*dict.*Evidence"),
    ],
)
def test_what_is_no_plan(change, found):
    with pytest.raises(PlanError, match=found):
        replace(PLAN, **change)


def test_rows_in_order():
    assert len(PLAN) == 3 and PLAN.keys() == [("ffn", 3, 8), ("attention", 0, 5), ("ffn", 0, 0)]
    assert list(PLAN)[1] == AtomicUnit("attention", 0, 5, float(PLAN.beta[1]), float(PLAN.delta[1]))
    assert PLAN.sites == ("attention", "ffn"), "in the order of SITE_NAMES"
    assert PLAN.of("ffn").tolist() == [0, 2] and PLAN.of("layer").tolist() == []


def test_equality_is_by_value():
    assert plan_of(PLAN.keys()) == PLAN
    for change in ({"operation": "push"}, {"pairs": 18}, {"ties": "public"}, {"chat_template": True}):
        assert replace(PLAN, **change) != PLAN
    assert replace(PLAN, beta=-PLAN.beta) != PLAN and PLAN != "plan"
    assert PLAN.take(torch.tensor([1, 0, 2])) != PLAN, "the order is part of a plan"


# --- parts and sums --------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(keys_of(), st.data())
def test_top_is_a_prefix(keys, data):
    plan = plan_of(keys)
    k = data.draw(st.integers(1, len(plan)))
    top = plan.top(k)
    assert list(top) == list(plan)[:k] and top.top(k) == top
    assert (top.operation, top.model, top.pairs) == (plan.operation, plan.model, plan.pairs)


@pytest.mark.parametrize("k", [0, -1, 4, True, 2.0, "2", None])
def test_k_out_of_range(k):
    with pytest.raises(PlanError, match=rf"k: .*{k!r}.*1 to 3"):
        PLAN.top(k)


@settings(max_examples=60, deadline=None)
@given(keys_of(("attention",)), keys_of(("ffn",)))
def test_sum_alternates_by_rank(first, second):
    a, b = plan_of(first, seed=1), plan_of(second, seed=2)
    both = list(a + b)
    assert [unit for unit in both if unit.site == "attention"] == list(a)
    assert [unit for unit in both if unit.site == "ffn"] == list(b)
    shared = min(len(a), len(b))
    assert both[: 2 * shared] == [unit for pair in zip(a, b) for unit in pair]
    assert sorted((b + a).keys()) == sorted((a + b).keys())


def test_sum_of_one_site_interleaves_too():
    a, b = plan_of([("ffn", 0, 0), ("ffn", 0, 1)]), plan_of([("ffn", 2, 0)])
    assert (a + b).keys() == [("ffn", 0, 0), ("ffn", 2, 0), ("ffn", 0, 1)]


def test_sum_knows_the_widths_of_both():
    parts = [plan_of([(site, 0, 0)], model=replace(MODEL, widths={site: MODEL.widths[site]})) for site in MODEL.widths]
    assert (parts[0] + parts[1]).model == MODEL
    assert (parts[0] + replace(parts[1], pairs=3)).pairs == 3


@pytest.mark.parametrize(
    "other, found",
    [
        (plan_of([("ffn", 1, 1)], "push"), "operation: .*'push' and 'scale'"),
        (plan_of([("ffn", 1, 1)], chat_template=True), "chat_template: .*True and False"),
        (plan_of([("ffn", 1, 1)], model=replace(MODEL, layers=5)), "model"),
        (plan_of([("ffn", 1, 1)], model=replace(MODEL, model_type="qwen2")), "model"),
        (plan_of([("ffn", 1, 1)], model=replace(MODEL, widths={"ffn": 8})), "model"),
        (plan_of([("ffn", 3, 8)]), "AU twice"),
    ],
)
def test_plans_that_do_not_add_up(other, found):
    with pytest.raises(PlanError, match=found):
        PLAN + other


# --- evidence --------------------------------------------------------------------------------------------------------


def test_evidence_is_of_this_very_plan():
    known = PLAN.with_evidence(EVIDENCE)
    assert known.evidence == EVIDENCE and known != PLAN and known.with_evidence(None) == PLAN
    assert known.top(3) == known == known.with_operation("scale") == known.take(torch.arange(3))
    for changed in (known.top(2), known.with_operation("push"), known.take(torch.tensor([0, 2, 1]))):
        assert changed.evidence is None
    other = plan_of([("ffn", 1, 1)]).with_evidence(EVIDENCE)
    assert (known + other).evidence is None
    assert (PLAN.top(1).with_evidence(EVIDENCE) + other).evidence is None, "in their order"


def test_evidence_for_other_sites_is_refused():
    by_site = Evidence("effect", tested=(Outcome({"attention": 8, "layer": 1}, "text", 1.0),))
    with pytest.raises(PlanError, match=r"evidence: .*alpha.*\['attention', 'layer'\]"):
        PLAN.with_evidence(by_site)
    fitting = Evidence("effect", tested=(Outcome({"attention": 8, "ffn": 1}, "text", 1.0),))
    assert PLAN.with_evidence(fitting).evidence.sites() == {"attention", "ffn"}
