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


def test_the_models_own_configuration_of_generate_does_not_count(tiny, demo):
    """What it forbids, forces or repeats is no log-probability's; and it is afterwards as it was."""
    plan = random_plan(tiny, "ffn", 5, "shift")
    first = austeer.record_replay(tiny, demo[1], plan, prompts=["A soup"], progress=False).replay
    likeliest = [step[0][0] for step in first.answers[NOT_APPLIED][0]]
    own = tiny.generation_config
    own.update(
        suppress_tokens=likeliest,
        num_return_sequences=2,
        num_beams=2,
        no_repeat_ngram_size=1,
        min_new_tokens=3,
        repetition_penalty=2.0,
        max_length=7,
        do_sample=True,
        temperature=9.0,
    )
    before = own.to_dict()
    assert austeer.record_replay(tiny, demo[1], plan, prompts=["A soup"], progress=False).replay == first
    assert tiny.generation_config is own and own.to_dict() == before


def test_of_tokens_that_are_alike_the_one_taken_comes_first(tiny, demo):
    """All of the vocabulary is equally likely, and four of it are kept."""
    with torch.no_grad():
        tiny.lm_head.weight.zero_()
    prompt = torch.tensor([demo[1]("A soup")["input_ids"]])
    taken = tiny.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, prompt.shape[1] :].tolist()
    plan = random_plan(tiny, "ffn", 5, "shift")
    replay = austeer.record_replay(tiny, demo[1], plan, prompts=["A soup"], progress=False).replay
    for (answer,) in replay.answers.values():
        assert [step[0][0] for step in answer] == taken and {len(step) for step in answer} == {4}


def test_a_fault_that_cannot_be_put_on_the_model_is_left_out(tiny, demo):
    """Twice the strength is no float32 number any more."""
    plan = random_plan(tiny, "layer", 5, "shift")
    plan = replace(plan, delta=plan.delta.sign())
    replay = austeer.record_replay(tiny, demo[1], plan, 2.0e38, prompts=["A soup"], progress=False).replay
    assert "double strength" not in replay.answers and "half strength" in replay.answers
    with pytest.raises(austeer.SteeringError, match="no float32 number"):
        austeer.record_replay(tiny, demo[1], replace(plan, delta=plan.delta * 2), 2.0e38, prompts=["A soup"])


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


class Unrun(torch.nn.Module):
    """A model that must not run."""

    def generate(self, **_):
        raise AssertionError("it ran")


def test_what_a_replay_cannot_keep_is_refused_before_the_model_runs(tiny, demo, monkeypatch):
    plan = random_plan(tiny, "ffn", 5, "shift")
    monkeypatch.setattr(tiny, "generate", Unrun().generate)
    for prompts, found in (
        ("A soup", "'A soup'.*list of texts"),
        (["A soup", 7], r"\['A soup', 7\].*list of texts"),
        (7, "7.*list of texts"),
        ([], "0, expected 1 to 16"),
        (["A soup"] * 17, "17, expected 1 to 16"),
    ):
        with pytest.raises(austeer.PlanError, match=f"prompts: found {found}"):
            austeer.record_replay(tiny, demo[1], plan, prompts=prompts, progress=False)
    with pytest.raises(austeer.SteeringError, match=r"scope: .*markers.*name or a range"):
        austeer.record_replay(tiny, demo[1], plan, scope=austeer.Answer(start=((5, 6),)), progress=False)


def test_a_replay_that_would_be_too_large_is_refused_after_the_first_run(lively, demo, monkeypatch):
    runs = []
    generate = lively.generate
    monkeypatch.setattr(lively, "generate", lambda **given: runs.append(1) or generate(**given))
    plan = random_plan(lively, "ffn", 5, "shift")
    texts = [f"The {number} soups were" for number in range(16)]
    with pytest.raises(austeer.PlanError, match=r"prompts: found 16, .*\d+ bytes or more.*50000; take \d+ or fewer"):
        austeer.record_replay(lively, demo[1], plan, prompts=texts, progress=False)
    assert len(runs) == 16
    assert len(austeer.record_replay(lively, demo[1], plan, prompts=texts[:6], progress=False).replay.prompts) == 6


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
