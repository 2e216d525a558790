"""Real requests to a real server, whose model the dense formula steers, rightly and with each fault."""

import copy

import pytest

import austeer
from austeer.verifying import VerifyError
from completions import Completions
from dense_formula import random_plan
from hypotheses import ALPHA, faults

FAULTS = faults()


def asked(plan, case):
    """The steered requests, and no other, are so."""
    return lambda body: case(plan) if body["model"] == "kind" else None


@pytest.mark.parametrize("verdict", FAULTS)
def test_each_fault_is_told_by_its_name(one_lively, demo, plan, verdict):
    with Completions(one_lively, demo[1], asked(plan, FAULTS[verdict])) as server:
        found = austeer.verify(plan, url=server.url, lora="kind")
    assert found.verdict == verdict and found.applied == (verdict == "applied"), str(found)
    assert found.unsteered < 1e-3 < found.effect / 100
    nearest = min(found.differences, key=found.differences.get)
    assert nearest in verdict and found.differences[nearest] < 1e-3
    assert sum(value > 0.01 for value in found.differences.values()) == len(found.differences) - 1
    assert (found.agreeing == plan.replay.tokens) == found.applied


@pytest.mark.parametrize("form", ["content", "texts"])
@pytest.mark.parametrize("verdict", ["applied", "half strength"])
def test_servers_that_tell_tokens_in_other_ways(one_lively, demo, plan, form, verdict):
    with Completions(one_lively, demo[1], asked(plan, FAULTS[verdict]), form) as server:
        found = austeer.verify(plan, url=server.url, lora="kind")
    assert found.verdict == verdict, str(found)
    prompts = {type(body["prompt"]) for body in server.bodies[1:]}
    assert prompts == ({str} if form == "texts" else {list})


def test_a_strength_that_is_none_of_the_recorded_ones(one_lively, demo, plan):
    with Completions(one_lively, demo[1], asked(plan, lambda plan: (plan, 1.3 * ALPHA, "all"))) as server:
        found = austeer.verify(plan, url=server.url, lora="kind")
    assert found.verdict == "something else" and "'applied'" in found.reason


def test_another_plan_is_something_else(one_lively, demo, plan):
    other = random_plan(one_lively, "attention", 20, "shift", seed=9)
    with Completions(one_lively, demo[1], asked(other, FAULTS["applied"])) as server:
        assert austeer.verify(plan, url=server.url, lora="kind").verdict == "something else"


def test_a_plan_that_is_on_every_request(one_lively, demo, plan):
    case = FAULTS["applied"]
    with Completions(one_lively, demo[1], lambda body: case(plan)) as server:
        found = austeer.verify(plan, url=server.url, lora="kind")
        assert (found.verdict, found.applied) == ("applied to every request", False)
        assert found.unsteered > 0.1
        every = austeer.verify(plan, url=server.url)  # as from a folded checkpoint
    assert every.applied and every.unsteered is None and "no such request" in str(every)


@pytest.mark.parametrize(("verdict", "shown"), [("applied", "stale prompt cache"), ("sign flipped", "sign flipped")])
def test_a_server_that_keeps_prompts_of_other_requests(one_lively, demo, plan, verdict, shown):
    """Its steered requests go on from a prompt that was read unsteered, unless they ask for none."""

    def steered(body):
        if body["model"] == "base":
            return None
        plan_, alpha, scope = faults()[verdict](plan)
        return plan_, alpha, scope if body.get("cache_prompt") is False and body["cache_salt"] else (4, None)

    with Completions(one_lively, demo[1], steered) as server:
        found = austeer.verify(plan, url=server.url, lora="kind")
        assert (found.verdict, found.applied) == (shown, False), str(found)
        salts = [body["cache_salt"] for body in server.bodies if "cache_salt" in body]
    assert len(set(salts)) == 2 and not found.applied


def test_another_model_cannot_be_told(one_lively, tiny_of, demo, plan):
    other = tiny_of("qwen2")
    with Completions(other, demo[1], lambda body: None) as server:
        found = austeer.verify(plan, url=server.url, lora="kind")
    assert found.verdict == "cannot tell" and "another model" in found.reason


def test_coarse_weights_widen_what_is_allowed(one_lively, demo, plan):
    """A server in bfloat16 is not taken for one with a fault, nor the fault for rounding."""
    coarse = copy.deepcopy(one_lively).bfloat16()
    for verdict in ("applied", "sign flipped", "applied elsewhere (layers + 1)", "not applied"):
        with Completions(coarse, demo[1], asked(plan, FAULTS[verdict])) as server:
            found = austeer.verify(plan, url=server.url, lora="kind")
        assert found.unsteered > 1e-3
        assert found.verdict == verdict, str(found)


def test_what_is_asked(one_lively, demo, plan):
    with Completions(one_lively, demo[1], lambda body: None) as server:
        austeer.verify(plan, url=server.url + "/", steering_set="kind", body={"seed": 1})
        plain, steered = server.bodies[0], server.bodies[-1]
        assert plain["model"] == steered["model"] == "base", "an adapter is listed first"
        assert steered["vllm_xargs"] == {"austeer": "kind", "austeer_alpha": ALPHA} and steered["seed"] == 1
        assert "vllm_xargs" not in plain and plain["temperature"] == 0
        assert [b["prompt"] for b in server.bodies] == 4 * [list(p.ids) for p in plan.replay.prompts]
        austeer.verify(plan, url=server.url, base="kind", body={"vllm_xargs": {"austeer": "mine"}})
        assert server.bodies[-1]["vllm_xargs"] == {"austeer": "mine"} and server.bodies[-1]["model"] == "kind"


def test_the_report_of_a_server(one_lively, demo, plan):
    with Completions(one_lively, demo[1], asked(plan, FAULTS["sign flipped"])) as server:
        text = str(austeer.verify(plan, url=server.url, lora="kind"))
    assert text.startswith("austeer verify: sign flipped\n")
    assert f"tiny/1 (tiny-0) at {server.url}" in " ".join(text.split()) and "model kind" in text
    assert plan.digest[:16] in text and "alpha 2" in text and "20 AUs at attention, layers 0-2" in text
    assert max(map(len, text.splitlines())) <= 80
    rows = [line.split() for line in text.partition("nats\n")[2].splitlines()]
    assert rows[0][:2] == ["sign", "flipped"] and [float(row[-1]) for row in rows] == sorted(float(r[-1]) for r in rows)


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_server_that_is_not_there(plan):
    with pytest.raises(VerifyError, match=r"127.0.0.1:9/v1.*cannot be reached"):
        austeer.verify(plan, url="http://127.0.0.1:9/v1")
    with pytest.raises(VerifyError, match=r"url: .*'localhost:8000'.*http://"):
        austeer.verify(plan, url="localhost:8000")


def test_what_a_server_says_is_shown(one_lively, demo, plan):
    with Completions(one_lively, demo[1], lambda body: None) as server:
        with pytest.raises(VerifyError, match=r"completions: .*HTTP 404.*`brief` does not exist"):
            austeer.verify(plan, url=server.url, lora="brief")
        with pytest.raises(VerifyError, match=r"models: .*HTTP 404.*Not Found"):
            austeer.verify(plan, url=server.url.removesuffix("/v1") + "/api")


def test_a_server_without_log_probabilities(one_lively, demo, plan):
    refused = pytest.raises(VerifyError, match=r"no log-probabilities.*logprobs")
    with Completions(one_lively, demo[1], lambda body: None, "none") as server, refused:
        austeer.verify(plan, url=server.url, lora="kind")


def test_another_tokenizer(one_lively, demo, plan):
    """One that begins texts with a token of its own."""

    def framed(text):
        return {"input_ids": [1, *demo[1](text)["input_ids"]]}

    framed.decode = demo[1].decode
    with Completions(one_lively, framed, lambda body: None, "texts") as server:
        count = len(plan.replay.prompts[0].ids)
        with pytest.raises(VerifyError, match=rf"{count + 1} tokens.*expected {count};.*tokenizer"):
            austeer.verify(plan, url=server.url, lora="kind")


def test_what_does_not_go_together(one_lively, plan):
    with pytest.raises(VerifyError, match="neither of model and url"):
        austeer.verify(plan)
    with pytest.raises(VerifyError, match="both of model and url"):
        austeer.verify(plan, one_lively, url="http://127.0.0.1:9/v1")
    with pytest.raises(VerifyError, match=r"lora.*beside a model"):
        austeer.verify(plan, one_lively, lora="kind")
    with pytest.raises(VerifyError, match=r"adapter.*beside url"):
        austeer.verify(plan, url="http://127.0.0.1:9/v1", adapter="adapters/kind")
