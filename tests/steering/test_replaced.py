"""What is put in the place of a steered module, or of its forward, inside the block is told on leaving, and kept."""

import types
import warnings

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn

import austeer
from dense_formula import OPERATION, formula_logits, logits, random_plan
from tiny_models import ids_of_rows, tiny_model

IDS = ids_of_rows()


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def fused_block(mlp, x):
    """As fused kernels do: the weights, without their modules."""
    linear = torch.nn.functional.linear
    return linear(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x), mlp.down_proj.weight, mlp.down_proj.bias)


def another_module(model, monkeypatch):
    model.model.layers[1].mlp = tiny_model().model.layers[0].mlp


def another_layer(model, monkeypatch):
    model.model.layers[1] = tiny_model().model.layers[0]


def another_projection(model, monkeypatch):
    model.model.layers[1].mlp.down_proj = tiny_model().model.layers[0].mlp.down_proj


def another_forward_around(model, monkeypatch):
    mlp = model.model.layers[1].mlp
    mlp.forward = types.MethodType(fused_block, mlp)


def another_forward_of_the_class(model, monkeypatch):
    monkeypatch.setattr(type(model.model.layers[1].mlp), "forward", fused_block)


def another_class(model, monkeypatch):
    model.model.layers[1].mlp.down_proj.__class__ = Doubled


REPLACED = [
    another_module,
    another_layer,
    another_projection,
    another_forward_around,
    another_forward_of_the_class,
    another_class,
]


@pytest.mark.parametrize("mode", ["fold", "bias", "columns"])
@pytest.mark.parametrize("replace", REPLACED)
def test_what_is_replaced_inside_is_a_warning(monkeypatch, mode, replace):
    model = tiny_model()
    plan = random_plan(model, "neuron", 40, OPERATION[mode])
    with (
        pytest.warns(austeer.SteeringWarning, match=r"modules.*replaced.*model\.layers\.\d"),
        austeer.steer(model, plan, 2.0, mode=mode),
    ):
        logits(model, IDS)
        replace(model, monkeypatch)
    plain = tiny_model()
    replace(plain, monkeypatch)
    torch.testing.assert_close(
        logits(model, IDS), logits(plain, IDS)
    )  # the replacement is not lost, and the weights are back


@pytest.mark.parametrize("mode", ["columns", "dense", "fused"])
def test_another_forward_in_place_of_ours_is_an_error_and_stays(mode):
    model = tiny_model()
    module = model.model.layers[1].mlp.down_proj
    own = lambda x: torch.zeros_like(x[..., :1]).expand(*x.shape[:-1], module.out_features)  # noqa: E731
    with (
        pytest.raises(austeer.SteeringError, match=r"layers\.1\.mlp\.down_proj.*another forward in place of ours"),
        austeer.steer(model, random_plan(model, "neuron", 40), 2.0, mode=mode),
    ):
        logits(model, IDS)
        module.forward = own
    assert vars(module)["forward"] is own and not austeer.is_steered(model)


@pytest.mark.parametrize("mode", ["fold", "bias"])
@pytest.mark.parametrize("how", ["PyTorch's", "accelerate's"])
def test_a_hook_between_an_edit_and_its_site_is_a_warning(mode, how):
    """The site's tensor is what the hook makes of the edited product."""
    model = tiny_model()
    plan = random_plan(model, "ffn", 40, OPERATION[mode])
    module = model.model.layers[1].mlp.down_proj
    with (
        pytest.warns(austeer.SteeringWarning, match=r"replaced or wrapped.*layers\.1\.mlp\.down_proj has hooks"),
        austeer.steer(model, plan, 2.0, mode=mode),
    ):
        logits(model, IDS)
        if how == "accelerate's":
            add_hook_to_module(module, ModelHook())
        else:
            module.register_forward_hook(lambda module, args, output: output + 1)


@pytest.mark.parametrize("mode", ["fold", "bias", "columns"])
def test_what_leaves_steering_as_it_is_is_no_warning(mode):
    """Hooks that come and go, on the site or around it; layers that are compiled."""
    model = tiny_model()
    plan = random_plan(model, "ffn", 40, OPERATION[mode])
    layer, expected = model.model.layers[1], formula_logits(tiny_model(), IDS, plan, 2.0)
    with warnings.catch_warnings(action="error"), austeer.steer(model, plan, 2.0, mode=mode):
        if mode == "columns":
            add_hook_to_module(layer.mlp, ModelHook())
        layer.mlp.register_forward_hook(lambda module, args, output: None)
        model.model.layers[1] = torch.compile(layer, backend="eager")
        torch.testing.assert_close(logits(model, IDS), expected, rtol=1e-4, atol=1e-4)
        remove_hook_from_module(layer.mlp)
