"""Where a shift is no bias, and the reason that is given."""

import types

import pytest
import torch
import torch._inductor.config
import torch.distributed as dist
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.nn.utils import parametrizations, prune
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import austeer
from dense_formula import assert_unchanged, formula_logits, logits, shift_plan, snapshot
from tiny_models import ids_of_rows, tiny_model

IDS = ids_of_rows()


def biased(**changes):
    return tiny_model("llama", mlp_bias=True, attention_bias=True, **changes)


def downs(model):
    return [layer.mlp.down_proj for layer in model.model.layers]


def run_and_report(model, plan, alpha=1.0):
    """The formula holds, and the model is what it was; which path each site took, and why not a bias."""
    before, expected = snapshot(model), formula_logits(model, IDS, plan, alpha)
    with austeer.steer(model, plan, alpha) as steering:
        torch.testing.assert_close(logits(model, IDS), expected, rtol=1e-4, atol=1e-4)
        report = steering.report()
    assert_unchanged(model, before)
    return {row.site: (row.path, row.reason) for row in report if row.layer == 1}


# --- what is no plain linear layer -----------------------------------------------------------------------------------


class Ignoring(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight)


class Layer(LlamaDecoderLayer):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs) * 0.5


class Double(ModelHook):
    def post_forward(self, module, output):
        return output * 2


def tie_biases(model):
    a, b = downs(model)[1:]
    b.bias = a.bias


def of_class(kind, where):
    def change(model):
        for layer in model.model.layers:
            module = layer.get_submodule(where) if where else layer
            module.__class__ = kind

    return change


def on_each(where, do):
    def change(model):
        for layer in model.model.layers:
            do(layer.get_submodule(where))

    return change


def doubled(self, x):
    return 2 * type(self).forward(self, x)


def parametrize(module):
    nn.utils.parametrize.register_parametrization(module, "bias", nn.Tanh())


#: Name -> what is done to a Llama with biases; site -> a part of the reason, None for what is a bias still.
CHANGES = {
    "a subclass": (of_class(Ignoring, "mlp.down_proj"), dict.fromkeys(("ffn", "neuron", "layer"), "Ignoring")),
    "a scripted layer": (
        on_each("mlp", lambda m: setattr(m, "down_proj", torch.jit.script(m.down_proj))),
        {"ffn": "TorchScript", "layer": "TorchScript", "attention": None},
    ),
    "a layer's class": (of_class(Layer, ""), {"layer": "not Transformers' own", "ffn": None, "neuron": None}),
    "a shared bias": (tie_biases, dict.fromkeys(("ffn", "neuron", "layer"), "bias is shared")),
    "a pruned weight": (
        on_each("mlp.down_proj", lambda m: prune.l1_unstructured(m, "weight", 0.3)),
        {"ffn": "hooks", "neuron": "made anew", "layer": "hooks", "attention": None},
    ),
    "a pruned bias": (
        on_each("mlp.down_proj", lambda m: prune.l1_unstructured(m, "bias", 0.3)),
        dict.fromkeys(("ffn", "neuron", "layer"), "the bias is made anew"),
    ),
    "weight norm": (
        on_each("mlp.down_proj", parametrizations.weight_norm),
        dict.fromkeys(("ffn", "neuron", "layer"), "ParametrizedLinear"),
    ),
    "a parametrized bias": (
        on_each("mlp.down_proj", parametrize),
        dict.fromkeys(("ffn", "neuron", "layer"), "ParametrizedLinear"),
    ),
    "a hook on the layer": (
        on_each("mlp.down_proj", lambda m: m.register_forward_hook(lambda m, args, out: 2 * out)),
        {"ffn": "down_proj has hooks", "layer": "down_proj has hooks", "neuron": None},
    ),
    "a hook on the block": (
        on_each("mlp", lambda m: m.register_forward_hook(lambda m, args, out: 2 * out)),
        {"layer": "mlp has hooks", "neuron": None},
    ),
    "accelerate's hook on the layer": (
        on_each("mlp.down_proj", lambda m: add_hook_to_module(m, Double())),
        {"ffn": "down_proj has hooks", "layer": "down_proj has hooks", "neuron": None},
    ),
    "accelerate's hook on the block": (
        on_each("mlp", lambda m: add_hook_to_module(m, Double())),
        {"layer": "mlp has hooks", "neuron": None},
    ),
    "another forward": (
        on_each("mlp", lambda m: setattr(m, "forward", types.MethodType(doubled, m))),
        {"layer": "forward of model.layers.1.mlp was replaced", "neuron": None},
    ),
    "training": (lambda model: model.train().requires_grad_(False), dict.fromkeys(("ffn", "neuron"), "training mode")),
    "one module in training": (
        on_each("mlp.act_fn", lambda m: m.train()),
        {"layer": "training", "ffn": None, "neuron": None},
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_exact_runs_with_the_reason(change):
    model, (do, reasons) = biased(), CHANGES[change]
    do(model)
    found = run_and_report(model, shift_plan(model, list(reasons)))
    for site, reason in reasons.items():
        path, why = found[site]
        assert (path, why) == ("bias", "") if reason is None else path == "columns" and reason in why, (site, path, why)
        if reason:
            with pytest.raises(austeer.SteeringError, match=rf"mode 'bias' is not possible at site '{site}'"):
                austeer.steer(model, shift_plan(model, site, 60), mode="bias")


@pytest.mark.parametrize("shared", ["mlp", "mlp.down_proj"])
def test_a_layer_in_two_places_gets_no_bias(shared):
    """What it adds in one place it would add in the other."""
    model = tiny_model()
    plan = shift_plan(model, "layer", 40)
    first, second = (model.model.layers[i].get_submodule(shared.rpartition(".")[0]) for i in (0, 1))
    name = shared.rpartition(".")[2]
    second._modules[name] = first._modules[name]
    with austeer.steer(model, plan, 1.0) as steering:
        got, report = logits(model, IDS), steering.report()
    torch.testing.assert_close(got, formula_logits(model, IDS, plan, 1.0), rtol=1e-4, atol=1e-4)
    assert [row.path for row in report] == ["columns", "columns", "bias"]
    assert "several places" in report[0].reason


def test_tied_weights_do_not_matter():
    model = tiny_model()
    first, second, _ = downs(model)
    second.weight = first.weight
    assert {path for path, _ in run_and_report(model, shift_plan(model)).values()} == {"bias"}


@pytest.mark.parametrize(
    ("family", "changes", "site", "reason"),
    [
        ("gemma2", {}, "layer", "as it is"),
        ("glm4", {}, "layer", "as it is"),
        ("opt", {"do_layer_norm_before": False}, "layer", "as it is"),
        ("qwen2_moe", {}, "ffn", "ungated shared expert"),
        ("mixtral", {}, "layer", "as it is"),
        ("granite", {"residual_multiplier": 0.22}, "layer", None),
        ("deepseek_v3", {}, "layer", None),
        ("ernie4_5_moe", {}, "ffn", None),
        ("glm4_moe", {}, "layer", None),
        ("llama4_text", {}, "ffn", None),
    ],
)
def test_families(family, changes, site, reason):
    model = tiny_model(family, **changes)
    path, why = run_and_report(model, shift_plan(model, site, 40))[site]
    assert (path, why) == ("bias", "") if reason is None else path == "columns" and reason in why


def test_a_shared_expert_behind_a_gate_of_someone_else():
    model = tiny_model("glm4_moe")
    base = type(model.model.layers[1].mlp)
    gated = type("Gated", (base,), {"forward": lambda self, x: base.forward(self, x) * x.mean(-1, keepdim=True)})
    for layer in model.model.layers[1:]:
        layer.mlp.__class__ = gated
    found = run_and_report(model, shift_plan(model, ("ffn", "layer"), 40))
    assert all(path == "columns" and "not Transformers' own" in why for path, why in found.values())


def test_dropout_alone_in_training():
    """As for samples of a model's uncertainty."""
    model = tiny_model("gpt2", resid_pdrop=0.5)
    for module in model.modules():
        module.training = isinstance(module, nn.Dropout)
    report = austeer.steer(model, shift_plan(model, ("ffn", "layer"), 40), 1.0).report()
    assert {row.path for row in report} == {"columns"}


def test_a_weight_split_over_processes(tmp_path):
    model, plan = tiny_model(), shift_plan(tiny_model())
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for module in downs(model):
            module.weight = nn.Parameter(distribute_tensor(module.weight.detach(), mesh, [Replicate()]))
        report = austeer.steer(model, plan, 1.0).report()
    finally:
        dist.destroy_process_group()
    assert {row.site for row in report if row.path == "bias"} == {"attention"}
    assert all("DTensor" in row.reason for row in report if row.site != "attention")


@pytest.mark.parametrize(
    ("name", "part", "reason"),
    [
        ("weight", slice(16), r"the weight is \(16,\), for 48 AUs"),
        ("weight", (slice(None), slice(24)), r"the weight is \(32, 24\), for 48 AUs"),
        ("bias", slice(8), r"the bias is \(8,\), for 32 outputs"),
    ],
)
def test_a_part_of_a_parameter(name, part, reason):
    """As a process has it of a model that is spread over several."""
    model = biased()
    plan, down = shift_plan(model, "neuron", 60), downs(model)[1]
    p = getattr(down, name).detach()
    down._parameters[name] = nn.Parameter(p.flatten()[part] if isinstance(part, slice) else p[part])
    with pytest.raises(austeer.SteeringError, match=f"'bias'.*'neuron' of layer 1.*{reason}"):
        austeer.steer(model, plan, 1.0, mode="bias")


def test_freezing():
    model = tiny_model()
    with torch._inductor.config.patch(freezing=True):
        assert all("freezing" in why for _, why in run_and_report(model, shift_plan(model)).values())


@pytest.mark.parametrize("sites", [("ffn",), ("attention", "layer")])
def test_the_self_check_finds_a_product_without_its_bias(sites, monkeypatch):
    model = tiny_model()
    plan, before, linear = shift_plan(model, sites), snapshot(model), nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda x, weight, bias=None: linear(x, weight))
    with pytest.raises(austeer.SteeringError, match=r"self-check.*bias"):
        austeer.steer(model, plan, 1.0).attach()
    monkeypatch.undo()
    assert_unchanged(model, before)
