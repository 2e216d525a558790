"""Goals are met, missed or not told apart, by the intervals of a result."""

import pytest

import synthetic_results as synthetic
from bench import goals


def content(on_gpu=True, execution="eager", operation="scale", noise=0.6, **overheads):
    case = synthetic.case(execution, 1, 100, 30, noise, **overheads) | {"operation": operation}
    found = synthetic.inference() | {"cases": [case]}
    found["environment"] |= {"multiprocessors": 132} if on_gpu else {}
    for name in overheads:
        case["variants"][name.replace("_", " ")] |= {"ours": True}
    return found


def became(metric="token", **options):
    prompts = metric == "first_token"
    found = goals.judged(content(**options))
    return {way: what for words, _, way, _, what in found if words.startswith("GPU, prompt") == prompts}


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"auto": (0.5, 0.3), "dense_hook": (2.9, 0.3)}, goals.MET),
        ({"auto": (1.5, 0.3), "dense_hook": (2.9, 0.3)}, goals.MISSED),
        ({"auto": (1.2, 0.3), "dense_hook": (2.9, 0.3)}, goals.UNRESOLVED),
        ({"auto": (0.9, 0.1), "dense_hook": (0.2, 0.1)}, goals.MISSED),
        ({"auto": (0.5, 0.3), "dense_hook": (0.4, 0.3)}, goals.UNRESOLVED),
        ({"auto": (1.5, 0.3), "dense_hook": (2.9, 0.3), "operation": "push"}, goals.MET),
        ({"auto": (0.5, 0.3), "noise": 3.0}, goals.UNRESOLVED),
        ({"auto": (0.1, 0.5), "on_gpu": False}, goals.MET),
        ({"auto": (0.1, 1.5), "on_gpu": False}, goals.UNRESOLVED),
        ({"auto": (2.0, 0.5), "on_gpu": False}, goals.MISSED),
    ],
)
def test_what_becomes_of_a_goal(options, expected):
    assert became(**options) == {"auto": expected}


def test_nothing_is_below_a_dense_hook_that_was_not_measured():
    found = content(auto=(0.5, 0.3))
    del found["cases"][0]["variants"]["dense hook"]
    assert {row[4] for row in goals.judged(found) if "below" in row[0]} == {goals.UNRESOLVED}


def test_a_graph_s_goal_is_about_fused_too():
    assert became(execution="graph", auto=(-0.1, 0.3), fused=(1.0, 0.3)) == {"auto": goals.MET, "fused": goals.MISSED}


def test_prompts_have_a_goal_of_their_own():
    assert became("first_token", auto=(1.5, 0.3)) == {"auto": goals.MISSED}


def test_the_table_names_goal_setting_and_way():
    text = goals.table_of([content(auto=(0.5, 0.3))])
    assert "| GPU, prompt: at most +1 % | synthetic-135M, eager, site ffn, scale, k = 100 in 30 layers" in text
    assert "| auto | +0.5 [+0.2, +0.8] | met |" in text
    assert goals.table_of([content(operation="push", on_gpu=False, auto=(0.5, 0.3))]) == ""


@pytest.mark.parametrize("ratio, expected", [(1.01, goals.MET), (1.03, goals.MISSED), (1.021, goals.UNRESOLVED)])
def test_many_plans_have_a_goal(ratio, expected):
    def row(plans, ratio):
        return {"plans": plans, "ratio": {"median": ratio, "low": ratio - 0.005, "high": ratio + 0.005}}

    rows = {"unsteered": {}, "1": row(1, 1.5), "256": row(256, ratio)}
    content = {
        "kind": "plans",
        "environment": {"multiprocessors": 132},
        "models": [{"execution": "graph", "rows": rows}],
    }
    ((_, setting, _, _, became),) = goals.judged(content)
    assert setting == "graph, 256 plans" and became == expected
    assert not list(goals.judged(content | {"environment": {}}))
