"""The gate: every right way passes in every dtype and operation, and what is a little wrong does not."""

from dataclasses import replace

import pytest
import torch

from bench import catalogue, plain_ways, shapes
from bench import gate as gates
from bench.gate import Gate, WeakGateError, why_not_near
from bench.lineup import prompts
from bench.plain_ways import Formula
from bench.plans import spread_plan
from bench.steered import Steered, UnavailableError, twin
from tiny_models import tiny_model

RIGHT = {way.name: way.make for way in (*plain_ways.WAYS[2:], *catalogue.OURS, catalogue.WAYS["lora"])}
#: GPT-2 has biases and transposed weights; the experts of a Mixtral are one tensor; OPT flattens, Gemma 2 has norms
#: behind the MLP; BLOOM's MLP takes the residual.
PLACES = [
    *(("llama", site) for site in ("attention", "ffn", "layer", "neuron")),
    *((family, "ffn") for family in ("gpt2", "mixtral", "opt", "bloom")),
    *((family, "layer") for family in ("gemma2", "mixtral")),
]
OPERATIONS = ("scale", "push", "shift")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def gate_at(family="llama", site="ffn", dtype=torch.float32, operation="scale", k=40):
    """(gate, model, plan); two rows of eight tokens."""
    model = tiny_model(family).to(dtype)
    plan = spread_plan(model, site, k, operation=operation)
    return Gate(model, plan, prompts(model, 2, 8)(-1)), model, plan


class PromptLeftOut(Formula):
    """Steers only what it generates."""

    def __init__(self, model, plan, alpha):
        self._plain = twin(model)
        super().__init__(model, plan, alpha)

    def generate(self, ids, **options):
        cache = self._plain(ids[:, :-1], use_cache=True).past_key_values
        return super().generate(ids, past_key_values=cache, **options)


class GenerationLeftOut(Formula):
    """Steers passes over whole prompts, and no token after them."""

    @staticmethod
    def steering(strength, dtype):
        right = Formula.steering(strength, dtype)
        return lambda x: right(x) if x.ndim < 3 or x.shape[1] > 1 else x


class OtherModel(Formula):
    """Generates with a model that is not the one looked at."""

    def __init__(self, model, plan, alpha):
        self._plain = Steered(twin(model))
        super().__init__(model, plan, alpha)

    def generate(self, ids, **options):
        return self._plain.generate(ids, **options)


class ShortGeneration(Formula):
    def generate(self, ids, **options):
        return super().generate(ids, **options)[:, :-1]


class OneBadNumber(Formula):
    @staticmethod
    def steering(strength, dtype):
        right = Formula.steering(strength, dtype)
        bad = torch.zeros(strength.site.width, dtype=dtype)
        bad[0] = float("nan")
        return lambda x: right(x) + bad


def without_layer_1(plan):
    return plan.take((plan.layer != 1).nonzero()[:, 0])


def next_column(plan):
    """The first AU's neighbour in its place, one that the plan does not have."""
    taken = set(zip(plan.layer.tolist(), plan.index.tolist()))
    layer, index = plan.layer[0].item(), plan.index.clone()
    index[0] = next(i for i in range(index.max()) if (layer, i) not in taken)
    return replace(plan, index=index)


WRONG = {
    "unsteered": lambda model, plan, alpha: Steered(model),
    "half the strength": lambda model, plan, alpha: Formula(model, plan, alpha / 2),
    "the other way": lambda model, plan, alpha: Formula(model, plan, -alpha),
    "a layer left out": lambda model, plan, alpha: Formula(model, without_layer_1(plan), alpha),
    "a wrong column": lambda model, plan, alpha: Formula(model, next_column(plan), alpha),
    "one bad number": OneBadNumber,
    "prompt left out": PromptLeftOut,
    "generation left out": GenerationLeftOut,
    "another model": OtherModel,
    "short generation": ShortGeneration,
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family, site", PLACES)
def test_right_ways_pass(family, site, dtype, operation):
    gate, model, plan = gate_at(family, site, dtype, operation)
    passed = []
    for name, make in {"formula": Formula, **RIGHT}.items():
        try:
            steered = make(twin(model), plan, gate.alpha)
        except UnavailableError:
            continue
        outcome = gate(steered)
        assert not outcome.reason, f"{name}: {outcome.reason}"
        assert 0 <= outcome.error <= outcome.allowed and outcome.effect > 0
        passed.append(name)
        steered.close()
    assert {"formula", "public", "dense hook", "sparse hook", "columns", "auto"} <= set(passed)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("family, site", PLACES)
def test_wrong_ways_do_not(family, site, dtype, operation):
    gate, model, plan = gate_at(family, site, dtype, operation)
    for name, make in WRONG.items():
        if not (name == "generation left out" and family == "opt"):  # which shows a hook no tokens apart
            assert gate(make(twin(model), plan, gate.alpha)).reason, name


def test_a_tenth_too_strong_shows_in_float32():
    gate, model, plan = gate_at()
    assert "layer 0, ffn, value" in gate(Formula(twin(model), plan, gate.alpha * 1.1)).reason


@pytest.mark.parametrize(
    "shape, sizes, site",
    [
        (shapes.GEMMA2_9B, {"num_hidden_layers": 42}, "ffn"),
        (shapes.GEMMA2_9B, {"num_hidden_layers": 42}, "attention"),
        (shapes.QWEN3_30B_A3B, {"num_hidden_layers": 48, "num_experts": 8}, "ffn"),
        (shapes.QWEN3_30B_A3B, {"num_hidden_layers": 48, "num_experts": 8}, "layer"),
    ],
)
def test_a_deep_random_network_in_half_precision_is_told_apart_too(shape, sizes, site):
    """Its logits say nothing: norms behind the MLP hide the AUs, and routers magnify rounding."""
    model = shapes.build(shapes.tiny(shape, **sizes), torch.device("cpu"))
    plan = spread_plan(model, site, 100)
    gate = Gate(model, plan, prompts(model, 1, 8)(-1))
    for name in ("public", "columns", "auto"):
        steered = RIGHT[name](twin(model), plan, gate.alpha)
        assert not gate(steered).reason
        steered.close()
    for wrong in ("unsteered", "half the strength", "a layer left out", "a wrong column"):
        assert gate(WRONG[wrong](twin(model), plan, gate.alpha)).reason, wrong


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_strength_is_the_least_power_of_two_that_shows(operation, monkeypatch):
    gate, model, plan = gate_at("llama", "attention", torch.bfloat16, operation)
    assert gate.alpha >= 1 and torch.tensor(gate.alpha).log2().frac() == 0
    monkeypatch.setattr(gates, "CLEAR", gates.CLEAR / 1e6)
    assert Gate(model, plan, gate.ids).alpha == 1
    monkeypatch.setattr(gates, "CLEAR", 1e6)
    with pytest.raises(WeakGateError, match=r"steering 40 AUs of 'attention' .* give more AUs or a wider dtype"):
        Gate(model, plan, gate.ids)


def test_the_model_is_left_as_it_was():
    _, model, _ = gate_at("llama", "layer")
    fresh = tiny_model()
    assert all(map(torch.equal, model.parameters(), fresh.parameters()))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_hooks_that_are_put_on_later_are_seen():
    """As some libraries do at every generation."""
    module, seen = torch.nn.Identity(), []
    with gates.watched([(module, lambda args, options: seen.append(args[0].clone()), seen.append)]):
        module.register_forward_hook(lambda *call: call[-1] + 1)
        module(torch.zeros(2))
    assert [t.tolist() for t in seen] == [[0, 0], [1, 1]]


def test_logits_of_a_step_are_near_where_another_model_s_are_far():
    expected, other = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 3.0, 4.0])
    assert why_not_near(expected + 0.2, expected, other) == ""
    for found in (expected + 0.3, other, expected * float("nan")):
        assert "logits of a step differ" in why_not_near(found, expected, other)
