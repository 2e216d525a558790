"""Steering without this library: every form is the definition, at every site, and leaves the model it shares alone."""

from types import SimpleNamespace

import pytest
import torch

from austeer.models.sites import find_sites
from bench import plain_ways
from bench.plain_ways import Formula, Strength, strengths
from bench.steered import twin
from dense_formula import SITES, formula_logits, logits, random_plan
from tiny_models import ids_of_rows, tiny_model, wide_model

ALPHA = 4.0  # alpha * beta is exact in float32
FORMS = {way.name: way.make for way in plain_ways.WAYS if way.name not in ("unsteered", "unsteered again")}
FORMS["formula"] = Formula
#: A mixture of experts has no neuron site.
CASES = [(f, s) for f in ("llama", "gpt2", "gemma2", "mixtral") for s in SITES if (f, s) != ("mixtral", "neuron")]


def without_layer_1(plan):
    return plan.take((plan.layer != 1).nonzero()[:, 0])


@pytest.mark.parametrize("operation", ["scale", "push", "shift"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family, site", CASES)
def test_every_form_is_the_definition(form, family, site, operation):
    model, ids = wide_model(family), ids_of_rows()
    plan = without_layer_1(random_plan(model, site, 40, operation))
    plain, expected = logits(model, ids), formula_logits(model, ids, plan, ALPHA)
    assert (expected - plain).abs().max() > 0.1
    steered = FORMS[form](twin(model), plan, ALPHA)
    with torch.no_grad():
        torch.testing.assert_close(steered.logits(ids["input_ids"]), expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(logits(model, ids), plain)


@pytest.mark.parametrize("form", FORMS)
def test_a_decoding_step_is_steered_too(form):
    model, ids = wide_model(), ids_of_rows()["input_ids"]
    plan = random_plan(model, "ffn", 40)
    steered = FORMS[form](twin(model), plan, ALPHA)
    with torch.no_grad():
        whole = steered.logits(ids)[:, -1]
        cache = steered.model(ids[:, :-1], use_cache=True).past_key_values
        step = steered.model(ids[:, -1:], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(step, whole, rtol=1e-9, atol=1e-9)


def test_unsteered_twice_is_the_model():
    model, ids = tiny_model(), ids_of_rows()
    for way in plain_ways.WAYS[:2]:
        steered = way.make(twin(model), random_plan(model, "ffn", 40), ALPHA)
        with torch.no_grad():
            assert torch.equal(steered.logits(ids["input_ids"]), logits(model, ids))
    assert [way.name for way in plain_ways.WAYS[:2]] == [plain_ways.UNSTEERED, plain_ways.AGAIN]


@pytest.mark.parametrize("side_of", ["attention", "ffn"])
def test_the_public_form_is_at_every_layer_and_hooks_only_where_there_are_aus(side_of):
    model = tiny_model()
    plan = without_layer_1(random_plan(model, side_of, 40))
    paths = [site.path for site in find_sites(model, [side_of])[side_of]]
    public = plain_ways.Public(twin(model), plan, ALPHA).model
    assert all("forward" in vars(public.get_submodule(path)) for path in paths)
    for form in ("dense hook", "sparse hook", "formula"):
        modules = [FORMS[form](twin(model), plan, ALPHA).model.get_submodule(path) for path in paths]
        hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules]
        assert hooks == [1, 0, 1], form


@pytest.mark.parametrize("operation", ["scale", "push", "shift"])
def test_strengths_are_alpha_times_beta_or_delta_of_each_layer(operation):
    model = tiny_model()
    plan = without_layer_1(random_plan(model, "neuron", 40, operation))
    found = list(strengths(model, plan, 2.5))
    assert [one.site.layer for one in found] == [0, 1, 2] and len(found[1].index) == 0
    for one in found:
        rows = plan.layer == one.site.layer
        expected = 2.5 * (plan.delta if operation == "shift" else plan.beta)[rows]
        assert torch.equal(one.index, plan.index[rows].long()) and torch.equal(one.value, expected)
        vector = one.dense(torch.float64)
        assert vector.shape == (48,) and vector.count_nonzero() == len(one.index)
        assert torch.equal(vector[one.index].float(), expected)


def test_the_formula_rounds_once():
    torch.manual_seed(0)
    x, gamma = torch.randn(1000).bfloat16(), torch.randn(1000)
    exact = x.double() * (1 + gamma.double())
    steer = Formula.steering(Strength(SimpleNamespace(width=1000), "scale", torch.arange(1000), gamma), torch.bfloat16)
    error = (steer(x).double() - exact).abs()
    assert (error <= exact.abs() * 2.0**-8).all()
    twice = (x + gamma.bfloat16() * x).double()
    assert (twice - exact).abs().mean() > 1.3 * error.mean()
