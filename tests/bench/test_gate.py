"""The gate: every right way passes in every dtype, and what is a little wrong does not."""

import pytest
import torch

from bench import catalogue, plain_ways
from bench import gate as gates
from bench.gate import Exact, Gate, WeakGateError
from bench.lineup import prompts
from bench.plain_ways import Formula
from bench.plans import spread_plan
from bench.steered import Steered, UnavailableError, twin
from tiny_models import tiny_model

RIGHT = {way.name: way.make for way in (*plain_ways.WAYS[2:], *catalogue.OURS)}
#: GPT-2 has biases and transposed weights; the experts of a Mixtral are one tensor.
PLACES = [
    *(("llama", site) for site in ("attention", "ffn", "layer", "neuron")),
    *((family, "ffn") for family in ("gpt2", "mixtral")),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def gate_at(family="llama", site="ffn", dtype=torch.float32, k=40):
    """(gate, model, plan); two rows of eight tokens."""
    model = tiny_model(family).to(dtype)
    plan = spread_plan(model, site, k)
    return Gate(model, Exact(model), plan, prompts(model, 2, 8)(-2)), model, plan


@pytest.fixture(params=PLACES, ids="-".join)
def place(request):
    return gate_at(*request.param)


class PromptLeftOut(Formula):
    """Right logits, but a generation that steers only what it generates."""

    def generate(self, ids, **options):
        cache = self._plain(ids[:, :-1], use_cache=True).past_key_values
        return super().generate(ids, past_key_values=cache, **options)

    def __init__(self, model, plan, alpha):
        self._plain = twin(model)
        super().__init__(model, plan, alpha)


class GenerationLeftOut(Formula):
    """Right logits, and a generation that is not steered at all."""

    def __init__(self, model, plan, alpha):
        self._plain = Steered(twin(model))
        super().__init__(model, plan, alpha)

    def generate(self, ids, **options):
        return self._plain.generate(ids, **options)


class ShortGeneration(Formula):
    def generate(self, ids, **options):
        return super().generate(ids, **options)[:, :-1]


class OneBadNumber(Formula):
    def logits(self, ids):
        found = super().logits(ids)
        found[0, 0, 0] = float("nan")
        return found


def without_layer_1(plan):
    return plan.take((plan.layer != 1).nonzero()[:, 0])


WRONG = {
    "unsteered": lambda model, plan, alpha: Steered(model),
    "half the strength": lambda model, plan, alpha: Formula(model, plan, alpha / 2),
    "a tenth too strong": lambda model, plan, alpha: Formula(model, plan, alpha * 1.1),
    "the other way": lambda model, plan, alpha: Formula(model, plan, -alpha),
    "a layer left out": lambda model, plan, alpha: Formula(model, without_layer_1(plan), alpha),
    "one bad number": OneBadNumber,
    "prompt left out": PromptLeftOut,
    "generation left out": GenerationLeftOut,
    "short generation": ShortGeneration,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family, site", PLACES)
def test_right_ways_pass(family, site, dtype):
    gate, model, plan = gate_at(family, site, dtype)
    passed = []
    for name, make in {"formula": Formula, **RIGHT}.items():
        try:
            steered = make(twin(model), plan, gate.alpha)
        except UnavailableError:
            continue
        outcome = gate(steered)
        assert not outcome.reason, f"{name}: {outcome.reason}"
        assert 0 <= outcome.error <= outcome.allowed < outcome.effect / gates.CLEAR
        passed.append(name)
        steered.close()
    assert {"formula", "public", "dense hook", "sparse hook", "columns"} <= set(passed)


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_ways_do_not(wrong, place):
    gate, model, plan = place
    outcome = gate(WRONG[wrong](twin(model), plan, gate.alpha))
    about_tokens = wrong in ("prompt left out", "generation left out", "short generation")
    assert ("generates a token" if about_tokens else "logits differ from the formula") in outcome.reason
    assert (outcome.error <= outcome.allowed) == about_tokens


@pytest.mark.parametrize("wrong", ["unsteered", "half the strength", "a layer left out", "generation left out"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_in_half_precision_neither(wrong, dtype):
    gate, model, plan = gate_at(dtype=dtype)
    assert gate(WRONG[wrong](twin(model), plan, gate.alpha)).reason


def test_the_strength_is_the_least_that_shows(place, monkeypatch):
    gate, model, plan = place
    share = gate.effect / gates.rms(gate.exact)
    assert share > gates.EFFECT and gate.effect > gates.CLEAR * gate.allowed
    assert gate.below(gate.greedy(Steered(twin(model)))) > gates.SLACK * gate.allowed
    assert gate.alpha >= 1 and torch.tensor(gate.alpha).log2().frac() == 0
    monkeypatch.setattr(gates, "EFFECT", 1.02 * share)
    stronger = Gate(model, gate.exact_model, plan, gate.ids).alpha
    assert stronger > gate.alpha
    exact = gate.exact_model.logits(plan, stronger / 2, gate.ids)
    effect = gates.rms(gates.logits(Steered(twin(model)), gate.ids) - exact)
    assert effect < 1.03 * share * gates.rms(exact)


def test_a_step_is_held_against_the_formula_too():
    gate, model, plan = gate_at()
    ids = prompts(model, 2, 6)(0)
    with torch.no_grad():
        right = Formula(twin(model), plan, gate.alpha).logits(ids)[:, -1]
        wrong = model(ids).logits[:, -1]
    assert not gate.judge_step(right, ids).reason
    assert "logits of a step differ" in gate.judge_step(wrong, ids).reason
    assert gate.judge_step(right.roll(1, 0), ids).reason
    assert gate.judge_step(right, ids.roll(1, 1)).reason


def test_without_memory_for_a_wider_model_its_own_precision_stands_in(monkeypatch):
    monkeypatch.setattr(gates, "free_memory", lambda device: 0)
    gate, model, plan = gate_at()
    assert not gate.exact_model.wider and gate.exact_model.model is model
    assert not gate(RIGHT["columns"](twin(model), plan, gate.alpha)).reason
    for wrong in ("unsteered", "half the strength", "one bad number", "generation left out"):
        assert gate(WRONG[wrong](twin(model), plan, gate.alpha)).reason, wrong


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_exact_model_is_one_precision_higher(dtype):
    model = tiny_model().to(dtype)
    exact = Exact(model)
    assert exact.wider and exact.model.dtype == (torch.float64 if dtype == torch.float32 else torch.float32)
    assert model.dtype == dtype


def test_a_token_that_ends_texts_is_the_best_one():
    """Generations of a fixed length would pass it over, and penalties choose others."""
    model = tiny_model()
    plan, ids = spread_plan(model, "ffn", 40), prompts(model, 2, 8)(-2)
    gate = Gate(model, Exact(model), plan, ids)
    greedy = gate.greedy(Formula(twin(model), plan, gate.alpha))[:, ids.shape[1] :]
    model.generation_config.eos_token_id = greedy.unique().tolist()
    model.generation_config.repetition_penalty = 5.0
    gate = Gate(model, Exact(model), plan, ids)
    for make in (Formula, RIGHT["columns"]):
        assert not gate(make(twin(model), plan, gate.alpha)).reason
    assert gate(WRONG["generation left out"](twin(model), plan, gate.alpha)).reason


def test_a_model_that_steering_does_not_change_has_no_gate():
    model = tiny_model()
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    plan = spread_plan(model, "ffn", 40)
    with pytest.raises(WeakGateError, match=r"steering 40 AUs changes .* expected more AUs or a wider dtype"):
        Gate(model, Exact(model), plan, prompts(model, 1, 8)(-2))
