"""A replay: what is checked of it, and which plans keep it."""

import json
from dataclasses import replace

import pytest

from austeer import PlanError
from austeer.plans.replay import LARGEST_REPLAY, Prompt, Replay, read_replay
from small_plans import PLAN, REPLAY

ANSWER = (((8, -0.25), (9, -1.5)),)


def answers(**changes):
    return {**REPLAY.answers, **{name.replace("_", " "): rows for name, rows in changes.items()}}


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"digest": ""}, "digest: .*''"),
        ({"dtype": 32}, "dtype: .*int"),
        ({"k": 0}, "k: .*0"),
        ({"k": 2.0}, "k: .*2.0"),
        ({"layers": {}}, "layers: .*dict"),
        ({"layers": {"ffn": (-1,)}}, "layers: .*-1"),
        ({"layers": {"ffn": ()}}, r"layers: .*\(\)"),
        ({"alpha": float("nan")}, "alpha: .*nan"),
        ({"alpha": True}, "alpha: .*bool"),
        ({"alpha": {}}, "alpha: .*dict"),
        ({"alpha": {"ffn": "8"}}, "alpha: .*str"),
        ({"scope": (1, 2, 3)}, r"scope: .*\(1, 2, 3\)"),
        ({"scope": (-1, None)}, "scope: .*-1"),
        ({"scope": None}, "scope: .*None"),
        ({"prompts": ()}, "0 prompts"),
        ({"prompts": REPLAY.prompts * 2}, "answers .*'not applied'"),
        ({"answers": {"applied": (ANSWER,)}}, r"\['applied'\].*'not applied'"),
        ({"answers": answers(applied=(ANSWER, ANSWER))}, "'applied'"),
        ({"answers": answers(sign_flipped=((),))}, "'sign flipped'"),
        ({"answers": answers(sign_flipped=((((8, 0.5),),),))}, "'sign flipped'"),
        ({"answers": answers(sign_flipped=((((8, float("nan")),),),))}, "'sign flipped'"),
        ({"answers": answers(sign_flipped=((((8, -1),),),))}, "'sign flipped'"),
        ({"answers": answers(sign_flipped=((((-8, -1.0),),),))}, "'sign flipped'"),
        ({"answers": answers(sign_flipped=((((8, -1.0), (8, -2.0)),),))}, "'sign flipped'"),
        ({"answers": answers(**{f"fault{i}": (ANSWER,) for i in range(20)})}, "at most 14 more"),
        ({"texts": {}}, "texts: .*dict"),
        ({"texts": {3: 4}}, "no text"),
        ({"texts": {3: "x" * LARGEST_REPLAY}}, rf"\d+ bytes.*{LARGEST_REPLAY}"),
    ],
)
def test_what_is_no_replay(changes, found):
    with pytest.raises(PlanError, match=f"replay: .*{found}|{found}"):
        replace(REPLAY, **changes)


@pytest.mark.parametrize(
    ("text", "ids"), [("", (1,)), ("x" * 1001, (1,)), (7, (1,)), ("a", ()), ("a", (1, -2)), ("a", [1])]
)
def test_what_is_no_prompt(text, ids):
    with pytest.raises(PlanError, match="replay: "):
        Prompt(text, ids)


def test_json_gives_it_back():
    for replay in (REPLAY, replace(REPLAY, alpha={"ffn": 1, "attention": 0.5}, scope=(2, None))):
        text = json.dumps(replay.to_json())
        assert Replay.from_json(json.loads(text)) == replay == read_replay(text, "a file")
    assert REPLAY.tokens == 2


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"digest": "a", "digest": "b"}', "[" * 9999, "NaN"])
def test_a_damaged_file_is_named(text):
    with pytest.raises(PlanError, match=r"austeer_replay.json: damaged.*export it anew"):
        read_replay(text, "austeer_replay.json")


def test_a_cut_file_is_none():
    text = json.dumps(REPLAY.to_json())
    for end in range(0, len(text), 7):
        with pytest.raises(PlanError, match="here: damaged"):
            read_replay(text[:end], "here")


def test_a_plan_keeps_it_as_long_as_it_is_that_plan():
    plan = PLAN.with_replay(REPLAY)
    assert plan.replay == plan.top(3).replay == plan.with_operation("scale").replay == REPLAY
    assert plan.with_evidence(None).replay == REPLAY
    other = replace(PLAN, index=PLAN.index * 0 + 1)
    assert plan.top(2).replay is None and plan.with_operation("push").replay is None
    assert (plan.top(1) + other.take(PLAN.layer.argsort()[:1])).replay is None
    assert plan.with_replay(None) == PLAN
    with pytest.raises(PlanError, match=r"replay: .*dict"):
        PLAN.with_replay(REPLAY.to_json())
