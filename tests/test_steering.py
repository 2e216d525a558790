"""Steering on a real and on tiny models: exact on every path, live, and gone without a trace."""

import copy
import gc
import threading
import warnings
import weakref

import numpy as np
import peft
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn
from torch.nn.utils import prune

import austeer
from austeer import paths
from austeer.demo import load_data
from austeer.plan import Plan
from austeer.sites import find_sites, fingerprint
from austeer.steering import is_steered

SITES = ("attention", "ffn", "layer", "neuron")
OPERATIONS = ("scale", "push", "shift")
PATHS = ("fold", "fused", "columns", "dense")


def random_plan(model, sites, count, operation="scale", seed=0) -> Plan:
    """A plan of random AUs, for tests that do not need a measured one."""
    generator = torch.Generator().manual_seed(seed)
    found = find_sites(model, SITES)
    print_ = fingerprint(model, found)
    sites = [sites] if isinstance(sites, str) else list(sites)
    names, layers, indices = [], [], []
    for name in sites:
        width = print_.widths[name]
        flat = torch.randperm(print_.layers * width, generator=generator)[:count]
        names += [name] * count
        layers.append(flat // width)
        indices.append(flat % width)
    total = count * len(sites)
    beta = torch.rand(total, generator=generator) * 2 - 1
    delta = torch.randn(total, generator=generator)
    return Plan(
        tuple(names), torch.cat(layers).int(), torch.cat(indices).int(), beta, delta, operation, print_, pairs=10
    )


def formula(model, plan, alpha):
    """The definition, written out with plain PyTorch hooks and dense vectors; returns what removes them."""
    handles = []

    def steered(x, rows):
        index = plan.index[rows].long()
        beta, delta = (torch.zeros(x.shape[-1], dtype=x.dtype) for _ in range(2))
        beta[index] = plan.beta[rows].to(x.dtype)
        delta[index] = plan.delta[rows].to(x.dtype)
        strength = torch.tensor(alpha, dtype=x.dtype)
        if plan.operation == "scale":
            return x + strength * beta * x
        if plan.operation == "push":
            return x + strength * beta * x.abs()
        return x + strength * delta

    layers = model.model.layers
    for i, layer in enumerate(layers):
        for name in set(plan.site):
            rows = [r for r in range(len(plan)) if plan.site[r] == name and plan.layer[r] == i]
            if not rows:
                continue
            if name in ("attention", "neuron"):
                module = layer.self_attn.o_proj if name == "attention" else layer.mlp.down_proj
                hook = module.register_forward_pre_hook(lambda m, args, rows=rows: (steered(args[0], rows), *args[1:]))
            else:
                module = layer.mlp if name == "ffn" else layer
                hook = module.register_forward_hook(lambda m, args, out, rows=rows: steered(out, rows))
            handles.append(hook)
    return handles


@torch.no_grad()
def logits(model, ids):
    return model(**ids).logits


@torch.no_grad()
def formula_logits(model, ids, plan, alpha):
    handles = formula(model, plan, alpha)
    try:
        return model(**ids).logits
    finally:
        for handle in handles:
            handle.remove()


def snapshot(model):
    """Every parameter and buffer, and every attribute name of every module."""
    tensors = {name: t.clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}
    return tensors, {name: set(vars(module)) for name, module in model.named_modules()}


def assert_unchanged(model, before):
    tensors, attributes = snapshot(model)
    assert tensors.keys() == before[0].keys()
    assert all(torch.equal(tensors[name], before[0][name]) for name in tensors)
    assert attributes == before[1]


@pytest.fixture(scope="module")
def double(demo):
    return copy.deepcopy(demo[0]).double()


@pytest.fixture(scope="module")
def measured(demo):
    """Momentum of a few real pairs at every site."""
    model, tokenizer = demo
    return austeer.measure(model, tokenizer, load_data().tuning[:24], SITES, progress=False)


@pytest.fixture(scope="module")
def ids(demo):
    tokenizer = copy.deepcopy(demo[1])
    tokenizer.padding_side = "left"
    texts = ["The weekend trip was", "Compared with the inn across the road, this one felt"]
    return tokenizer(texts, return_tensors="pt", padding=True)


@pytest.fixture
def tiny_ids(tiny):
    return {"input_ids": torch.randint(0, tiny.config.vocab_size, (2, 7), generator=torch.Generator().manual_seed(3))}


# --- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("site", SITES)
def test_each_path_on_the_real_model_equals_the_formula(demo, double, measured, ids, site, operation):
    """Within twice plain PyTorch's own float32 error against float64, and the effect is not lost in it."""
    model = demo[0]
    plan = measured.select(site, k=60, operation=operation)
    alpha = 0.5 if site == "layer" else 2.0
    exact = formula_logits(double, ids, plan, alpha)
    real = ids["attention_mask"].bool()
    own_error = (formula_logits(model, ids, plan, alpha) - exact)[real].abs().max()
    effect = (exact - logits(double, ids))[real].abs().max()
    assert effect > 100 * own_error
    before = logits(model, ids)
    took = []
    for mode in PATHS:
        possible = operation == "scale" if mode == "fold" else True
        if mode in ("fold", "fused") and (site == "layer" or not possible):
            with pytest.raises(austeer.SteeringError, match=f"{mode}.*{site}"):
                austeer.steer(model, plan, alpha, mode=mode)
            continue
        with austeer.steer(model, plan, alpha, mode=mode) as steering:
            error = (logits(model, ids) - exact)[real].abs().max()
            assert {row.path for row in steering.report()} == {mode}
        assert error <= 2 * own_error, f"{mode}: errs by {error:.2e}, plain PyTorch by {own_error:.2e}"
        took.append(mode)
    assert "columns" in took
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", PATHS)
@pytest.mark.parametrize("site", ["attention", "ffn"])
def test_half_precision_errs_no_more_than_the_dense_form(tiny, tiny_ids, site, mode, dtype):
    model = copy.deepcopy(tiny).to(dtype)
    wide = copy.deepcopy(model).double()  # the same weights, so that only the arithmetic differs
    plan = random_plan(model, site, 20)
    exact = formula_logits(wide, tiny_ids, plan, 3.0)
    own_error = (formula_logits(model, tiny_ids, plan, 3.0).double() - exact).norm()
    with austeer.steer(model, plan, 3.0, mode=mode):
        error = (logits(model, tiny_ids).double() - exact).norm()
    assert error <= 2 * own_error


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_plan_of_two_sites_takes_a_strength_for_each(tiny, tiny_ids, operation):
    a, b = (random_plan(tiny, site, 9, operation, seed=i) for i, site in enumerate(("attention", "ffn")))
    handles = formula(tiny, a, 2.0) + formula(tiny, b, -0.5)
    expected = logits(tiny, tiny_ids)
    for handle in handles:
        handle.remove()
    with austeer.steer(tiny, a + b, {"attention": 2.0, "ffn": -0.5}) as steering:
        torch.testing.assert_close(logits(tiny, tiny_ids), expected)
        assert steering.alpha == {"attention": 2.0, "ffn": -0.5}


@pytest.mark.parametrize("bias_side", ["attention", "ffn"])
@pytest.mark.parametrize("operation", ["scale", "shift"])
def test_fold_reaches_the_bias(tiny, tiny_ids, bias_side, operation):
    config = copy.deepcopy(tiny.config)
    config.attention_bias = config.mlp_bias = True
    torch.manual_seed(5)
    model = type(tiny)(config).eval()
    for layer in model.model.layers:  # biases begin as zero, which would hide a mistake
        nn.init.normal_(layer.self_attn.o_proj.bias)
        nn.init.normal_(layer.mlp.down_proj.bias)
    plan = random_plan(model, bias_side, 25, operation)
    before, plain = snapshot(model), copy.deepcopy(model)
    with austeer.steer(model, plan, 1.5) as steering:
        assert {row.path for row in steering.report()} == {"fold"}
        for alpha in (1.5, -0.7):
            steering.alpha = alpha
            torch.testing.assert_close(logits(model, tiny_ids), formula_logits(plain, tiny_ids, plan, alpha))
    assert_unchanged(model, before)


# --- live -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", PATHS)
def test_alpha_and_k_are_live(tiny, tiny_ids, mode):
    plan = random_plan(tiny, "ffn", 12)
    plain = copy.deepcopy(tiny)
    with austeer.steer(tiny, plan, 1.0, mode=mode) as steering:
        for alpha, k in ((2.0, 12), (2.0, 5), (-3.0, 1), (0.0, 12), (1.0, 12)):
            steering.alpha, steering.k = alpha, k
            torch.testing.assert_close(logits(tiny, tiny_ids), formula_logits(plain, tiny_ids, plan.top(k), alpha))


@pytest.mark.parametrize("mode", ["auto", *PATHS])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_two_sites_at_one_projection_stay_right_while_alpha_changes(tiny, tiny_ids, operation, mode):
    """ffn and neuron are both sides of the down projection: folds meet in its weight, and only one can be fused."""
    if mode == "fold" and operation != "scale":
        pytest.skip("only scale folds where there is no bias")
    a, b = (random_plan(tiny, site, 60, operation, seed=i) for i, site in enumerate(("ffn", "neuron")))
    plain, before = copy.deepcopy(tiny), snapshot(tiny)
    with austeer.steer(tiny, a + b, 1.0, mode=mode) as steering:
        for alpha in ({"ffn": 0.5, "neuron": -0.7}, {"ffn": -1.5, "neuron": 0.4}, {"ffn": 0.0, "neuron": 2.0}):
            steering.alpha = alpha
            handles = formula(plain, a, alpha["ffn"]) + formula(plain, b, alpha["neuron"])
            expected = logits(plain, tiny_ids)
            for handle in handles:
                handle.remove()
            torch.testing.assert_close(logits(tiny, tiny_ids), expected)
    assert_unchanged(tiny, before)


def test_alpha_zero_changes_nothing(tiny, tiny_ids):
    before = logits(tiny, tiny_ids)
    for mode in PATHS:
        with austeer.steer(tiny, random_plan(tiny, "attention", 8), 0.0, mode=mode):
            torch.testing.assert_close(logits(tiny, tiny_ids), before)


def test_generation_with_a_cache_equals_generation_without(demo, measured, ids):
    model = demo[0]
    plan = measured.select("attention", k=50, operation="push")
    options = {"max_new_tokens": 8, "do_sample": False}
    with austeer.steer(model, plan, 2.0):
        cached = model.generate(**ids, **options)
        uncached = model.generate(**ids, **options, use_cache=False)
    assert torch.equal(cached, uncached)
    assert not torch.equal(cached, model.generate(**ids, **options))


# --- restoration ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", PATHS)
def test_leaving_restores_the_model_bit_for_bit(demo, measured, ids, mode):
    model = demo[0]
    before, plain = snapshot(model), logits(model, ids)
    plan = measured.select("ffn", k=80) + measured.select("attention", k=80)
    with austeer.steer(model, plan, 3.7, mode=mode) as steering:
        assert not torch.equal(logits(model, ids), plain)
        steering.alpha = -1.3
        steering.k = 31
    assert_unchanged(model, before)
    assert torch.equal(logits(model, ids), plain)


@pytest.mark.parametrize("mode", PATHS)
def test_an_exception_inside_restores_too(tiny, mode):
    before = snapshot(tiny)
    with pytest.raises(KeyError, match="mine"), austeer.steer(tiny, random_plan(tiny, "attention", 8), 9.0, mode=mode):
        raise KeyError("mine")
    assert_unchanged(tiny, before)
    assert not is_steered(tiny)


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("broken", [1, 3])
def test_an_attach_that_is_broken_off_takes_back_what_it_did(tiny, monkeypatch, broken, error):
    """Also what the path at which it broke off had already written."""
    before, calls, attach = snapshot(tiny), [], paths.Fold.attach

    def fails(path):
        attach(path)
        calls.append(path)
        if len(calls) == broken:
            raise error

    monkeypatch.setattr(paths.Fold, "attach", fails)
    with pytest.raises(error):
        austeer.steer(tiny, random_plan(tiny, "ffn", 30), 2.0, mode="fold").attach()
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


def test_a_model_cast_inside_is_restored_in_its_new_dtype(tiny):
    expected = copy.deepcopy(tiny).to(torch.bfloat16)
    with austeer.steer(tiny, random_plan(tiny, ("ffn", "attention"), 30), 3.0, mode="fold"):
        tiny.to(torch.bfloat16)
    assert_unchanged(tiny, snapshot(expected))


def test_hooks_that_someone_else_removed_do_not_keep_the_others_on(tiny, tiny_ids):
    plain = logits(tiny, tiny_ids)
    plan = random_plan(tiny, "ffn", 40)
    with austeer.steer(tiny, plan, 3.0, mode="columns"):
        logits(tiny, tiny_ids)
        remove_hook_from_module(tiny.model.layers[1].mlp)
    assert torch.equal(logits(tiny, tiny_ids), plain)
    assert not any(hasattr(module, "_hf_hook") for module in tiny.modules())


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


def test_a_weight_made_anew_at_each_forward_is_not_folded(tiny, tiny_ids):
    for layer in tiny.model.layers:
        prune.l1_unstructured(layer.mlp.down_proj, "weight", 0.3)
    plan = random_plan(tiny, "ffn", 30)
    expected = formula_logits(tiny, tiny_ids, plan, 3.0)
    with austeer.steer(tiny, plan, 3.0) as steering:
        torch.testing.assert_close(logits(tiny, tiny_ids), expected)
        assert {row.path for row in steering.report()} == {"columns"}
        assert "made anew" in str(steering.report())


def test_the_default_dtype_does_not_matter(tiny, tiny_ids):
    plan = random_plan(tiny, "ffn", 30)
    expected = formula_logits(tiny, tiny_ids, plan, 3.0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        for mode in PATHS:
            with austeer.steer(tiny, plan, 3.0, mode=mode):
                torch.testing.assert_close(logits(tiny, tiny_ids), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_made_in_inference_mode_and_used_outside(tiny, tiny_ids):
    plan = random_plan(tiny, "ffn", 30)
    with torch.inference_mode():
        steering = austeer.steer(tiny, plan, 1.0, mode="columns")
    expected = formula_logits(tiny, tiny_ids, plan, -2.0)
    with steering:
        steering.alpha = -2.0
        torch.testing.assert_close(logits(tiny, tiny_ids), expected)


@pytest.mark.parametrize("mode", ["auto", "columns"])
def test_a_peft_model_is_steered_inside_its_wrapper(tiny, tiny_ids, mode):
    torch.manual_seed(1)
    config = peft.LoraConfig(target_modules=["o_proj"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(tiny), config).eval()
    plan = random_plan(model, ("attention", "ffn"), 20)
    expected = formula_logits(model.get_base_model(), tiny_ids, plan, 2.0)
    with austeer.steer(model, plan, 2.0, mode=mode) as steering:
        torch.testing.assert_close(logits(model, tiny_ids), expected)
        taken = {row.site: row.path for row in steering.report()}
    assert taken["attention"] == "columns"  # the adapter's layer is no plain linear layer
    assert taken["ffn"] == ("fold" if mode == "auto" else "columns")


def test_a_forgotten_steering_does_not_keep_the_model_alive(tiny):
    model = copy.deepcopy(tiny)
    austeer.steer(model, random_plan(model, "ffn", 5), 1.0, mode="columns").attach()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("mode", ["fused", "columns", "dense"])
def test_a_hook_that_was_there_stays_and_one_added_later_too(tiny, tiny_ids, mode):
    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    plan = random_plan(tiny, "attention", 30)
    module = tiny.model.layers[int(plan.layer[0])].self_attn.o_proj
    before, earlier, later = logits(tiny, tiny_ids), Counting(), Counting()
    model = copy.deepcopy(tiny)
    module = model.model.layers[int(plan.layer[0])].self_attn.o_proj
    add_hook_to_module(module, earlier)
    steering = austeer.steer(model, plan, 2.0, mode=mode).attach()
    add_hook_to_module(module, later, append=True)
    torch.testing.assert_close(logits(model, tiny_ids), formula_logits(tiny, tiny_ids, plan, 2.0))
    steering.detach()
    assert torch.equal(logits(model, tiny_ids), before)
    assert (earlier.calls, later.calls) == (2, 2)


# --- ways a model is run ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offload", ["cpu", "disk"])
@pytest.mark.parametrize("mode", ["auto", "fused", "columns", "dense"])
def test_offloaded_weights(tiny, tiny_ids, tmp_path, mode, offload):
    plan = random_plan(tiny, ("attention", "ffn"), 10)
    plain, expected = logits(tiny, tiny_ids), formula_logits(tiny, tiny_ids, plan, 2.0)
    model = copy.deepcopy(tiny)
    if offload == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    with austeer.steer(model, plan, 2.0, mode=mode) as steering:
        torch.testing.assert_close(logits(model, tiny_ids), expected)
        if mode == "auto":
            assert {row.path for row in steering.report()} == {"columns"}
            assert "offloaded" in steering.report()[0].reason
    assert torch.equal(logits(model, tiny_ids), plain)
    assert all(p.device.type == "meta" for p in model.model.layers.parameters())


@pytest.mark.parametrize("mode", ["fold", "fused", "columns", "dense"])
@pytest.mark.parametrize("site", ["attention", "ffn"])
def test_compiled_whole_without_recompiling(tiny, tiny_ids, site, mode):
    torch._dynamo.reset()
    model = copy.deepcopy(tiny)
    plan = random_plan(model, site, 12)
    recompiling_is_an_error = torch._dynamo.config.patch(error_on_recompile=True)
    with recompiling_is_an_error, austeer.steer(model, plan, 2.0, mode=mode) as steering, torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for alpha, k in ((2.0, 12), (-1.0, 12), (5.0, 3)):
            steering.alpha, steering.k = alpha, k
            got = compiled(**tiny_ids, use_cache=False).logits
            torch.testing.assert_close(got, formula_logits(tiny, tiny_ids, plan.top(k), alpha))
        if mode != "fold":
            assert all(row.compiled for row in steering.report())


@pytest.mark.parametrize("mode", ["fused", "columns", "dense"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_gradients_are_those_of_the_formula(tiny, tiny_ids, mode, operation):
    model = copy.deepcopy(tiny)
    plan = random_plan(model, "ffn", 15, operation)

    def gradients(run):
        model.zero_grad()
        run().logits.square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    handles = formula(model, plan, 1.5)
    expected = gradients(lambda: model(**tiny_ids))
    for handle in handles:
        handle.remove()
    with austeer.steer(model, plan, 1.5, mode=mode):
        got = gradients(lambda: model(**tiny_ids))
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, msg=name)


def test_a_shared_weight_is_never_folded(tiny, tiny_ids):
    model = copy.deepcopy(tiny)
    layers = model.model.layers
    layers[1].mlp.down_proj.weight = layers[0].mlp.down_proj.weight
    plan = random_plan(model, "ffn", 40)
    assert {0, 1} <= set(plan.layer.tolist())
    expected = formula_logits(model, tiny_ids, plan, 2.0)
    with austeer.steer(model, plan, 2.0) as steering:
        torch.testing.assert_close(logits(model, tiny_ids), expected)
        paths = {row.layer: row.path for row in steering.report()}
    assert paths[0] == paths[1] == "columns" and paths[2] == "fold"
    with pytest.raises(austeer.SteeringError, match="shared"):
        austeer.steer(model, plan, 2.0, mode="fold")


def test_layers_without_aus_are_left_alone(tiny):
    plan = random_plan(tiny, "ffn", 6)
    chosen = int(plan.layer[0])
    only = plan.take((plan.layer == chosen).nonzero().flatten())
    with pytest.warns(austeer.SteeringWarning), austeer.steer(tiny, only, 1.0, mode="columns"):
        hooked = [name for name, module in tiny.named_modules() if hasattr(module, "_hf_hook")]
    assert hooked == [f"model.layers.{chosen}.mlp"]


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


# --- report and warnings ----------------------------------------------------------------------------------------------


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
    assert "ran 3 times" in str(report) and "in the weights" in str(report)


def test_a_site_that_never_ran_is_a_warning(tiny, tiny_ids):
    plan = random_plan(tiny, "attention", 5)
    with (
        pytest.warns(austeer.SteeringWarning, match="never ran.*attention"),
        austeer.steer(tiny, plan, 1.0, mode="columns"),
    ):
        pass
    with warnings.catch_warnings(), austeer.steer(tiny, plan, 1.0, mode="columns"):
        warnings.simplefilter("error")
        logits(tiny, tiny_ids)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_steering_twice_is_refused_also_through_the_headless_model(tiny):
    plan = random_plan(tiny, "ffn", 5)
    before = snapshot(tiny)
    with austeer.steer(tiny, plan, 1.0):
        assert is_steered(tiny) and is_steered(tiny.model)
        for model in (tiny, tiny.model):
            with pytest.raises(austeer.SteeringError, match="steered already"):
                austeer.steer(model, plan, 1.0).attach()
    assert_unchanged(tiny, before)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"alpha": float("nan")}, austeer.SteeringError, "alpha: found nan"),
        ({"alpha": float("inf")}, austeer.SteeringError, "alpha: found inf"),
        ({"alpha": "15"}, austeer.SteeringError, "alpha: found '15'"),
        ({"alpha": 1e39}, austeer.SteeringError, r"alpha: found 1e\+39.*finite float32"),
        ({"alpha": 10**400}, austeer.SteeringError, "alpha: found 1000"),
        ({"alpha": {"attention": 1.0}}, austeer.SteeringError, "alpha: found sites"),
        ({"k": 0}, austeer.PlanError, "k: found 0"),
        ({"k": 6}, austeer.PlanError, "k: found 6, expected an integer from 1 to 5"),
        ({"mode": "quick"}, austeer.SteeringError, "mode: found 'quick'"),
    ],
)
def test_bad_arguments_name_what_was_found(tiny, arguments, error, message):
    before = snapshot(tiny)
    with pytest.raises(error, match=message):
        austeer.steer(tiny, random_plan(tiny, "ffn", 5), **arguments)
    assert_unchanged(tiny, before)


def test_bad_live_values_leave_the_strength_as_it_was(tiny, tiny_ids):
    with austeer.steer(tiny, random_plan(tiny, "ffn", 5), 2.0) as steering:
        before = logits(tiny, tiny_ids)
        with pytest.raises(austeer.SteeringError):
            steering.alpha = float("nan")
        with pytest.raises(austeer.PlanError):
            steering.k = 0
        assert (steering.alpha, steering.k) == (2.0, 5)
        assert torch.equal(logits(tiny, tiny_ids), before)


def test_a_plan_for_another_model_is_refused_before_anything_is_touched(demo, tiny):
    before = snapshot(tiny)
    with pytest.raises(austeer.PlanError, match=r"made for .*30 layers.*the model is .*3 layers"):
        austeer.steer(tiny, random_plan(demo[0], "attention", 5), 1.0)
    assert_unchanged(tiny, before)


def test_what_is_no_plan_or_no_model_is_refused(tiny):
    with pytest.raises(austeer.PlanError, match="found dict"):
        austeer.steer(tiny, {}, 1.0)
    with pytest.raises(austeer.SiteError, match="found no config"):
        austeer.steer(nn.Linear(2, 2), random_plan(tiny, "ffn", 5), 1.0)
