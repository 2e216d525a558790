"""A compiled model is steered however and whenever it was compiled, and changes of strength never compile again."""

import copy
import sys

import pytest
import torch
import torch._inductor.config
from accelerate.utils import compile_regions
from torch._dynamo.utils import counters

import austeer
from dense_formula import SITES, formula_logits, keep_layers, random_plan
from tiny_models import ids_of_rows, tiny_model

IDS = ids_of_rows() | {"use_cache": False}


def compiled(function, **options):
    return torch.compile(function, backend="eager", **options)


def whole(model):
    wrapper = compiled(model)
    return lambda: wrapper(**IDS)


def in_place(model):
    model.compile(backend="eager")
    return lambda: model(**IDS)


def each_layer(model):
    for layer in model.model.layers:
        layer.compile(backend="eager")
    return lambda: model(**IDS)


def each_projection(model):
    for layer in model.model.layers:
        layer.self_attn.o_proj.compile(backend="eager")
        layer.mlp.down_proj.compile(backend="eager")
    return lambda: model(**IDS)


def layers_replaced(model):
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = compiled(layer)
    return lambda: model(**IDS)


def regions(model):
    other = compile_regions(model, backend="eager")
    return lambda: other(**IDS)


def forward_replaced(model):
    model.forward = compiled(model.forward)
    return lambda: model(**IDS)


def closure(model):
    function = compiled(lambda inputs: model(**inputs))
    return lambda: function(IDS)


WAYS = [whole, in_place, each_layer, each_projection, layers_replaced, regions, forward_replaced, closure]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    sys.modules.pop("torch._inductor.freezing", None)  # which says that something was frozen


def graphs():
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("way", "mode"),
    [(way, "columns") for way in WAYS]
    + [(way, "fold") for way in (whole, each_layer, layers_replaced)]
    + [(whole, "fused")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_steering_after_the_model_was_compiled_and_had_run(way, mode):
    """On entering, at a change of strength, on leaving, and (the whole model) in a second block with another plan."""
    model = tiny_model(num_hidden_layers=1)
    plain = copy.deepcopy(model)
    sites = SITES if mode == "columns" else ("attention", "ffn", "neuron")
    with torch.no_grad():
        run = way(model)
        before = plain(**IDS).logits
        for _ in range(2):
            torch.testing.assert_close(run().logits, before)
        for seed in (0, 1) if way is whole else (0,):
            plan = random_plan(plain, sites, 12, seed=seed)
            with austeer.steer(model, plan, 0.5, mode=mode) as steering:
                expected = formula_logits(plain, IDS, plan, 0.5)
                torch.testing.assert_close(run().logits, expected, rtol=1e-4, atol=1e-4)
                made = graphs()
                for alpha, k in ((-0.7, 9), (0.9, 3)):
                    steering.alpha, steering.k = alpha, k
                    expected = formula_logits(plain, IDS, plan.top(k), alpha)
                    torch.testing.assert_close(run().logits, expected, rtol=1e-4, atol=1e-4)
                assert graphs() == made
                assert mode == "fold" or all(row.compiled or row.calls for row in steering.report())
            torch.testing.assert_close(run().logits, before)


def test_a_fold_compiles_nothing_again():
    model = tiny_model(num_hidden_layers=1)
    run = whole(model)
    with torch.no_grad():
        run()
        made = graphs()
        for seed in range(4):
            with austeer.steer(model, random_plan(model, "ffn", 9, seed=seed), 0.5):
                run()
            run()
        assert graphs() == made


def test_no_fold_where_the_compiler_copies_weights_into_its_code():
    """A fold after such a compilation would be without effect."""
    model = tiny_model(num_hidden_layers=1)
    plan = random_plan(model, "ffn", 9)
    with torch._inductor.config.patch(freezing=True):
        with austeer.steer(model, plan, 0.5) as steering:
            run = whole(model)
            run()
            assert {row.path for row in steering.report()} == {"columns"}
            assert "freezing" in steering.report()[0].reason
        with pytest.raises(austeer.SteeringError, match=r"fold.*freezing"):
            austeer.steer(model, plan, 0.5, mode="fold")


@torch.no_grad()
def freeze(model):
    """Compiles a block to code that has a copy of its weights."""
    torch.compiler.reset()
    model.model.layers[0].mlp.compile()
    with torch._inductor.config.patch(freezing=True):
        model(**IDS)


@torch.no_grad()
def test_no_fold_after_weights_were_copied_into_compiled_code():
    model = tiny_model(num_hidden_layers=1)
    plan = random_plan(model, "ffn", 9)
    expected = formula_logits(copy.deepcopy(model), IDS, plan, 0.5)
    freeze(model)
    with austeer.steer(model, plan, 0.5) as steering:
        torch.testing.assert_close(model(**IDS).logits, expected, rtol=1e-4, atol=1e-4)
        assert {row.path for row in steering.report()} == {"columns"}
        assert "freezing" in steering.report()[0].reason


def test_weights_that_are_copied_into_compiled_code_inside_the_block_are_warned_of():
    model = tiny_model(num_hidden_layers=1)
    steering = austeer.steer(model, random_plan(model, "ffn", 9), 0.5, mode="fold")
    with pytest.warns(austeer.SteeringWarning, match=r"freezing.*since steering began") as found, steering:
        freeze(model)
        steering.alpha = 1.0
    assert (
        len([w for w in found if w.category is austeer.SteeringWarning]) == 2
    )  # with the new strength, and on leaving


@pytest.mark.parametrize("mode", ["fold", "columns"])
def test_a_twin_that_was_compiled_before_lends_no_graph(mode):
    """PyTorch's own hooks are lost here: the copy would run in the graph of its unhooked twin."""
    model = tiny_model(num_hidden_layers=1)
    twin, plain = copy.deepcopy(model), copy.deepcopy(model)
    plan = random_plan(model, ("attention", "ffn"), 12)
    with torch.no_grad():
        first = compiled(twin)
        before = first(**IDS).logits
        with austeer.steer(model, plan, 0.5, mode=mode):
            second = compiled(model)
            torch.testing.assert_close(second(**IDS).logits, formula_logits(plain, IDS, plan, 0.5))
            assert torch.equal(first(**IDS).logits, before)


@pytest.mark.parametrize("mode", ["fold", "columns"])
def test_more_steered_layers_than_the_compiler_keeps_graphs_for(mode):
    """Layers compiled one by one and steered alike share a graph; beyond the limit others run uncompiled, right."""
    model = tiny_model(num_hidden_layers=4)
    plan = keep_layers(random_plan(model, "attention", 60), (0, 2)) + keep_layers(random_plan(model, "ffn", 60), (1, 2))
    plain = copy.deepcopy(model)
    run = each_layer(model)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=2):
        run()
        with austeer.steer(model, plan, 0.3, mode=mode) as steering:
            expected = formula_logits(plain, IDS, plan, 0.3)
            torch.testing.assert_close(run().logits, expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(run().logits, expected, rtol=1e-4, atol=1e-4)
            uncompiled = [row for row in steering.report() if row.calls]
        assert bool(uncompiled) == (mode == "columns")


@pytest.mark.parametrize("mode", ["columns", "fused"])
def test_layers_and_blocks_that_are_steered_alike_share_a_graph(mode):
    model = tiny_model(num_hidden_layers=4)
    plain, run = copy.deepcopy(model), each_layer(model)
    with torch.no_grad():
        run()
        for seed, count in ((0, 60), (1, 60), (2, 50)):
            plan = random_plan(model, ("attention", "ffn"), count, seed=seed)
            with austeer.steer(model, plan, 0.3, mode=mode):
                expected = formula_logits(plain, IDS, plan, 0.3)
                torch.testing.assert_close(run().logits, expected, rtol=1e-4, atol=1e-4)
        assert graphs() == 2


def test_generation_compiles_no_more_graphs_than_without_steering():
    """Prefill and decoding differ in shape; the strengths do not."""
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}

    def generated(model):
        model.compile(backend="eager")
        return model.generate(IDS["input_ids"], **options)

    generated(tiny_model(num_hidden_layers=1))
    without = graphs()
    torch._dynamo.reset()
    counters.clear()
    model = tiny_model(num_hidden_layers=1)
    plan, plain = random_plan(model, ("attention", "ffn"), 12), copy.deepcopy(model)
    with austeer.steer(model, plan, 0.5, mode="columns") as steering:
        steered = generated(model)
        assert graphs() == without
        steering.alpha = 0.1
        generated(model)
        assert graphs() == without
    with austeer.steer(plain, plan, 0.5, mode="columns"):
        assert torch.equal(steered, plain.generate(IDS["input_ids"], **options))


@pytest.mark.parametrize("mode", ["columns", "fused"])
def test_a_pass_in_eager_mode_in_between_compiles_nothing(mode):
    """It is counted, compared with the formula, and its short way is remembered: of none of that is a graph told."""
    model = tiny_model(num_hidden_layers=1)
    plan, run = random_plan(model, "ffn", 12), whole(model)
    with torch.no_grad(), austeer.steer(model, plan, 0.5, mode=mode):
        expected, made = run().logits, graphs()
        for _ in range(2):
            torch.testing.assert_close(model(**IDS).logits, expected)
            torch.testing.assert_close(run().logits, expected)
        assert graphs() == made


def test_export_of_a_module_that_had_run_leaves_no_symbol_behind():
    model = tiny_model(num_hidden_layers=1)
    plan, mlp = random_plan(model, "ffn", 12), model.model.layers[0].mlp
    with torch.no_grad(), austeer.steer(model, plan, 0.5, mode="columns") as steering:
        model(**IDS)
        (before,) = (row.tokens for row in steering.report())
        tokens = {1: torch.export.Dim("tokens", min=2, max=64)}
        program = torch.export.export(
            torch.nn.Sequential(mlp), (torch.randn(2, 7, 32),), dynamic_shapes=(tokens,), strict=False
        )
        assert [row.tokens for row in steering.report()] == [before]
        x = torch.randn(2, 9, 32)
        torch.testing.assert_close(program.module()(x), mlp(x))


def test_gradients_through_a_compiled_steered_model():
    model = tiny_model(num_hidden_layers=1)
    plan, plain = random_plan(model, SITES, 12), copy.deepcopy(model)

    def gradients(model, run):
        run(**IDS).logits.square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters()}

    with austeer.steer(plain, plan, 0.5, mode="columns"):
        expected = gradients(plain, plain)
    with austeer.steer(model, plan, 0.5, mode="columns"):
        got = gradients(model, torch.compile(model, backend="aot_eager"))
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_one_graph_for_the_whole_model_and_its_code():
    """fullgraph, by Inductor: what runs is compiled C++."""
    model = tiny_model(num_hidden_layers=1)
    plan, plain = random_plan(model, SITES, 12), copy.deepcopy(model)
    with torch.no_grad(), austeer.steer(model, plan, 0.5, mode="columns", check=False) as steering:
        run = torch.compile(model, fullgraph=True)
        for alpha in (0.5, -0.3):
            steering.alpha = alpha
            expected = formula_logits(plain, IDS, plan, alpha)
            torch.testing.assert_close(run(**IDS).logits, expected, rtol=1e-4, atol=1e-4)
        assert all(row.compiled and not row.calls for row in steering.report())
    assert graphs() == 1
