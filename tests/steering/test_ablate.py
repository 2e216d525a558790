"""Directional ablation on a live model: what is its own; the rest is with the other operations, in their tests."""

import copy
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import austeer
from austeer.models.sites import find_sites, fingerprint
from dense_formula import (
    SITES,
    assert_unchanged,
    formula_at,
    greedy_by_recomputing,
    hook,
    logits,
    random_plan,
    snapshot,
)


def whole_layer(model, site, layer, seed=0):
    """A plan of all AUs of one layer, whose least important ones come first in the layer."""
    found, generator = find_sites(model, [site]), torch.Generator().manual_seed(seed)
    width = found[site][0].width
    delta = torch.randn(width, generator=generator)
    return austeer.Plan(
        (site,) * width,
        torch.full((width,), layer, dtype=torch.int32),
        torch.arange(width - 1, -1, -1, dtype=torch.int32),
        delta.sign(),
        delta,
        "ablate",
        fingerprint(model, found),
        10,
    )


def seen_at(model, site, layer, ids):
    """The tensor of a site as the layers after it see it, float64 [tokens, width]."""
    place, found = find_sites(model, [site])[site][layer], []
    handle = hook(model, place, lambda x: found.append(x.detach().double().clone()) or x)
    logits(model, ids)
    handle.remove()
    return found[0].flatten(0, -2)


@pytest.mark.parametrize("mode", ["auto", "fold", "columns"])
def test_a_direction_of_a_real_model_is_removed(demo, measured, mode):
    model = demo[0]
    plan, ids = measured.select("ffn", k=60, operation="ablate"), {"input_ids": torch.tensor([[504, 905, 314, 253]])}
    before = snapshot(model)
    with formula_at(model, plan, 1.0):
        expected = logits(model, ids)
    with austeer.steer(model, plan, 1.0, mode=mode) as steering:
        found = logits(model, ids)
        assert {row.path for row in steering.report()} == {"columns" if mode == "columns" else "fold"}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (expected - logits(model, ids)).abs().max() > 0.01
    assert_unchanged(model, before)


@pytest.mark.parametrize("site", ["ffn", "layer"])
def test_one_removes_two_mirrors_and_zero_does_nothing(tiny, tiny_ids, site):
    model, plan = copy.deepcopy(tiny).double(), whole_layer(tiny, site, 1)
    d = torch.zeros(len(plan), dtype=torch.float64)
    d[plan.index.long()] = plan.delta.double() / plan.delta.double().norm()
    before = seen_at(model, site, 1, tiny_ids)
    size = (before @ d).abs().max()
    assert size > 0.1 * before.abs().max()
    with austeer.steer(model, plan, 1.0) as steering:
        for alpha in (1.0, 2.0, 0.0):
            steering.alpha = alpha
            x = seen_at(model, site, 1, tiny_ids)
            rounded = 1e-6 * float(size)  # of d, which is float32
            torch.testing.assert_close(x @ d, (1 - alpha) * (before @ d), rtol=0, atol=rounded)
            beside, were = (t - (t @ d)[:, None] * d for t in (x, before))
            torch.testing.assert_close(beside, were, rtol=0, atol=rounded)
        assert torch.equal(x, before)


@pytest.mark.parametrize("mode", ["auto", "columns", "dense"])
def test_the_direction_is_of_the_first_k(tiny, tiny_ids, mode):
    plan = random_plan(tiny, ("attention", "ffn"), 20, "ablate")
    plain = copy.deepcopy(tiny)
    with austeer.steer(tiny, plan, 1.0, mode=mode) as steering:
        for k in (40, 7, 1, 40):
            steering.k = k
            with formula_at(plain, plan.top(k), 1.0):
                torch.testing.assert_close(logits(tiny, tiny_ids), logits(plain, tiny_ids))


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("mode", ["columns", "dense"])
def test_gradients_are_of_the_strength_of_the_forward_pass(tiny, tiny_ids, mode, named):
    model, plan = copy.deepcopy(tiny), random_plan(tiny, ("ffn", "attention"), 20, "ablate")

    def gradients(loss):
        model.zero_grad()
        loss().logits.square().mean().backward()
        return [p.grad.clone() for p in model.parameters()]

    with formula_at(model, plan.top(30), 1.0):
        expected = gradients(lambda: model(**tiny_ids))
    with austeer.steer(model, {"a": plan} if named else plan, 1.0, k=30, mode=mode) as steering:
        if named:
            steering.rows(["a"] * len(tiny_ids["input_ids"]))

        def changed_before_backward():
            output = model(**tiny_ids)
            steering.alpha, steering.k = 5.0, 40
            return output

        for got, gradient in zip(gradients(changed_before_backward), expected):
            torch.testing.assert_close(got, gradient)


@pytest.mark.parametrize("scope", ["prompt", "generation", "last_prompt_token", (2, 5)])
def test_a_scope_of_tokens(lively, padded, scope):
    plan = random_plan(lively, ("ffn", "layer", "attention"), 20, "ablate")
    with austeer.steer(lively, plan, 2.0, scope=scope) as steering:
        found = lively.generate(**padded, max_new_tokens=6, do_sample=False)
        assert {row.path for row in steering.report()} == {"columns"}
    assert torch.equal(found, greedy_by_recomputing(lively, padded, plan, 2.0, scope, 6))


@pytest.mark.parametrize("named", [False, True])
def test_a_compiled_model_is_compiled_once(tiny, tiny_ids, named):
    """Where it runs, alpha, k and rows only refill buffers."""
    torch._dynamo.reset()
    model, plain, count = copy.deepcopy(tiny), tiny, CompileCounterWithBackend("aot_eager")
    a, b = random_plan(model, ("layer", "ffn"), 20, "ablate"), random_plan(model, ("layer", "ffn"), 9, seed=1)
    compiled, compilations = torch.compile(model, backend=count, fullgraph=not named), []
    with austeer.steer(model, {"a": a, "b": b} if named else a, 1.0, mode="columns") as steering, torch.no_grad():
        for alpha, k in ((1.0, 40), (2.0, 40), (1.5, 11)):
            steering.alpha, steering.k = alpha, {"a": k, "b": 18} if named else k
            if named:
                steering.rows(["a", None] if alpha != 2.0 else [None, "a"])
            found = compiled(**tiny_ids).logits
            with formula_at(plain, a.top(k), alpha):
                expected = logits(plain, tiny_ids)
            if named:
                expected[0 if alpha == 2.0 else 1] = logits(plain, tiny_ids)[0 if alpha == 2.0 else 1]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            compilations.append(count.frame_count)
        assert compilations[0] == compilations[-1] > 0


def test_a_report_has_each_au_s_part_of_the_direction(tiny):
    plan = random_plan(tiny, ("ffn", "layer"), 15, "ablate")
    report = austeer.steer(tiny, plan, -2.0).report()
    for row in report:
        assert sum(unit.strength**2 for unit in row.units) == pytest.approx(4.0)
        for unit in row.units:
            (delta,) = [u.delta for u in plan if (u.site, u.layer, u.index) == (row.site, row.layer, unit.index)]
            assert unit.strength * delta < 0
    assert sum(row.share for row in report) == pytest.approx(1.0)
    reasons = {row.site: (row.path, row.reason) for row in report}
    assert reasons["ffn"] == ("fold", "") and reasons["layer"][0] == "columns"
    assert "no linear layer makes this tensor" in reasons["layer"][1]


# --- refused ---------------------------------------------------------------------------------------------------------


def test_aus_without_a_direction_are_refused(tiny):
    plan = random_plan(tiny, "ffn", 12, "shift")
    delta = torch.where(plan.layer == 1, 0.0, plan.delta)
    with pytest.raises(austeer.PlanError, match=r"delta.*zeros.*'ffn' of layer 1.*'ablate'"):
        replace(plan, delta=delta).with_operation("ablate")
    first = replace(whole_layer(tiny, "ffn", 1), delta=torch.tensor([0.0, 0.0] + [1.0] * 30))
    with pytest.raises(austeer.PlanError, match=r"first 2 AUs.*'ffn' of layer 1"):
        first.top(2)
    with austeer.steer(tiny, first, 1.0) as steering:
        with pytest.raises(austeer.PlanError, match=r"first 1 AUs.*'ffn' of layer 1"):
            steering.k = 1
        assert steering.k == 32
    with pytest.raises(austeer.PlanError, match="first 2 AUs"):
        austeer.steer(tiny, first, 1.0, k=2)


def test_a_strength_by_kl_is_of_shift_alone(tiny):
    with pytest.raises(austeer.SteeringError, match=r"kl.*'ablate'.*'shift'"):
        austeer.steer(tiny, random_plan(tiny, "ffn", 12, "ablate"), kl=0.1)


# --- put back --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_folded_weights_come_back_bit_for_bit_on_other_numbers_of_threads(tiny, dtype):
    """The sums over a direction may be rounded otherwise there."""
    model = copy.deepcopy(tiny).to(dtype)
    plan, before, threads = random_plan(model, ("attention", "ffn", "neuron"), 90, "ablate"), snapshot(model), 1
    try:
        for alpha in (1.0, -3.0):
            with austeer.steer(model, plan, alpha) as steering:
                threads = 3 - threads
                torch.set_num_threads(threads)
                steering.alpha = 0.5
                changed = [n for n, t in snapshot(model)[0].items() if not torch.equal(t, before[0][n])]
                assert len(changed) == 2 * 3
            assert_unchanged(model, before)
    finally:
        torch.set_num_threads(1)


def test_a_sum_of_plans_ablates_one_direction(tiny, tiny_ids):
    a, b = random_plan(tiny, SITES, 10, "ablate"), random_plan(tiny, SITES, 40, "ablate", seed=1)
    taken = set(a.keys())
    b = b.take(torch.tensor([i for i, key in enumerate(b.keys()) if key not in taken]))
    plain = copy.deepcopy(tiny)
    with austeer.steer(tiny, a + b, 1.0):
        found = logits(tiny, tiny_ids)
    with formula_at(plain, a + b, 1.0):
        torch.testing.assert_close(found, logits(plain, tiny_ids))
    with formula_at(plain, a, 1.0), formula_at(plain, b, 1.0):
        assert (found - logits(plain, tiny_ids)).abs().max() > 1e-3
