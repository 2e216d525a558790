"""The life of a steering: live strengths, restoration whatever happens, the report, warnings and bad input."""

import copy
import gc
import re
import threading
import warnings
import weakref

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

import austeer
from austeer.models.structure import is_steered
from austeer.steering import bias, fold
from dense_formula import OPERATION, PATHS, assert_unchanged, formula_logits, logits, random_plan, snapshot


@pytest.mark.parametrize("mode", PATHS)
def test_alpha_and_k_are_live(tiny, tiny_ids, mode):
    plan = random_plan(tiny, "ffn", 12, OPERATION[mode])
    plain = copy.deepcopy(tiny)
    with austeer.steer(tiny, plan, 1.0, mode=mode) as steering:
        for alpha, k in ((2.0, 12), (2.0, 5), (-3.0, 1), (0.0, 12), (1.0, 12)):
            steering.alpha, steering.k = alpha, k
            torch.testing.assert_close(logits(tiny, tiny_ids), formula_logits(plain, tiny_ids, plan.top(k), alpha))


@pytest.mark.parametrize("mode", PATHS)
def test_leaving_restores_the_model_bit_for_bit(tiny, tiny_ids, mode):
    before, plain = snapshot(tiny), logits(tiny, tiny_ids)
    plan = random_plan(tiny, ("ffn", "attention"), 40, OPERATION[mode])
    with austeer.steer(tiny, plan, 3.7, mode=mode) as steering:
        assert not torch.equal(logits(tiny, tiny_ids), plain)
        steering.alpha = -1.3
        steering.k = 31
    assert_unchanged(tiny, before)
    assert torch.equal(logits(tiny, tiny_ids), plain)


@pytest.mark.parametrize("mode", PATHS)
def test_an_exception_inside_restores_too(tiny, mode):
    before = snapshot(tiny)
    plan = random_plan(tiny, "attention", 8, OPERATION[mode])
    with pytest.raises(KeyError, match="mine"), austeer.steer(tiny, plan, 9.0, mode=mode):
        raise KeyError("mine")
    assert_unchanged(tiny, before)
    assert not is_steered(tiny)


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("broken", [1, 3])
@pytest.mark.parametrize("kind", [fold.Fold, bias.Bias])
def test_an_attach_that_is_broken_off_takes_back_what_it_did(tiny, monkeypatch, kind, broken, error):
    """Also what the path at which it broke off had already written."""
    before, calls, attach = snapshot(tiny), [], kind.attach

    def fails(path):
        attach(path)
        calls.append(path)
        if len(calls) == broken:
            raise error

    monkeypatch.setattr(kind, "attach", fails)
    with pytest.raises(error):
        austeer.steer(tiny, random_plan(tiny, "ffn", 30, OPERATION[kind.name]), 2.0, mode=kind.name).attach()
    assert len(calls) == broken
    assert_unchanged(tiny, before)
    assert not is_steered(tiny)


def test_threads_cannot_both_steer_a_model(tiny):
    plan, before = random_plan(tiny, "ffn", 40), snapshot(tiny)
    for _ in range(20):
        start, refused = threading.Barrier(2), []

        def run(start=start, refused=refused):
            start.wait()
            try:
                with austeer.steer(tiny, plan, 3.0, mode="fold"):
                    pass
            except austeer.SteeringError:
                refused.append(1)

        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(refused) <= 1
        assert_unchanged(tiny, before)


@pytest.mark.parametrize("mode", ["fold", "bias"])
def test_a_model_cast_inside_is_restored_in_its_new_dtype(tiny, mode):
    expected = copy.deepcopy(tiny).to(torch.bfloat16)
    with austeer.steer(tiny, random_plan(tiny, ("ffn", "attention"), 30, OPERATION[mode]), 3.0, mode=mode):
        tiny.to(torch.bfloat16)
    assert_unchanged(tiny, snapshot(expected))


@pytest.mark.parametrize("change", ["replaced", "offloaded"])
def test_a_model_changed_before_the_block_is_steered_as_it_is_then(tiny, tiny_ids, change):
    plan = random_plan(tiny, "ffn", 40)
    steering = austeer.steer(tiny, plan, 2.0)
    tiny.model.layers[1].mlp = copy.deepcopy(tiny.model.layers[0].mlp)
    expected = formula_logits(tiny, tiny_ids, plan, 2.0)
    if change == "offloaded":
        cpu_offload(tiny, execution_device=torch.device("cpu"))
    with steering:
        torch.testing.assert_close(logits(tiny, tiny_ids), expected)


def test_a_forgotten_steering_does_not_keep_the_model_alive(tiny):
    model = copy.deepcopy(tiny)
    austeer.steer(model, random_plan(model, "ffn", 5), 1.0, mode="columns").attach()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_numpy_numbers_are_numbers(tiny, tiny_ids):
    plan = random_plan(tiny, "ffn", 9)
    expected = formula_logits(tiny, tiny_ids, plan.top(4), 2.0)
    for alpha in (np.int64(2), np.float32(2), np.float64(2)):
        with austeer.steer(tiny, plan, alpha, k=np.int64(4)):
            torch.testing.assert_close(logits(tiny, tiny_ids), expected)


def test_a_steering_used_again_counts_anew(tiny, tiny_ids):
    steering = austeer.steer(tiny, random_plan(tiny, "ffn", 9), 1.0, mode="columns")
    with steering:
        logits(tiny, tiny_ids)
    with pytest.warns(austeer.SteeringWarning), steering:
        pass


def test_the_report_counts_calls_and_names_paths(tiny, tiny_ids):
    plan = random_plan(tiny, ("ffn", "layer"), 7)
    with austeer.steer(tiny, plan, 1.0) as steering:
        for _ in range(3):
            logits(tiny, tiny_ids)
        report = steering.report()
    by_site = {row.site: row for row in report}
    assert by_site["layer"].path == "columns" and by_site["layer"].calls == 3
    assert by_site["ffn"].path == "fold" and by_site["ffn"].calls is None
    assert sum(row.aus for row in report) == len(plan)
    assert re.search("columns.* 3 times", str(report)) and re.search("fold.*weights", str(report))


def test_a_site_that_never_ran_is_a_warning(tiny, tiny_ids):
    plan = random_plan(tiny, "attention", 5)
    with (
        pytest.warns(austeer.SteeringWarning, match="attention"),
        austeer.steer(tiny, plan, 1.0, mode="columns"),
    ):
        pass
    with warnings.catch_warnings(), austeer.steer(tiny, plan, 1.0, mode="columns"):
        warnings.simplefilter("error")
        logits(tiny, tiny_ids)


def test_steering_twice_is_refused_also_through_the_headless_model(tiny):
    plan = random_plan(tiny, "ffn", 5)
    before = snapshot(tiny)
    with austeer.steer(tiny, plan, 1.0):
        assert is_steered(tiny) and is_steered(tiny.model)
        for model in (tiny, tiny.model):
            with pytest.raises(austeer.SteeringError, match="steered"):
                austeer.steer(model, plan, 1.0).attach()
    assert_unchanged(tiny, before)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"alpha": float("nan")}, austeer.SteeringError, "alpha.*nan"),
        ({"alpha": 1e39}, austeer.SteeringError, r"alpha.*1e\+39.*float32"),
        ({"alpha": {"attention": 1.0}}, austeer.SteeringError, "alpha.*attention"),
        ({"k": 0}, austeer.PlanError, "k: found 0"),
        ({"k": 6}, austeer.PlanError, "k.*6.*5"),
        ({"mode": "quick"}, austeer.SteeringError, "mode.*'quick'"),
    ],
)
def test_bad_arguments_name_what_was_found(tiny, arguments, error, message):
    before = snapshot(tiny)
    with pytest.raises(error, match=message):
        austeer.steer(tiny, random_plan(tiny, "ffn", 5), **arguments)
    assert_unchanged(tiny, before)


def test_a_plan_for_another_model_is_refused_before_anything_is_touched(demo, tiny):
    before = snapshot(tiny)
    with pytest.raises(austeer.PlanError, match=r"30 layers.* 3 layers"):
        austeer.steer(tiny, random_plan(demo[0], "attention", 5), 1.0)
    assert_unchanged(tiny, before)


def test_what_is_no_plan_is_refused(tiny):
    for found, message in (
        ({}, "empty dict"),
        ([], "list"),
        ({"a": 1}, "int"),
        ({1: 2}, "1"),
    ):
        with pytest.raises(austeer.PlanError, match=message):
            austeer.steer(tiny, found, 1.0)


@pytest.mark.parametrize("mode", ["fused", "columns", "dense"])
def test_a_hook_put_on_inside_stays_and_steering_goes(tiny, tiny_ids, mode):
    plan, before, plain = random_plan(tiny, "attention", 40), snapshot(tiny), logits(tiny, tiny_ids)
    steering = austeer.steer(tiny, plan, 3.0, mode=mode).attach()
    module = tiny.model.layers[1].self_attn.o_proj
    add_hook_to_module(module, ModelHook())
    assert not torch.equal(logits(tiny, tiny_ids), plain)
    steering.detach()
    assert torch.equal(logits(tiny, tiny_ids), plain) and not is_steered(tiny)
    remove_hook_from_module(module)
    vars(module).pop("forward", None)
    assert_unchanged(tiny, before)


@pytest.mark.parametrize("mode", ["fused", "columns", "dense"])
def test_a_forward_that_wraps_ours_is_told_and_steers_no_more(tiny, tiny_ids, mode):
    plan, plain = random_plan(tiny, "attention", 40), logits(tiny, tiny_ids)
    expected = formula_logits(copy.deepcopy(tiny), tiny_ids, plan, 3.0)
    steering = austeer.steer(tiny, plan, 3.0, mode=mode).attach()
    module = tiny.model.layers[1].self_attn.o_proj
    inner = module.forward
    module.forward = lambda *args: inner(*args)
    torch.testing.assert_close(logits(tiny, tiny_ids), expected)
    with pytest.raises(austeer.SteeringError, match="another forward in place of ours"):
        steering.detach()
    assert torch.equal(logits(tiny, tiny_ids), plain) and not is_steered(tiny)


def test_models_that_share_layers_are_steered_one_at_a_time(tiny):
    other = copy.deepcopy(tiny)
    other.model.layers = tiny.model.layers
    before = snapshot(tiny)
    for mode in ("fold", "columns", "bias"):
        plan = random_plan(tiny, "ffn", 20, OPERATION[mode])
        with austeer.steer(tiny, plan, 2.0, mode=mode, check=False) as steering:
            for second in (mode, "columns"):
                with pytest.raises(austeer.SteeringError, match=r"shared with another model|steered already"):
                    austeer.steer(other, plan, 3.0, mode=second).attach()
            steering.alpha = 1.0
            tiny(input_ids=torch.tensor([[3, 4]]))
        assert_unchanged(tiny, before)
    with austeer.steer(other, plan, 2.0):
        pass
    assert_unchanged(tiny, before)


@pytest.mark.parametrize("mode", ["fold", "bias", "fused", "columns"])
def test_a_copy_made_inside_is_not_steered_twice(tiny, tiny_ids, mode):
    plan = random_plan(tiny, "ffn", 20, OPERATION[mode])
    with austeer.steer(tiny, plan, 2.0, mode=mode):
        logits(tiny, tiny_ids)
        twin = copy.deepcopy(tiny)
    for site, again in (("ffn", "auto"), ("ffn", "fused"), ("attention", "auto"), ("layer", "columns")):
        with pytest.raises(austeer.SteeringError, match=r"copied|forward of .* was replaced"):
            austeer.steer(twin, random_plan(tiny, site, 20, OPERATION[mode]), 2.0, mode=again).attach()


def test_a_strength_beyond_float32_is_refused(tiny):
    plan = random_plan(tiny, "ffn", 40, "shift")
    assert plan.delta.abs().max() > 2
    with pytest.raises(austeer.SteeringError, match=r"alpha.*3e\+38.*'ffn'.*float32"):
        austeer.steer(tiny, plan, 3e38)
    steering = austeer.steer(tiny, plan, 2.0)
    with pytest.raises(austeer.SteeringError, match=r"alpha.*3e\+38"):
        steering.alpha = 3e38
    assert steering.alpha == 2.0


@pytest.mark.parametrize("mode", ["fused", "columns", "dense"])
def test_alpha_may_change_between_forward_and_backward(tiny, tiny_ids, mode):
    plan, weight = random_plan(tiny, "ffn", 20), tiny.model.layers[0].mlp.up_proj.weight
    gradients = []
    with austeer.steer(tiny, plan, 2.0, mode=mode) as steering:
        for change in (2.0, -5.0):
            tiny.zero_grad()
            steering.alpha = 2.0
            loss = tiny(**tiny_ids).logits.square().mean()
            steering.alpha = change
            loss.backward()
            gradients.append(weight.grad.clone())
    assert torch.equal(*gradients)
