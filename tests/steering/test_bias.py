"""A shift in a bias: exact at every site, in every kind of model that it is for, and gone without a trace."""

import contextlib
import copy
import io
import warnings

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

import austeer
from austeer.models.sites import find_sites
from dense_formula import SITES, formula_at, formula_logits, logits, modules_of, shift_plan
from tiny_models import ids_of_rows, tiny_model

IDS = ids_of_rows() | {"use_cache": False}
KINDS = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"mlp_bias": True, "attention_bias": True}),
    "gpt2": ("gpt2", {}),
    "opt": ("opt", {}),
    "granite": ("granite", {"residual_multiplier": 0.25}),
    "falcon": ("falcon", {}),
}


def trace(model):
    return modules_of(model), list(model.state_dict())


def tensors(model):
    return {name: t.clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def took(steering):
    return {row.path for row in steering.report()}


def at_each(model, plan, alphas):
    """The formula with a strength for each site."""
    with contextlib.ExitStack() as stack:
        for site, alpha in alphas.items():
            part = plan.take(torch.tensor([i for i, name in enumerate(plan.site) if name == site]))
            stack.enter_context(formula_at(model, part, alpha))
        return logits(model, IDS)


# --- every site ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("kind", KINDS)
def test_each_site_follows_alpha_and_k_and_is_restored(kind, site):
    family, changes = KINDS[kind]
    model = tiny_model(family, **changes)
    plan, plain, before, values = shift_plan(model, site), tiny_model(family, **changes), trace(model), tensors(model)
    unsteered = logits(model, IDS)
    with austeer.steer(model, plan, 1.5, mode="bias") as steering:
        for alpha, k in ((1.5, 25), (-2.0, 25), (0.0, 25), (0.7, 9), (0.7, 1), (40.0, 25), (1.5, 24)):
            steering.alpha, steering.k = alpha, k
            expected = formula_logits(plain, IDS, plan.top(k), alpha)
            torch.testing.assert_close(logits(model, IDS), expected, rtol=1e-4, atol=1e-4)
            assert alpha == 0 or not torch.equal(expected, unsteered)
        assert model.state_dict().keys() == plain.state_dict().keys()
        assert took(steering) == {"bias"}
    assert trace(model) == before and same(tensors(model), values)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "llama with biases", "gpt2", "granite"])
def test_several_contributions_in_one_module_in_every_dtype(kind, dtype):
    """ffn, neuron and layer are one bias; each site has its own strength, and is rounded with the others, once."""
    family, changes = KINDS[kind]
    model = tiny_model(family, **changes).to(dtype)
    wide, plan = copy.deepcopy(model).double(), shift_plan(model)
    before, values = trace(model), tensors(model)
    with austeer.steer(model, plan, 0.5) as steering:
        for alphas in (dict.fromkeys(SITES, 0.5), {"ffn": 1, "neuron": -0.5, "layer": 0.0, "attention": 2.0}):
            steering.alpha = alphas
            exact = at_each(wide, plan, alphas)
            restored = copy.deepcopy(wide).to(dtype)
            own_error = (at_each(restored, plan, alphas).double() - exact).norm()
            error = (logits(model, IDS).double() - exact).norm()
            assert error <= 2 * own_error + 4 * torch.finfo(dtype).eps * exact.norm()
        assert took(steering) == {"bias"} and {row.reason for row in steering.report()} == {""}
    assert trace(model) == before and same(tensors(model), values)


def test_strengths_are_float32_also_in_float64():
    """As on every other path."""
    model, found = tiny_model().double(), []
    plan = shift_plan(model)
    for mode in ("bias", "columns"):
        with austeer.steer(model, plan, 0.3, mode=mode):
            found.append(logits(model, IDS))
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bias_is_the_sum_rounded_once(dtype):
    model = tiny_model("granite", residual_multiplier=0.3, mlp_bias=True).to(dtype)
    plan = shift_plan(model, ("ffn", "neuron", "layer"), 40)
    down = model.model.layers[1].mlp.down_proj
    total = down.bias.detach().double()

    def of(site):
        chosen = torch.tensor([s == site and layer == 1 for s, layer in zip(plan.site, plan.layer.tolist())])
        return (
            torch.zeros(48 if site == "neuron" else 32)
            .double()
            .index_put((plan.index[chosen].long(),), 1.5 * plan.delta[chosen].double())
        )

    expected = total + of("ffn") + of("layer") / 0.3 + down.weight.double() @ of("neuron")
    with austeer.steer(model, plan, 1.5):
        rounding = torch.finfo(dtype).eps / 2 * expected.abs()
        assert ((down.bias.double() - expected).abs() <= 1.001 * rounding + 3e-7).all()  # strengths are float32


def test_a_layer_without_aus_in_the_first_k():
    """It has a bias of zeros, and gives what it gave."""
    model = tiny_model()
    plan = shift_plan(model, "ffn", 30)
    first = int(plan.layer[0])
    with austeer.steer(model, plan, 1.0, k=1, mode="bias") as steering:
        assert [bool(module.bias.any()) for module in [layer.mlp.down_proj for layer in model.model.layers]] == [
            i == first for i in range(3)
        ]
        torch.testing.assert_close(logits(model, IDS), formula_logits(tiny_model(), IDS, plan.top(1), 1.0))
        assert {row.layer for row in steering.report()} == set(plan.layer.tolist())


def test_only_layers_that_have_aus_get_a_bias():
    model = tiny_model()
    plan = shift_plan(model)
    plan = plan.take((plan.layer == 1).nonzero().flatten())
    sites = find_sites(model)
    with austeer.steer(model, plan, 1.0):
        assert [module.bias is not None for module in [layer.mlp.down_proj for layer in model.model.layers]] == [
            False,
            True,
            False,
        ]
        assert [site.layer for site in sites["attention"] if model.get_submodule(site.path).bias is not None] == [1]


def test_a_second_block_finds_the_bias_where_it_was():
    model = tiny_model()
    down = [layer.mlp.down_proj for layer in model.model.layers]
    addresses = []
    for sites, seed in ((SITES, 0), (SITES, 0), ("ffn", 1), ("neuron", 2)):
        with austeer.steer(model, shift_plan(model, sites, 40, seed), 1.0) as steering:
            for steering.alpha in (1.0, 0.0, -1.0):
                addresses.append([module.bias.data_ptr() for module in down])
        assert all(module.bias is None for module in down)
    assert addresses[0] == addresses[-1] and len(set(map(tuple, addresses))) == 1


@pytest.mark.parametrize("kind", ["llama", "llama with biases"])
def test_what_is_saved_inside_the_block(kind, tmp_path):
    """Our own biases are in no checkpoint; one that the model has is saved as it is, as under fold."""
    model = tiny_model(KINDS[kind][0], **KINDS[kind][1])
    plan, before = shift_plan(model, ("ffn", "attention")), logits(model, IDS)
    keys = list(model.state_dict())
    with austeer.steer(model, plan, 1.0):
        steered = logits(model, IDS)
        assert list(model.state_dict()) == keys
        model.save_pretrained(tmp_path)
        other = tiny_model(KINDS[kind][0], **KINDS[kind][1])
        other.load_state_dict(model.state_dict())  # strict
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        whole = torch.load(buffer, weights_only=False)
    saved = before if kind == "llama" else steered
    for twin in (AutoModelForCausalLM.from_pretrained(tmp_path), other):
        torch.testing.assert_close(logits(twin, IDS), saved)
    torch.testing.assert_close(logits(whole, IDS), steered)  # a copy of a steered model is one
    with pytest.raises(austeer.SteeringError, match="copied"):
        austeer.steer(whole, plan, 1.0).attach()


# --- compiled --------------------------------------------------------------------------------------------------------


@pytest.fixture
def graphs():
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("first", ["unsteered", "steered"])
def test_one_graph_on_entering_and_no_more(graphs, backend, first, biased):
    """None for alpha, k, leaving, a second block or a plan of other AUs; none at all where the layers have biases."""
    changes = {"num_hidden_layers": 2, "mlp_bias": biased, "attention_bias": biased}
    model, plain = tiny_model("llama", **changes), tiny_model("llama", **changes)
    run = torch.compile(model, backend=backend, fullgraph=True)
    unsteered = logits(plain, IDS)
    with torch.no_grad():
        if first == "unsteered":
            torch.testing.assert_close(run(**IDS).logits, unsteered)
            assert graphs() == 1
        expected = graphs() + (0 if biased and graphs() else 1)
        for sites, seed in ((SITES, 0), (SITES, 1), (("neuron", "attention"), 2)):
            plan = shift_plan(plain, sites, 60, seed)
            with austeer.steer(model, plan, 0.5) as steering:
                for alpha, k in ((0.5, len(plan)), (-0.7, 30), (0.0, 3), (0.9, len(plan))):
                    steering.alpha, steering.k = alpha, k
                    wanted = formula_logits(plain, IDS, plan.top(k), alpha)
                    torch.testing.assert_close(run(**IDS).logits, wanted, rtol=1e-4, atol=1e-4)
                assert graphs() == expected and took(steering) == {"bias"}
            if first == "steered" and not biased:
                expected = 2  # the one without, once
            torch.testing.assert_close(run(**IDS).logits, unsteered)
            assert graphs() == expected


# --- trained ---------------------------------------------------------------------------------------------------------


def gradients(model):
    model.zero_grad()
    x = model.get_input_embeddings()(IDS["input_ids"]).detach().requires_grad_()
    model(inputs_embeds=x, use_cache=False).logits.square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"input": x.grad}


@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_gradients_are_those_of_the_formula(biased, training, checkpointing):
    """In evaluation mode, of all but the weights that read a site; what is trained is steered at run time."""
    changes = {"mlp_bias": biased, "attention_bias": biased}
    model, plain = (tiny_model("llama", **changes).train(training) for _ in range(2))
    plan = shift_plan(model, SITES if training else ("ffn", "layer"))
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    with formula_at(plain, plan, 0.7):
        expected = gradients(plain)
    with austeer.steer(model, plan, 0.7) as steering:
        got = gradients(model)
        paths = {row.site: row.path for row in steering.report()}
        reasons = {row.site: row.reason for row in steering.report()}
    if training:
        assert set(paths.values()) == {"columns"} and all("training mode" in reason for reason in reasons.values())
    else:
        assert set(paths.values()) == {"bias"}
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_the_gradient_of_a_weight_that_reads_a_shift_is_warned_of():
    """It lacks the shift's part; all others are right, and where the weight needs none there is nothing to say."""
    model, plain = tiny_model(), tiny_model()
    plan = shift_plan(model, ("attention", "neuron"))
    with formula_at(plain, plan, 0.7):
        expected = gradients(plain)
    with austeer.steer(model, plan, 0.7) as steering:
        assert took(steering) == {"bias"}
        with pytest.warns(austeer.SteeringWarning, match=r"down_proj.weight.*mode='columns'"):
            got = gradients(model)
    wrong = {name for name in got if not torch.allclose(got[name], expected[name], rtol=1e-3, atol=1e-6)}
    assert len(wrong) == 6 and all(name.endswith(("o_proj.weight", "down_proj.weight")) for name in wrong)
    with warnings.catch_warnings(action="error"), austeer.steer(model.requires_grad_(False), plan, 0.7):
        torch.testing.assert_close(gradients(model)["input"], expected["input"], rtol=1e-3, atol=1e-6)


def test_alpha_may_change_between_forward_and_backward():
    model = tiny_model("gpt2")
    found = []
    with austeer.steer(model, shift_plan(model), 0.7) as steering:
        for change in (0.7, -5.0):
            model.zero_grad()
            steering.alpha = 0.7
            loss = model(**IDS).logits.square().mean()
            steering.alpha = change
            loss.backward()
            found.append(model.transformer.h[0].mlp.c_fc.weight.grad.clone())
    assert torch.equal(*found)
