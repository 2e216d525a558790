"""Each way of steering a site: exact, in every way that a model is run, and gone without a trace."""

import copy
import itertools
import math

import peft
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch.nn.utils import prune

import austeer
from austeer.models.sites import find_sites
from austeer.plans.fit import LayerUnits
from austeer.steering import columns, forms
from austeer.steering.forms import most_elements
from austeer.steering.path_choice import plan_paths
from austeer.steering.tables import StrengthTable
from dense_formula import (
    BY_UNIT,
    OPERATION,
    OPERATIONS,
    PATHS,
    POSSIBLE,
    SITES,
    assert_unchanged,
    at_units,
    formula_at,
    formula_logits,
    logits,
    random_plan,
    snapshot,
)


@pytest.fixture(scope="module")
def double(demo):
    return copy.deepcopy(demo[0]).double()


#: A pass of the real model is dear: there each site takes one operation.
ON_THE_REAL_MODEL = [("attention", "scale"), ("ffn", "push"), ("layer", "shift"), ("neuron", "ablate")]


@pytest.mark.parametrize(
    "site, operation, real_model",
    [
        *((*case, False) for case in itertools.product(SITES, OPERATIONS)),
        *((*case, True) for case in ON_THE_REAL_MODEL),
    ],
)
def test_each_path_equals_the_formula(request, tiny, ids, site, operation, real_model):
    """Within twice plain PyTorch's own float32 error against float64, and the effect is not lost in it."""
    if real_model:
        model, double = request.getfixturevalue("demo")[0], request.getfixturevalue("double")
        plan = request.getfixturevalue("measured").select(site, k=60, operation=operation)
    else:
        model, double = tiny, copy.deepcopy(tiny).double()
        plan = random_plan(tiny, site, 20, operation)
    alpha = 0.5 if site == "layer" else 2.0
    exact = formula_logits(double, ids, plan, alpha)
    real = ids["attention_mask"].bool()
    own_error = (formula_logits(model, ids, plan, alpha) - exact)[real].abs().max()
    effect = (exact - logits(double, ids))[real].abs().max()
    assert effect > 100 * own_error
    before = logits(model, ids)
    took = []
    for mode in PATHS:
        if (site == "layer" and mode in ("fold", "fused")) or operation not in POSSIBLE[mode]:
            with pytest.raises(austeer.SteeringError, match=rf"{mode}.*{site}"):
                austeer.steer(model, plan, alpha, mode=mode)
            continue
        with austeer.steer(model, plan, alpha, mode=mode) as steering:
            error = (logits(model, ids) - exact)[real].abs().max()
            assert {row.path for row in steering.report()} == {mode}
        assert error <= 2 * own_error, f"{mode}: errs by {error:.2e}, plain PyTorch by {own_error:.2e}"
        took.append(mode)
    assert "columns" in took
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("site", SITES)
def test_the_sparse_and_the_dense_form_of_columns_give_the_same(tiny, tiny_ids, site, operation, monkeypatch):
    """On a CPU the path takes whichever is cheaper; both must be right, whatever is chosen where."""
    plan, took, kernel = random_plan(tiny, site, 20, operation), [], columns.sparse
    monkeypatch.setattr(columns, "sparse", lambda *args: took.append(1) or kernel(*args))

    def run(most):
        took.clear()
        monkeypatch.setattr(columns, "most_elements", lambda *_: most)
        with austeer.steer(tiny, plan, 0.5, mode="columns"):
            return logits(tiny, tiny_ids)

    dense, before = run(math.inf), bool(took)
    sparse = run(0)
    assert took and not before
    assert not torch.equal(dense, logits(tiny, tiny_ids))
    torch.testing.assert_close(dense, sparse)


def test_the_dense_form_is_for_few_elements_or_many_columns():
    def cheaper(device, tokens, width, count):
        return tokens * width <= most_elements(device, count, width)

    assert cheaper("cpu", 1, 4096, 4) and cheaper("cpu", 512, 4096, 100) and cheaper("cpu", 512, 576, 100)
    assert not cheaper("cpu", 512, 4096, 4)
    assert cheaper("cuda", 512, 4096, 4) and cheaper("cuda", 4096, 4096, 410) and not cheaper("cuda", 4096, 4096, 100)
    assert cheaper("mps", 4096, 4096, 4), "there is no sparse kernel for it"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("operation", BY_UNIT)
def test_the_dense_form_rounds_once(operation, dtype):
    index, values = torch.randperm(64)[:40], torch.randn(40)
    table = StrengthTable(
        [LayerUnits(0, index, values.clamp(-1, 1), values, torch.arange(40), operation)], 1, 64, "cpu", dense=True
    )
    table.fill([(3.0, 40)])
    x = torch.randn(500, 64).to(dtype)
    exact = x.double() + table.dense_gamma * (x.abs() if operation == "push" else x).double() + table.dense_shift
    half_a_step = torch.finfo(dtype).eps / 2 * exact.abs() + torch.finfo(dtype).tiny
    for got in (forms.form_of(table)(x.clone(), *table.operands), forms.steered(x, table, table.operands)):
        assert got.dtype == dtype
        assert ((got.double() - exact).abs() <= 1.001 * half_a_step + 1e-6 * x.abs()).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("operations", [("scale",), ("push",), ("shift",), ("scale", "shift")])
def test_what_is_not_finite_in_an_unsteered_column_stays_as_it_is(operations, dtype):
    """0 * inf would be NaN, and so would an unsteered outlier that overflowed."""
    index, values = torch.arange(4), torch.tensor([0.5, -2.0, 3.0, 0.25])
    entries = [LayerUnits(i, index, values, values, index, name) for i, name in enumerate(operations)]
    table = StrengthTable(entries, len(entries), 9, torch.device("cpu"))
    table.fill([(1.0, 4)] * len(entries))
    x = torch.randn(3, 9).to(dtype)
    x[:, 5:8] = torch.tensor([torch.inf, -torch.inf, torch.nan]).to(dtype)
    for operands in [table.operands or table.spread(torch.tensor([0, 1, -1]))]:
        for got in (forms.form_of(table)(x.clone(), *operands), forms.steered(x, table, operands)):
            torch.testing.assert_close(got[:, 4:], x[:, 4:], rtol=0, atol=0, equal_nan=True)
            assert not torch.equal(got[:, :4], x[:, :4])


@pytest.mark.parametrize("mode", ["auto", *PATHS])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_two_sites_at_one_projection_stay_right_while_alpha_changes(tiny, tiny_ids, operation, mode):
    """ffn and neuron are both sides of the down projection: folds meet in its weight, and only one can be fused."""
    if mode != "auto" and operation not in POSSIBLE[mode]:
        pytest.skip("refused")
    a, b = (random_plan(tiny, site, 60, operation, seed=i) for i, site in enumerate(("ffn", "neuron")))
    plain, before = copy.deepcopy(tiny), snapshot(tiny)
    with austeer.steer(tiny, a + b, 1.0, mode=mode) as steering:
        for alpha in ({"ffn": 0.5, "neuron": -0.7}, {"ffn": -1.5, "neuron": 0.4}, {"ffn": 0.0, "neuron": 2.0}):
            steering.alpha = alpha
            with formula_at(plain, a, alpha["ffn"]), formula_at(plain, b, alpha["neuron"]):
                expected = logits(plain, tiny_ids)
            torch.testing.assert_close(logits(tiny, tiny_ids), expected)
    assert_unchanged(tiny, before)


@pytest.mark.parametrize("mode", ["fused", "columns", "dense"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_gradients_are_those_of_the_formula(tiny, tiny_ids, mode, operation):
    if operation not in POSSIBLE[mode]:
        pytest.skip("refused")
    model = copy.deepcopy(tiny)
    plan = random_plan(model, "ffn", 15, operation)

    def gradients(run):
        model.zero_grad()
        run().logits.square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    with formula_at(model, plan, 1.5):
        expected = gradients(lambda: model(**tiny_ids))
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
    plans = {operation: random_plan(tiny, "ffn", 30, operation) for operation in set(OPERATION.values())}
    expected = {operation: formula_logits(tiny, tiny_ids, plan, 3.0) for operation, plan in plans.items()}
    torch.set_default_dtype(torch.bfloat16)
    try:
        for mode in PATHS:
            with austeer.steer(tiny, plans[OPERATION[mode]], 3.0, mode=mode):
                torch.testing.assert_close(logits(tiny, tiny_ids), expected[OPERATION[mode]])
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


def test_layers_without_aus_are_left_alone(tiny):
    plan = random_plan(tiny, "ffn", 6)
    chosen = int(plan.layer[0])
    only = plan.take((plan.layer == chosen).nonzero().flatten())
    with pytest.warns(austeer.SteeringWarning), austeer.steer(tiny, only, 1.0, mode="columns"):
        patched = [name for name, module in tiny.named_modules() if "forward" in vars(module)]
    assert patched == [f"model.layers.{chosen}.mlp"]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_decoding_takes_the_short_way_and_stays_exact(tiny, monkeypatch, operation):
    """After a first call the short way runs; it follows alpha, and leaves to the general way what is not its own."""
    general, general_way = [], columns.Columns.apply
    monkeypatch.setattr(
        columns.Columns, "apply", lambda path, x, rows: general.append(x.shape) or general_way(path, x, rows)
    )
    monkeypatch.setattr(columns, "most_elements", lambda *_: 16384)
    module, plan = tiny.model.layers[0].mlp, random_plan(tiny, "ffn", 20, operation)
    found, _ = plan_paths(tiny, [plan], find_sites(tiny, ["ffn"]), "columns", "", False, None, False)
    path = next(p for p in found if p.module is module)
    x = torch.randn(1, 1, 32)
    with torch.no_grad():
        plain = module(x)
        path.attach()
        for alpha in (2.0, -1.0, 0.0, 2.0):
            path.table.fill([(alpha, 20)])
            torch.testing.assert_close(module(x), at_units(plain, plan, plan.layer == 0, alpha))
        assert general == [x.shape] and path.calls == 4 and path.tokens == 4
        many = torch.randn(1, 600, 32)  # more elements than the short way takes
        assert module(many).shape == many.shape == general[-1] and path.tokens == 604
        path.detach()
        with pytest.raises(austeer.SteeringError, match=r"'ffn'.*width 16.*32"):
            path.steer(torch.randn(1, 1, 16))
        wide = torch.randn(1, 1, 64)
        every_other, kept = wide[..., ::2], wide.clone()
        assert not every_other.is_contiguous()
        path.steer(every_other)
        assert torch.equal(wide, kept)
    if operation == "scale":
        assert path._short is not None and path._short.more == ()

        def out_of_memory(x):
            raise RuntimeError("out of memory")

        path._short.more = ((out_of_memory, ()),)
        with pytest.raises(RuntimeError, match="out of memory"):  # and not steered by the first operation twice
            path.steer(plain.clone())
        grown = plain.clone().requires_grad_()
        path.steer(grown * 1).sum().backward()
        assert torch.allclose(grown.grad[0, 0], 1 + path.table.expanded()[0][0])
