"""A shift in the bias of a layer that is offloaded, quantised, or inside an adapter."""

import peft
import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from transformers import AutoModelForCausalLM

import austeer
from austeer.models.sites import find_sites
from dense_formula import formula_logits, logits, modules_of, random_plan, shift_plan
from tiny_models import ids_of_rows, tiny_model

IDS = ids_of_rows() | {"use_cache": False}


def trace(model):
    return modules_of(model), list(model.state_dict())


def tensors(model):
    return {name: t.clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}


def took(steering):
    return {row.path for row in steering.report()}


# --- offloaded, quantised --------------------------------------------------------------------------------------------

_MAP = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
MAP = _MAP | {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2.self_attn": "disk"}
MAP |= {"model.layers.2.mlp": "cpu", "model.layers.2.input_layernorm": "cpu"}
MAP |= {"model.layers.2.post_attention_layernorm": "disk"}


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("how", ["cpu", "disk", "map"])
def test_offloaded(how, buffers, tmp_path):
    """Output sides need no weight; an input side does, and runs where it is offloaded."""
    plain, model = tiny_model(), tiny_model()
    device, plan = torch.device("cpu"), shift_plan(plain)
    if how == "cpu":
        cpu_offload(model, execution_device=device, offload_buffers=buffers)
    elif how == "disk":
        disk_offload(model, tmp_path, execution_device=device, offload_buffers=buffers)
    else:
        dispatch_model(model, MAP, main_device="cpu", offload_dir=tmp_path, offload_buffers=buffers)
    before, unsteered = trace(model), logits(model, IDS)
    for _ in range(2):
        with austeer.steer(model, plan, 1.0) as steering:
            for alpha in (1.0, -0.5):
                steering.alpha = alpha
                expected = formula_logits(plain, IDS, plan, alpha)
                torch.testing.assert_close(logits(model, IDS), expected, rtol=1e-4, atol=1e-4)
            for row in steering.report():
                module = model.get_submodule(find_sites(model)[row.site][row.layer].bias)
                stays = row.site in ("ffn", "layer") or module.weight.device.type != "meta"
                assert row.path == ("bias" if stays else "columns")
                assert stays or "the weight is offloaded" in row.reason
        assert torch.equal(logits(model, IDS), unsteered)
    after = trace(model)
    assert {name: entry[0] for name, entry in after[0].items()} == {name: entry[0] for name, entry in before[0].items()}
    assert after[1] == before[1]


def test_a_bias_that_is_offloaded_is_left_alone():
    plain = tiny_model("llama", mlp_bias=True)
    model, plan = tiny_model("llama", mlp_bias=True), shift_plan(plain, "ffn")
    cpu_offload(model, execution_device=torch.device("cpu"))
    with austeer.steer(model, plan, 1.0) as steering:
        torch.testing.assert_close(logits(model, IDS), formula_logits(plain, IDS, plan, 1.0), rtol=1e-4, atol=1e-4)
        assert took(steering) == {"columns"} and "the bias is offloaded" in steering.report()[0].reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["8", "4", "4 in bfloat16"])
def test_quantised_under_an_adapter(scheme, dtype, tmp_path):
    """The bias is in the activations' dtype, not in the one that the weight is packed in."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    four = {"load_in_4bit": True, "bnb_4bit_compute_dtype": dtype}
    packed = {"bnb_4bit_quant_storage": torch.bfloat16} if scheme == "4 in bfloat16" else {}
    config = BitsAndBytesConfig(**({"load_in_8bit": True} if scheme == "8" else four | packed))
    tiny_model(hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, device_map={"": "cpu"}, dtype=dtype
    )
    adapter = peft.LoraConfig(target_modules=["down_proj"], r=2, init_lora_weights=False)
    torch.manual_seed(1)
    model = peft.get_peft_model(model, adapter).eval()
    plan = shift_plan(model, ("ffn", "layer"))
    plan = plan.take((plan.layer == 2).nonzero().flatten())  # nothing rounds what it made
    down = model.get_base_model().model.layers[2].mlp.down_proj.base_layer
    with austeer.steer(model, plan, 1.0, mode="bias"):  # before a first pass packs the weights anew
        first = down.bias.clone()
    unsteered = logits(model, IDS)
    expected, before = formula_logits(model.get_base_model(), IDS, plan, 1.0), modules_of(model)
    with austeer.steer(model, plan, 1.0, mode="bias"):
        assert down.bias.dtype == dtype and torch.equal(down.bias, first)
        got = logits(model, IDS)
        assert down.bias.dtype == dtype
    assert (got - expected).norm() <= 4 * torch.finfo(dtype).eps * expected.norm()
    assert (expected - unsteered).norm() > 0.02 * unsteered.norm()
    assert torch.equal(logits(model, IDS), unsteered) and modules_of(model) == before


# --- adapters --------------------------------------------------------------------------------------------------------

ADAPTERS = {
    "lora": {},
    "dora": {"use_dora": True},
    "lora with a bias": {"lora_bias": True, "bias": "none"},
    "rslora": {"use_rslora": True},
}


def adapted(options, **changes):
    torch.manual_seed(1)
    config = peft.LoraConfig(target_modules=["down_proj"], r=2, init_lora_weights=False, **options)
    model = peft.get_peft_model(tiny_model("llama", **changes), config)
    model.add_adapter("other", config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora" in name:
                p.normal_(std=0.2)
    return model.eval()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_on_the_layer_that_has_the_bias(kind, biased):
    """On, off, another one, merged and taken out again, all inside the block."""
    if kind == "lora with a bias" and not biased:
        pytest.skip("PEFT merges no bias into a layer that has none")
    model, plain = (adapted(ADAPTERS[kind], mlp_bias=biased) for _ in range(2))
    plan, before, values = shift_plan(model, ("ffn", "layer")), trace(model), tensors(model)

    def check():
        expected = formula_logits(plain.get_base_model(), IDS, plan, 1.2)
        torch.testing.assert_close(logits(model, IDS), expected, rtol=1e-4, atol=1e-4)

    with austeer.steer(model, plan, 1.2, mode="bias") as steering:
        check()
        with model.disable_adapter(), plain.disable_adapter():
            check()
        for one in (model, plain):
            one.set_adapter("other")
        check()
        for one in (model, plain):
            one.merge_adapter(["other"])
        check()
        steering.alpha = -3.0
        steering.alpha = 1.2
        check()
        for one in (model, plain):
            one.unmerge_adapter()
            one.set_adapter("default")
        check()
        assert took(steering) == {"bias"}
    assert trace(model) == before
    torch.testing.assert_close(tensors(model), values)  # merging and taking out rounds
    torch.testing.assert_close(logits(model, IDS), logits(plain, IDS))


@pytest.mark.parametrize("site", ["attention", "neuron"])
def test_an_adapter_that_reads_the_shifted_input_runs(site):
    torch.manual_seed(1)
    config = peft.LoraConfig(target_modules=["o_proj", "down_proj"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(tiny_model(), config).eval()
    plan = shift_plan(model, site)
    expected = formula_logits(model.get_base_model(), IDS, plan, 1.0)
    with austeer.steer(model, plan, 1.0) as steering:
        torch.testing.assert_close(logits(model, IDS), expected)
        assert took(steering) == {"columns"} and "Linear" in steering.report()[0].reason
    with pytest.raises(austeer.SteeringError, match=rf"'bias'.*'{site}'.*Linear"):
        austeer.steer(model, plan, 1.0, mode="bias")


@pytest.mark.parametrize("change", ["hook", "forward"])
def test_what_is_done_to_the_layer_inside_an_adapter(change):
    model = adapted({})
    for layer in model.get_base_model().model.layers:
        base = layer.mlp.down_proj.base_layer
        if change == "hook":
            base.register_forward_hook(lambda m, args, out: 2 * out)
        else:
            base.forward = lambda x, weight=base.weight: 2 * x @ weight.T
    plan = shift_plan(model, ("ffn", "layer"))
    expected = formula_logits(model.get_base_model(), IDS, plan, 1.0)
    with austeer.steer(model, plan, 1.0) as steering:
        torch.testing.assert_close(logits(model, IDS), expected)
        assert took(steering) == {"columns"} and "base_layer" in steering.report()[0].reason


@pytest.mark.parametrize("operation", ["scale", "shift"])
@pytest.mark.parametrize("saved", ["mlp", "down_proj"])
def test_modules_that_an_adapter_brings_along_are_not_edited(saved, operation):
    """They are not what runs with the adapter off."""
    torch.manual_seed(1)
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=[saved], r=2)
    model = peft.get_peft_model(tiny_model(), config).eval()
    with torch.no_grad():
        for layer in model.get_base_model().model.layers:
            for p in layer.mlp.parameters():
                p += 0.01 * torch.randn_like(p)
    plan = random_plan(model, ("ffn", "layer"), 25, operation)
    with austeer.steer(model, plan, 1.0) as steering:
        steered = logits(model, IDS)
        with model.disable_adapter():
            off = logits(model, IDS)
        assert took(steering) == {"columns"}
        assert "ModulesToSaveWrapper" in next(row.reason for row in steering.report() if row.site == "ffn")
    torch.testing.assert_close(steered, formula_logits(model.get_base_model(), IDS, plan, 1.0))
    with model.disable_adapter():
        torch.testing.assert_close(off, formula_logits(model.get_base_model(), IDS, plan, 1.0))


def test_an_adapter_of_another_kind_runs():
    torch.manual_seed(1)
    config = peft.IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False)
    model = peft.get_peft_model(tiny_model(), config).eval()
    plan = shift_plan(model)
    expected = formula_logits(model.get_base_model(), IDS, plan, 1.0)
    with austeer.steer(model, plan, 1.0) as steering:
        torch.testing.assert_close(logits(model, IDS), expected)
        assert {(row.site, row.path) for row in steering.report()} == {
            *((site, "columns") for site in ("ffn", "layer", "neuron")),
            ("attention", "bias"),
        }
