"""Adapters of PEFT, and what else is put around or in place of modules, on and off, before and inside the block."""

import types

import peft
import pytest
import torch

import austeer
from dense_formula import SITES, formula_logits, logits, random_plan
from tiny_models import ids_of_rows, tiny_model

IDS = ids_of_rows()
PROJECTIONS = ["o_proj", "down_proj"]
KINDS = {
    "ia3": lambda: peft.IA3Config(
        target_modules=PROJECTIONS, feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
    "lokr": lambda: peft.LoKrConfig(target_modules=PROJECTIONS, r=2, init_weights=False),
    "oft": lambda: peft.OFTConfig(target_modules=PROJECTIONS, r=0, oft_block_size=4, init_weights=False),
    "lora": lambda: peft.LoraConfig(target_modules=PROJECTIONS, r=2, init_lora_weights=False),
}


def adapted(kind):
    torch.manual_seed(1)
    model = peft.get_peft_model(tiny_model(), KINDS[kind]())
    model.add_adapter("other", KINDS[kind]())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(part in name for part in ("lora_", "ia3_", "lokr_", "oft_")):
                p += 0.2 * torch.randn_like(p)
    return model.eval()


def close(model, plain, plan):
    expected = formula_logits(plain, IDS, plan, 0.7)
    torch.testing.assert_close(logits(model, IDS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("operation", ["scale", "shift"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_switched_and_merged_inside_the_block(kind, operation):
    model, plain = adapted(kind), adapted(kind)
    plan = random_plan(model, ("ffn", "neuron", "attention"), 25, operation)
    with austeer.steer(model, plan, 0.7):
        close(model, plain.get_base_model(), plan)
        with model.disable_adapter(), plain.disable_adapter():
            close(model, plain.get_base_model(), plan)
        for change in (
            lambda one: one.set_adapter("other"),
            lambda one: one.merge_adapter(),
            lambda one: one.unmerge_adapter(),
        ):
            change(model), change(plain)
            close(model, plain.get_base_model(), plan)
    torch.testing.assert_close(logits(model, IDS), logits(plain, IDS))


def test_adapters_of_unlike_kinds_on_one_model():
    torch.manual_seed(1)
    model = peft.get_peft_model(tiny_model(), KINDS["lora"](), mixed=True)
    model.add_adapter("other", peft.LoHaConfig(target_modules=PROJECTIONS, r=2, init_weights=False))
    model.set_adapter(["default", "other"])
    plan = random_plan(tiny_model(), SITES, 25)
    expected = formula_logits(model.base_model.model, IDS, plan, 0.7)
    with austeer.steer(model.eval(), plan, 0.7):
        torch.testing.assert_close(logits(model, IDS), expected, rtol=1e-4, atol=1e-4)


# --- other modules with an adapter on than with it off ---------------------------------------------------------------


def saving(name):
    config = peft.LoraConfig(target_modules=["gate_proj" if name == "self_attn" else "q_proj"], modules_to_save=[name])
    return peft.get_peft_model(tiny_model(), config).eval()


@pytest.mark.parametrize("mode", ["auto", "fold", "fused", "columns", "dense"])
@pytest.mark.parametrize(("name", "site"), [("mlp", "neuron"), ("self_attn", "attention")])
def test_a_site_inside_a_module_of_which_there_are_two_is_refused(name, site, mode):
    model = saving(name)
    with pytest.raises(austeer.SteeringError, match=rf"site '{site}' of layer 0.*ModulesToSaveWrapper.*adapter"):
        austeer.steer(model, random_plan(model, site, 25), mode=mode)
    austeer.steer(model.merge_and_unload(), random_plan(model, site, 25), mode=mode)


def test_a_projection_of_which_there_are_two_is_not_fused():
    model = saving("mlp")
    plan = random_plan(model, "ffn", 25)
    with pytest.raises(austeer.SteeringError, match=r"'fused'.*'ffn'.*ModulesToSaveWrapper chooses"):
        austeer.steer(model, plan, mode="fused")
    expected = formula_logits(tiny_model(), IDS, plan, 0.7)
    with austeer.steer(model, plan, 0.7, mode="columns"), model.disable_adapter():
        torch.testing.assert_close(logits(model, IDS), expected, rtol=1e-4, atol=1e-4)


# --- put around a projection -----------------------------------------------------------------------------------------


def doubled(self, x):
    return 2 * type(self).forward(self, x)


@pytest.mark.parametrize(
    ("change", "sites"),
    [
        (lambda m: setattr(m, "forward", types.MethodType(doubled, m)), ("ffn", "neuron")),
        (lambda m: m.register_forward_hook(lambda m, args, out: 2 * out), ("ffn",)),
    ],
)
def test_a_projection_that_does_more_than_its_product_is_not_fused(change, sites):
    for site in sites:
        model = tiny_model()
        plan = random_plan(model, site, 25, "shift")
        for layer in model.model.layers:
            change(layer.mlp.down_proj)
        with pytest.raises(austeer.SteeringError, match=rf"'fused'.*'{site}'.*down_proj (was replaced|has hooks)"):
            austeer.steer(model, plan, mode="fused")
        expected = formula_logits(model, IDS, plan, 0.7)
        with austeer.steer(model, plan, 0.7):
            torch.testing.assert_close(logits(model, IDS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("operation", "mode", "sites"),
    [
        ("scale", "fold", ("ffn", "neuron")),
        ("shift", "bias", ("neuron",)),
        ("scale", "fused", ("ffn", "neuron")),
        ("scale", "columns", ("neuron", "attention")),
    ],
)
def test_an_adapter_that_is_added_inside_the_block_is_warned_of(operation, mode, sites):
    """What it adds may not be steered."""
    for site in sites:
        model = tiny_model()
        steering = austeer.steer(model, random_plan(model, site, 25, operation), 0.7, mode=mode)
        with pytest.warns(austeer.SteeringWarning, match="replaced or wrapped"), steering:
            logits(model, IDS)
            model.add_adapter(KINDS["lora"]())


def test_an_adapter_that_is_added_inside_the_block_to_a_layer_with_a_bias():
    """Which it leaves as it is; that something was put around the layer is told all the same."""
    model, plain = tiny_model(), tiny_model()
    plan = random_plan(model, "ffn", 25, "shift")
    with pytest.warns(austeer.SteeringWarning, match="wrapped"), austeer.steer(model, plan, 0.7, mode="bias"):
        for one in (model, plain):
            torch.manual_seed(1)
            one.add_adapter(KINDS["lora"]())
            one.eval()
        close(model, plain, plan)
