"""Quantised models are steered after their own computation, exactly: what they compute is left as it is."""

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import austeer
from dense_formula import OPERATIONS, SITES, at_units, formula_at, formula_logits, logits, random_plan
from tiny_models import ids_of_rows, tiny_model

IDS = ids_of_rows()


def bitsandbytes(**options):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**options)


def torchao(name):
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    return TorchAoConfig(getattr(quantization, name)())


SCHEMES = {
    "bitsandbytes, 8 bits": lambda: bitsandbytes(load_in_8bit=True),
    "bitsandbytes, 4 bits": lambda: bitsandbytes(load_in_4bit=True),
    "bitsandbytes, nf4": lambda: bitsandbytes(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "torchao, int8 weights": lambda: torchao("Int8WeightOnlyConfig"),
    "torchao, int8": lambda: torchao("Int8DynamicActivationInt8WeightConfig"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("quantised")
    tiny_model(hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=SCHEMES)
def model(request, folder):
    """As a user loads it."""
    config = SCHEMES[request.param]()
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map={"": "cpu"}).eval()


def tensors_at(model, site):
    """The site's tensors of one forward pass, layer by layer, as the model's own hooks see them."""
    found, handles = [], []
    for layer in model.model.layers:
        if site in ("attention", "neuron"):
            module = layer.self_attn.o_proj if site == "attention" else layer.mlp.down_proj
            handles.append(module.register_forward_pre_hook(lambda m, args: found.append(args[0].clone())))
        else:
            module = layer.mlp if site == "ffn" else layer
            handles.append(module.register_forward_hook(lambda m, args, out: found.append(out.clone())))
    logits(model, IDS)
    for handle in handles:
        handle.remove()
    return found


def path_of(site, operation):
    """A bias is added after the quantised product; what a weight makes of an input is rounded with it."""
    return "bias" if operation == "shift" and site in ("ffn", "layer") else "columns"


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("site", SITES)
def test_the_first_steered_layer_is_the_formula_of_what_the_model_made(model, site, operation):
    """Only the first: the next ones round what they are given, and a last bit may tip their rounding."""
    plan = random_plan(model, site, 40, operation)
    plan = plan.take((plan.layer == 0).nonzero().flatten())
    unsteered = tensors_at(model, site)[0]
    expected = at_units(unsteered, plan, plan.layer == 0, 0.5)
    caught = []
    layer = model.model.layers[0]
    module = {"attention": layer.self_attn.o_proj, "neuron": layer.mlp.down_proj, "ffn": layer.mlp, "layer": layer}[
        site
    ]
    inner = module.forward
    if site in ("attention", "neuron"):  # what the quantised layer is given
        module.forward = lambda x: caught.append(x.clone()) or inner(x)
    following = module.register_forward_hook(lambda m, args, out: caught.append(out.clone()))
    with austeer.steer(model, plan, 0.5) as steering:
        logits(model, IDS)
        assert {row.path for row in steering.report()} == {path_of(site, operation)}
    following.remove()
    vars(module).pop("forward", None)
    torch.testing.assert_close(caught[0], expected)


@pytest.mark.parametrize("mode", ["auto", "dense"])
@pytest.mark.parametrize("site", SITES)
def test_the_whole_model_and_the_way_back(model, site, mode):
    plan = random_plan(model, site, 40)
    before = logits(model, IDS)
    expected = formula_logits(model, IDS, plan, 1.5)
    with austeer.steer(model, plan, 1.5, mode=mode) as steering:
        got = logits(model, IDS)
        assert {row.path for row in steering.report()} == {"dense" if mode == "dense" else "columns"}
        text = model.generate(**IDS, max_new_tokens=5, do_sample=False, pad_token_id=0)
        uncached = model.generate(**IDS, max_new_tokens=5, do_sample=False, pad_token_id=0, use_cache=False)
    effect = (expected - before).norm()
    assert effect > 0.1 * before.norm()
    assert (got - expected).norm() < 0.02 * effect  # activations that are rounded to 8 bits may tip over
    assert text.shape == uncached.shape
    assert torch.equal(logits(model, IDS), before)


@pytest.mark.parametrize("site", SITES)
def test_a_shift_of_the_whole_model_and_the_way_back(model, site):
    plan, before = random_plan(model, site, 40, "shift"), logits(model, IDS)
    expected = formula_logits(model, IDS, plan, 1.5)
    with austeer.steer(model, plan, 1.5) as steering:
        got = logits(model, IDS)
        assert {row.path for row in steering.report()} == {path_of(site, "shift")}
    assert (got - expected).norm() < 0.02 * (expected - before).norm()
    assert torch.equal(logits(model, IDS), before)


@pytest.mark.parametrize("mode", ["fold", "fused"])
@pytest.mark.parametrize("site", ["attention", "ffn", "neuron"])
def test_no_weight_is_edited_or_multiplied_by_us(model, site, mode):
    with pytest.raises(austeer.SteeringError, match=rf"'{mode}'.*'{site}'.*(Linear|Tensor)"):
        austeer.steer(model, random_plan(model, site, 20), 1.0, mode=mode)


def test_gradients_reach_an_adapter_of_a_quantised_model(folder):
    """What QLoRA trains, under steering."""
    config = SCHEMES["bitsandbytes, 4 bits"]()

    def adapted():
        base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map={"": "cpu"})
        torch.manual_seed(1)
        return peft.get_peft_model(
            base, peft.LoraConfig(target_modules=["q_proj", "up_proj"], r=2, init_lora_weights=False)
        )

    steered, model = adapted(), adapted()
    plan, got = random_plan(model, SITES, 25), dict(steered.named_parameters())
    with austeer.steer(steered, plan, 0.5):
        steered(**IDS).logits.square().mean().backward()
    with formula_at(model.get_base_model(), plan, 0.5):
        model(**IDS).logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(got[name].grad, parameter.grad, rtol=1e-3, atol=1e-5, msg=name)
