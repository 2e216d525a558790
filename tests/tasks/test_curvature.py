"""The KL of small shifts from forward passes alone: that of the exact Fisher information, and of the gradients."""

from dataclasses import replace

import pytest
import torch

from austeer import CaptureError, SteeringError, estimate_kl, find_sites, profile
from austeer.models.structure import decoder_of
from dense_formula import formula_at, random_plan, shift_plan
from letter_tokens import Letters
from tiny_models import tiny_model

TEXTS = ["the soup was warm", "a view of the river and its boats", "tea", "two roads meet by the old mill", "bread"]


def sized(plan, size):
    return replace(plan, delta=plan.delta * size)


def exact_kl(model, plan):
    """d' F d / 2 with every token of the vocabulary in its part: sum of p (d log p . d)^2 / 2, by the dense formula."""
    total = tokens = 0
    for ids in Letters()(TEXTS)["input_ids"]:

        def log_p(alpha, ids=ids):
            with formula_at(model, plan, alpha), torch.no_grad():
                return model(input_ids=torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)

        slope = (log_p(1e-4) - log_p(-1e-4)) / 2e-4
        total += float((log_p(0.0).exp() * slope.square()).sum()) / 2
        tokens += len(ids) - 1
    return total / tokens


@pytest.mark.parametrize("operation", ["shift", "scale", "push", "ablate"])
def test_it_is_the_fisher_information(operation):
    model = tiny_model().double()
    plans = [random_plan(model, [site], 12, operation, seed=3) for site in ("attention", "ffn", "layer", "neuron")]
    found = estimate_kl(model, Letters(), plans, TEXTS)
    near = 3e-3 if operation == "ablate" else 1e-3  # a direction takes a larger strength, and is less of a parabola
    assert found == pytest.approx([exact_kl(model, plan) for plan in plans], rel=near)


def test_gradients_give_the_same():
    model = tiny_model()
    made = profile(model, Letters(), ["attention", "ffn"], TEXTS, draws=2000, progress=False)
    plans = [shift_plan(model, sites, 12, seed=5) for sites in (["attention"], ["ffn"], ["attention", "ffn"])]
    found = estimate_kl(model, Letters(), plans, TEXTS, batch_tokens=64)
    assert found == pytest.approx([made.kl(plan) for plan in plans], rel=5 * made.error)


@pytest.mark.parametrize("size", [1e-8, 1.0, 1e8])
def test_the_step_is_found_whatever_the_plans_size(size):
    model = tiny_model()
    plan = shift_plan(model, ("ffn",), 12, seed=3)
    [one] = estimate_kl(model, Letters(), [plan], TEXTS)
    [found] = estimate_kl(model, Letters(), [sized(plan, size)], TEXTS)
    assert found == pytest.approx(one * size**2, rel=0.02)


def test_rounding_is_taken_off_in_bfloat16():
    model = tiny_model()
    plans = [shift_plan(model, (site,), 12, seed=3) for site in ("attention", "ffn", "layer", "neuron")]
    expected = estimate_kl(model, Letters(), plans, TEXTS)
    assert estimate_kl(model.bfloat16(), Letters(), plans, TEXTS) == pytest.approx(expected, rel=0.15)


def test_what_changes_nothing_and_what_jumps():
    model = tiny_model()
    plan = shift_plan(model, ("ffn",), 12, seed=3)
    assert estimate_kl(model, Letters(), [sized(plan, 0.0), plan], TEXTS)[0] == 0

    decoder_of(model).layers[2].register_forward_hook(lambda module, args, out: out + 100 * (out - out[:1]).sign())
    with pytest.raises(SteeringError, match="plan 0: found a KL"):
        estimate_kl(model, Letters(), [plan], TEXTS[:1])


def test_where_there_are_no_gradients_it_is_named():
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise NotImplementedError("no backward formula")

    model = tiny_model()
    plan = shift_plan(model, ("ffn",), 12, seed=3)
    expected = estimate_kl(model, Letters(), [plan], TEXTS)
    last = find_sites(model, "layer")["layer"][-1].path
    model.get_submodule(last).register_forward_hook(lambda module, args, out: Opaque.apply(out))
    with pytest.raises(CaptureError, match=r"no backward formula.*estimate_kl"):
        profile(model, Letters(), ["ffn"], TEXTS, draws=5, progress=False)
    assert estimate_kl(model, Letters(), [plan], TEXTS) == expected
    cut = tiny_model()
    cut.get_submodule(last).register_forward_hook(lambda module, args, out: out.detach())
    with pytest.raises(CaptureError, match="estimate_kl"):
        profile(cut, Letters(), ["ffn"], TEXTS, draws=5, progress=False)
