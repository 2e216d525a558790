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
    "change, message",
    [
        ({"operation": "add"}, "operation: found 'add', expected one of scale, push, shift"),
        ({"site": ()}, "needs at least one AU; found none"),
        ({"site": ("ffn", "ffn")}, r"layer: found torch.int32 \[3\], expected torch.int32 \[2\]"),
        ({"layer": PLAN.layer.long()}, r"layer: found torch.int64 \[3\], expected torch.int32 \[3\]"),
        ({"layer": [3, 0, 0]}, r"layer: found list, expected torch.int32 \[3\]"),
        ({"beta": PLAN.beta.double()}, "beta: found torch.float64"),
        ({"beta": torch.tensor([0.1, float("nan"), 0])}, "beta: found NaN or infinity"),
        ({"delta": torch.tensor([0.1, float("inf"), 0])}, "delta: found NaN or infinity"),
        ({"delta": PLAN.delta[:, None]}, r"delta: found torch.float32 \[3, 1\]"),
        ({"beta": torch.tensor([0.1, -1.5, 0])}, "beta: found 1.5, expected -1 to 1"),
        ({"site": ("ffn", "layer", "ffn")}, r"site 'layer' has no width in the plan's model; found \['attention', 'ff"),
        ({"layer": torch.tensor([4, 0, 0]).int()}, "layer: found 0 to 4 at site 'ffn', expected 0 to 3"),
        ({"layer": torch.tensor([0, -1, 0]).int()}, "layer: found -1 to -1 at site 'attention', expected 0 to 3"),
        ({"index": torch.tensor([0, 6, 0]).int()}, "index: found 6 to 6 at site 'attention', expected 0 to 5"),
        ({"layer": torch.zeros(3).int(), "index": torch.zeros(3).int()}, "found the same AU twice"),
        ({"operation": ["scale"]}, r"operation: found \['scale'\], expected one of scale, push, shift"),
        ({"ties": "random"}, "ties: found 'random', expected one of effect, public"),
        ({"site": ["ffn", "ffn", "ffn"]}, "site: found list, expected tuple"),
        ({"site": ("ffn", 5, "ffn")}, "found 17 pairs and sites"),
        ({"model": None}, "model: found NoneType, expected Fingerprint"),
        ({"pairs": True}, "pairs: found bool, expected int"),
        ({"pairs": 1.5}, "pairs: found float, expected int"),
        ({"pairs": -1}, "found -1 pairs"),
        ({"chat_template": 1}, "chat_template: found int, expected bool"),
        ({"evidence": {}}, "evidence: found dict, expected Evidence"),
    ],
)
def test_what_is_no_plan(change, message):
    with pytest.raises(PlanError, match=message):
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
    with pytest.raises(PlanError, match=r"expected an integer from 1 to 3 \(the plan's AUs\)"):
        PLAN.top(k)


def test_operation_changes_nothing_else():
    pushed = PLAN.with_operation("push")
    assert list(pushed) == list(PLAN) and pushed.operation == "push" and PLAN.operation == "scale"
    with pytest.raises(PlanError, match="operation: found 'add'"):
        PLAN.with_operation("add")


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
    "other, message",
    [
        (plan_of([("ffn", 1, 1)], "push"), "operation: found 'push' and 'scale', expected the same in both"),
        (plan_of([("ffn", 1, 1)], chat_template=True), "chat_template: found True and False"),
        (plan_of([("ffn", 1, 1)], model=replace(MODEL, layers=5)), "plans of one model add up"),
        (plan_of([("ffn", 1, 1)], model=replace(MODEL, model_type="qwen2")), "plans of one model add up"),
        (plan_of([("ffn", 1, 1)], model=replace(MODEL, widths={"ffn": 8})), "plans of one model add up"),
        (plan_of([("ffn", 3, 8)]), "found the same AU twice"),
    ],
)
def test_plans_that_do_not_add_up(other, message):
    with pytest.raises(PlanError, match=message):
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
    with pytest.raises(PlanError, match=r"evidence: found an alpha for sites \['attention', 'layer'\], expected"):
        PLAN.with_evidence(by_site)
    fitting = Evidence("effect", tested=(Outcome({"attention": 8, "ffn": 1}, "text", 1.0),))
    assert PLAN.with_evidence(fitting).evidence.sites() == {"attention", "ffn"}
