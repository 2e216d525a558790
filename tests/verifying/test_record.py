"""What a replay says is what the dense formula makes the model write, under each hypothesis."""

from dataclasses import replace

import pytest
import torch

import austeer
from austeer.plans.replay import APPLIED, NOT_APPLIED
from dense_formula import assert_unchanged, formula_at, inside, keep_layers, logits, random_plan, snapshot
from hypotheses import moved


def rewritten(model, prompts, case):
    """Tokens with log p of the likeliest, by running each text anew for each token under the formula."""
    answers = []
    for prompt in prompts:
        row, steps = list(prompt.ids), []
        for _ in range(6):
            ids = torch.tensor([row])
            if case is None:
                found = logits(model, {"input_ids": ids})
            else:
                plan, alpha, scope = case
                with formula_at(model, plan, alpha, inside(scope, torch.ones_like(ids), len(prompt.ids))):
                    found = logits(model, {"input_ids": ids})
            best = found[0, -1].double().log_softmax(-1).topk(4)
            steps.append(dict(zip(best.indices.tolist(), best.values.tolist())))
            row.append(best.indices[0].item())
        answers.append(steps)
    return answers


@pytest.mark.parametrize("operation", ["scale", "push", "shift"])
def test_each_hypothesis_is_what_the_formula_writes(one_lively, demo, operation):
    plan, alpha = random_plan(one_lively, "ffn", 15, operation), 1.5
    cases = {
        "not applied": None,
        "applied": (plan, alpha, "all"),
        "layers + 1": (moved(plan, 1), alpha, "all"),
        "layers - 1": (moved(plan, -1), alpha, "all"),
        "sign flipped": (plan, -alpha, "all"),
        "half strength": (plan, alpha / 2, "all"),
        "double strength": (plan, alpha * 2, "all"),
        "prompt only": (plan, alpha, "prompt"),
        "generation only": (plan, alpha, "generation"),
    }
    texts = ["The weekend trip was", "My first impression of the new library:"]
    before = snapshot(one_lively)
    replay = austeer.record_replay(one_lively, demo[1], plan, alpha, prompts=texts, progress=False).replay
    assert_unchanged(one_lively, before)
    assert list(replay.answers) == list(cases)
    for name, case in cases.items():
        for answer, expected in zip(replay.answers[name], rewritten(one_lively, replay.prompts, case), strict=True):
            for step, likely in zip(answer, expected, strict=True):
                assert [token for token, _ in step] == list(likely), name
                assert dict(step) == pytest.approx(likely, abs=2e-3), name
    assert len({str(rows) for rows in replay.answers.values()}) == len(cases)


def test_what_is_recorded_beside(one_lively, demo):
    plan = random_plan(one_lively, ("attention", "ffn"), 9, "shift")
    alpha = {"attention": 2, "ffn": -0.5}
    found = austeer.record_replay(one_lively, demo[1], plan, alpha, scope="generation", progress=False)
    replay = found.replay
    assert found == plan.with_replay(replay) and plan.replay is None
    assert (replay.digest, replay.operation, replay.k) == (plan.digest, "shift", 18)
    assert replay.alpha == {"attention": 2.0, "ffn": -0.5} and replay.scope == "generation"
    assert replay.layers == {
        site: tuple(sorted(set(plan.layer[plan.of(site)].tolist()))) for site in ("attention", "ffn")
    }
    assert replay.dtype == "float32" and len(replay.prompts) == 6
    assert {"all tokens", "prompt only"} < set(replay.answers) and "generation only" not in replay.answers
    for prompt in replay.prompts:
        assert list(prompt.ids) == demo[1](prompt.text)["input_ids"]
    assert all(demo[1].decode([token]) == text for token, text in replay.texts.items())
    firsts = [[answer[0] for answer in replay.answers[name]] for name in (APPLIED, NOT_APPLIED)]
    assert firsts[0] == firsts[1], "the first token is chosen before anything is steered"


def test_layers_that_are_not_there_are_left_out(one_lively, demo):
    plan = keep_layers(random_plan(one_lively, "layer", 60, "shift"), [2])
    replay = austeer.record_replay(one_lively, demo[1], plan, 1.0, prompts=["A soup"], progress=False).replay
    assert "layers - 1" in replay.answers and "layers + 1" not in replay.answers


def test_a_strength_is_the_recommended_one_by_default(one_lively, demo):
    from small_plans import EVIDENCE

    plan = random_plan(one_lively, "ffn", 5, "shift")
    options = {"prompts": ["A soup"], "progress": False}
    assert austeer.record_replay(one_lively, demo[1], plan, **options).replay.alpha == 1.0
    known = plan.with_evidence(EVIDENCE)
    assert austeer.record_replay(one_lively, demo[1], known, **options).replay.alpha == EVIDENCE.alpha == 4.0


def test_a_text_ends_where_the_model_ends_it(tiny, demo):
    """Its last step is there, and no padding after it."""
    plan = random_plan(tiny, "ffn", 5, "shift")
    first = austeer.record_replay(tiny, demo[1], plan, prompts=["A soup"], progress=False).replay
    tiny.generation_config.eos_token_id = first.answers[NOT_APPLIED][0][1][0][0]
    again = austeer.record_replay(tiny, demo[1], plan, prompts=["A soup"], progress=False).replay
    assert again.answers[NOT_APPLIED][0] == first.answers[NOT_APPLIED][0][:2]


def test_a_fault_that_breaks_the_model_is_left_out(tiny, demo):
    """Twice the strength overflows float16's range, and the strength itself does not."""
    half = tiny.half()
    plan = keep_layers(random_plan(half, "layer", 40, "shift"), [1])
    plan = replace(plan, delta=plan.delta * 0 + 40000.0)
    options = {"prompts": ["A soup"], "progress": False}
    replay = austeer.record_replay(half, demo[1], plan, 1.0, **options).replay
    assert replay.dtype == "float16" and "double strength" not in replay.answers
    with pytest.raises(austeer.PlanError, match=r"replay: .*applied, alpha 2.0.*smaller alpha"):
        austeer.record_replay(half, demo[1], plan, 2.0, **options)


def test_bad_input(one_lively, demo, tiny_of):
    plan = random_plan(one_lively, "ffn", 5, "shift")
    for alpha, found in (
        (0, "alpha: found 0"),
        ("2", "alpha: .*'2'"),
        ({"attention": 1}, r"\['attention'\].*\['ffn'\]"),
    ):
        with pytest.raises(austeer.SteeringError, match=found):
            austeer.record_replay(one_lively, demo[1], plan, alpha)
    with pytest.raises(austeer.SteeringError, match=r"scope: .*'prompts'"):
        austeer.record_replay(one_lively, demo[1], plan, scope="prompts")
    with pytest.raises(austeer.PlanError, match="plan: found str"):
        austeer.record_replay(one_lively, demo[1], "plans/kind")
    with pytest.raises(austeer.PlanError, match=r"made for .*llama"):
        austeer.record_replay(tiny_of("gpt2"), demo[1], plan)
    with pytest.raises(austeer.PlanError, match="prompt ''"):
        austeer.record_replay(one_lively, demo[1], plan, prompts=["A soup", ""])
    with pytest.raises(austeer.PairsError, match="vocabulary has 64"):
        austeer.record_replay(tiny_of("llama", vocab_size=64), demo[1], plan)
    with austeer.steer(one_lively, plan), pytest.raises(austeer.SteeringError, match="steered now"):
        austeer.record_replay(one_lively, demo[1], plan)
