"""Folding into weights of every kind, and what is refused; whether it is exact in each family: test_families.py."""

import copy
import re

import peft
import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from torch.nn.utils import prune
from transformers.models.llama.modeling_llama import LlamaMLP

import austeer
from austeer import find_sites
from austeer.models.structure import text_config
from austeer.steering import fold
from austeer.steering.fold import why_not_fold
from austeer.steering.sharing import Sharing
from dense_formula import assert_unchanged, formula_logits, logits, random_plan, snapshot
from tiny_models import tiny_model

BATCH = {"input_ids": torch.tensor([[3, 1, 40, 22, 9], [7, 7, 12, 50, 2]])}


def refusal(model, name="ffn", operation="scale", layer=-1):
    return why_not_fold(model, find_sites(model)[name][layer], operation, Sharing(model))


# --- what is scaled --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "family, weight, bias, dim",
    [
        ("mixtral", "mlp.experts.down_proj", None, 1),
        ("gpt_oss", "mlp.experts.down_proj", "mlp.experts.down_proj_bias", 2),
        ("llama4_text", "feed_forward.experts.down_proj", None, 2),
        ("gpt2", "mlp.c_proj.weight", "mlp.c_proj.bias", 1),
        ("falcon", "mlp.dense_4h_to_h.weight", None, 0),
    ],
)
@torch.no_grad()
def test_exactly_the_chosen_rows_change_rounded_once(family, weight, bias, dim, dtype):
    # Inner and outer width are equal, so no shape tells rows from columns.
    model = tiny_model(family, intermediate_size=32, n_inner=32, ffn_hidden_size=32).to(dtype)
    site = find_sites(model)["ffn"][1]
    layer = model.get_submodule(find_sites(model)["layer"][1].path)
    plan = random_plan(model, "ffn", 30)
    rows = plan.layer == 1
    factor = torch.ones(32)
    factor[plan.index[rows].long()] += 1.5 * plan.beta[rows]
    before = {name: p.clone() for name, p in layer.named_parameters()}
    shape = [1] * before[weight].dim()
    shape[dim] = 32
    expected = {weight: (before[weight].float() * factor.view(shape)).to(dtype)}
    if bias:
        expected[bias] = (before[bias].float() * factor).to(dtype)
    shared = [name for name in before if "shared_expert.down_proj" in name]
    for name in shared:
        expected[name] = (before[name].float() * factor[:, None]).to(dtype)
    assert len(site.parts) == 1 + len(shared)
    with austeer.steer(model, plan, 1.5, mode="fold"):
        for name, p in layer.named_parameters():
            assert torch.equal(p, expected.get(name, before[name])), name
    assert all(torch.equal(p, before[name]) for name, p in layer.named_parameters())


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_every_way_to_run_experts(family, implementation):
    model = tiny_model(family)
    model.set_experts_implementation(implementation)
    assert text_config(model)._experts_implementation == implementation
    a, b = random_plan(model, "ffn", 40), random_plan(model, "attention", 40)
    plain, before = copy.deepcopy(model), snapshot(model)
    with austeer.steer(model, a + b, 2.0, mode="fold") as steering:
        for k in (80, 13):
            steering.k = k
            expected = formula_logits(plain, BATCH, (a + b).top(k), 2.0)
            torch.testing.assert_close(logits(model, BATCH), expected, rtol=1e-4, atol=1e-4)
    assert_unchanged(model, before)


def test_a_fold_that_breaks_off_is_undone(monkeypatch):
    model = tiny_model("deepseek_v3")
    plan, before, read = random_plan(model, "ffn", 40), snapshot(model), fold.reference.compute_dtype
    first, _ = map(model.get_submodule, find_sites(model, ["ffn"])["ffn"][1].parts)
    unchanged = first.down_proj.clone()

    def broken(dtype):
        if not torch.equal(first.down_proj, unchanged):
            monkeypatch.setattr(fold.reference, "compute_dtype", read)  # once
            raise RuntimeError("out of memory")
        return read(dtype)

    monkeypatch.setattr(fold.reference, "compute_dtype", broken)
    with pytest.raises(RuntimeError, match="out of memory"), austeer.steer(model, plan, 2.0, mode="fold"):
        pass
    assert_unchanged(model, before)
    assert not austeer.is_steered(model)


# --- changed inside the block ----------------------------------------------------------------------------------------


def downs(model):
    return [layer.mlp.down_proj for layer in model.model.layers]


def step(module):
    module.weight.grad = torch.ones_like(module.weight)
    torch.optim.SGD([module.weight], 0.1).step()


def load(module):
    module.load_state_dict({"weight": torch.ones_like(module.weight), "bias": torch.ones_like(module.bias)})


def replace_weight(module):
    module.weight = nn.Parameter(torch.ones_like(module.weight))


def quantise(module):
    module.weight = Quantised(module.weight.data.to(torch.int8), requires_grad=False)


@pytest.mark.parametrize("change", [step, load, replace_weight, quantise])
def test_weights_that_are_changed_inside_the_block_stay_and_it_is_said(change):
    model = tiny_model("llama", mlp_bias=True)
    plan, before, down = random_plan(model, ("ffn", "neuron", "attention"), 40), snapshot(model), downs(model)[1]
    steering = austeer.steer(model, plan, 2.0, mode="fold").attach()
    change(down)
    now = down.weight.clone()
    with pytest.raises(austeer.SteeringError, match=r"layers\.1\.mlp.*weight: found other values"):
        steering.detach()
    assert not austeer.is_steered(model)
    assert torch.equal(down.weight, now) or change is step  # of which what was not steered stays
    after = snapshot(model)[0]
    assert all(torch.equal(after[name], value) for name, value in before[0].items() if "layers.1.mlp.down" not in name)


@pytest.mark.parametrize(
    "change", [lambda m: cpu_offload(m, torch.device("cpu")), lambda m: prune.identity(m, "weight")]
)
def test_weights_that_are_elsewhere_by_now_are_restored(change):
    model = tiny_model()
    plan, unsteered = random_plan(model, ("ffn", "neuron"), 40), logits(model, BATCH)
    with austeer.steer(model, plan, 2.0, mode="fold"):
        assert not torch.equal(logits(model, BATCH), unsteered)
        for module in downs(model):
            change(module)
    assert torch.equal(logits(model, BATCH), unsteered)


def test_a_checkpoint_loaded_inside_is_steered_with_the_next_strength():
    model = tiny_model()
    plan, state, before = (
        random_plan(model, ("ffn", "attention"), 40),
        copy.deepcopy(model.state_dict()),
        snapshot(model),
    )
    expected = formula_logits(tiny_model(), BATCH, plan, 0.5)
    with austeer.steer(model, plan, 2.0, mode="fold") as steering:
        model.load_state_dict(state)
        steering.alpha = 0.5
        torch.testing.assert_close(logits(model, BATCH), expected, rtol=1e-4, atol=1e-4)
        model.load_state_dict(state)
    assert_unchanged(model, before)


def test_a_model_cast_inside_leaves_nothing_in_the_memory_that_it_shared():
    model = tiny_model()
    other = tiny_model()
    other.load_state_dict(model.state_dict(), assign=True)
    before = snapshot(other)
    with austeer.steer(model, random_plan(model, ("ffn", "neuron"), 40), 2.0, mode="fold") as steering:
        model.double()
        steering.alpha = 1.0
        logits(model, BATCH)
    assert_unchanged(other, before)
    assert_unchanged(model, snapshot(tiny_model().double()))


# --- what is refused -------------------------------------------------------------------------------------------------


def test_what_a_mixture_can_fold():
    model = tiny_model("qwen2_moe")
    assert refusal(model) is None and refusal(model, layer=0) is None
    assert "shift" in refusal(model, operation="shift")
    assert "push" in refusal(model, operation="push")
    assert "no linear layer" in refusal(model, name="layer")


class Quantised(nn.Parameter):
    """As bitsandbytes, torchao and tensor parallelism have them: a parameter that is no plain one."""


class OtherExperts(nn.Module):
    def __init__(self, like):
        super().__init__()
        self.down_proj, self.gate_up_proj = like.down_proj, like.gate_up_proj


def bind(module, function):
    module.forward = function.__get__(module)


def replace_experts(block):
    block.experts = OtherExperts(block.experts)


def subclass_experts(block):
    block.experts.__class__ = type("MyExperts", (type(block.experts),), {})


def parameter(module, name, value):
    module._parameters[name] = value


def offload(block):
    cpu_offload(block, execution_device=torch.device("cpu"))


def tie(block):
    block.experts.gate_up_proj = nn.Parameter(block.experts.down_proj.detach().view(4, 24, 32))


@pytest.mark.parametrize(
    "change, message",
    [
        (replace_experts, "OtherExperts"),
        (subclass_experts, "MyExperts"),
        (lambda b: setattr(b.experts, "has_post_expert_norm", True), "normalises"),
        (lambda b: setattr(b.experts, "_is_expert_parallel", True), "processes"),
        (lambda b: setattr(b.experts.config, "_experts_implementation", "mine"), "'mine'"),
        (lambda b: bind(b, lambda self, x: x), r"forward of model\.layers\.2\.mlp\b"),
        (lambda b: bind(b.experts, lambda self, *a: a[0]), r"forward of .*mlp\.experts\b"),
        (lambda b: bind(b.shared_expert, lambda self, x: x), r"forward of .*mlp\.shared_expert\b"),
        (lambda b: b.shared_expert.register_forward_hook(lambda *a: None), r"mlp\.shared_expert.*hooks"),
        (lambda b: b.experts.register_forward_hook(lambda *a: None), r"mlp\.experts.*hooks"),
        (offload, "(down_proj|weight) is offloaded"),
        (tie, "down_proj.*shared"),
        (lambda b: setattr(b.shared_expert, "down_proj", torch.jit.script(b.shared_expert.down_proj)), "TorchScript"),
        (lambda b: b.shared_expert.down_proj.to(torch.float8_e4m3fn), r"shared_expert.*weight.*torch\.float8"),
        (lambda b: parameter(b.experts, "down_proj", Quantised(b.experts.down_proj.data)), "down_proj.*Quantised"),
        (
            lambda b: parameter(b.experts, "down_proj", nn.Parameter(b.experts.down_proj.data[:, :16])),
            r"weight.*\(4, 16, 24\).*32",
        ),
    ],
)
def test_what_is_not_certain_to_be_exact_is_refused(change, message):
    model = tiny_model("qwen2_moe")
    change(model.model.layers[2].mlp)
    found = refusal(model)
    assert found is not None and re.search(message, found), found


def test_refused_layers_are_steered_by_columns_and_the_others_folded():
    model = peft.get_peft_model(
        tiny_model("qwen2_moe"), peft.LoraConfig(target_modules=r".*layers\.1\.mlp\.shared_expert\.down_proj", r=2)
    )
    plan = random_plan(model, "ffn", 60)
    expected = formula_logits(model.get_base_model(), BATCH, plan, 2.0)
    with austeer.steer(model, plan, 2.0) as steering:
        torch.testing.assert_close(logits(model, BATCH), expected, rtol=1e-4, atol=1e-4)
        assert [row.path for row in steering.report()] == ["fold", "columns", "fold"]
        assert "shared_expert.down_proj: Linear" in steering.report()[1].reason


class OtherMLP(LlamaMLP):
    """A Llama's MLP that does more to the tensor than its down projection, in a way its modules do not show."""

    kind = ""

    def forward(self, x):
        y = super().forward(x)
        if self.kind == "factor":
            y *= 0.5  # in place: what the projection gave is changed, too
        return {"factor": y, "skip": y + 0.5 * x, "clamp": y.clamp(-0.1, 0.1)}.get(self.kind, y)


@pytest.mark.parametrize("kind", ["factor", "skip", "clamp"])
@pytest.mark.parametrize("operation", ["scale", "shift"])
def test_a_block_that_does_more_than_its_projection_is_neither_edited_nor_fused(kind, operation):
    model = tiny_model("llama", mlp_bias=True)
    for layer in model.model.layers:
        layer.mlp.__class__ = type("Other", (OtherMLP,), {"kind": kind})
    ids = {"input_ids": torch.tensor([[3, 4, 5, 6]])}
    plan = random_plan(model, "ffn", 30, operation)
    expected, state = formula_logits(model, ids, plan, 1.5), torch.get_rng_state()
    with austeer.steer(model, plan, 1.5) as steering:
        torch.testing.assert_close(logits(model, ids), expected)
        assert {row.path for row in steering.report()} == {"columns"}
        assert "does more" in steering.report()[0].reason
    assert torch.equal(torch.get_rng_state(), state)
    edit = "bias" if operation == "shift" else "fold"
    for mode in (edit, "fused"):
        with pytest.raises(austeer.SteeringError, match=f"'{mode}'.*'ffn'.*does more"):
            austeer.steer(model, plan, mode=mode)
    neuron = random_plan(model, "neuron", 30, operation)
    if operation == "scale":  # the projection's input is what it was
        austeer.steer(model, neuron, mode=edit)
    else:  # other code may multiply by the weight without the bias
        with pytest.raises(austeer.SteeringError, match="not Transformers' own"):
            austeer.steer(model, neuron, mode=edit)
    at_layer = austeer.steer(model, random_plan(model, "layer", 30, operation)).report()
    assert {row.path for row in at_layer} == {"columns"}
    for layer in model.model.layers:
        type(layer.mlp).kind = ""
    assert {row.path for row in austeer.steer(model, plan).report()} == {edit}


def test_a_mixture_that_adds_to_its_experts_fails_the_self_check():
    model = tiny_model("mixtral")
    before = {name: p.clone() for name, p in model.named_parameters()}
    base = type(model.model.layers[0].mlp)
    other = type("Other", (base,), {"forward": lambda self, x: base.forward(self, x) + 0.5 * x})
    for layer in model.model.layers:
        layer.mlp.__class__ = other
    plan = random_plan(model, "ffn", 30)
    with pytest.raises(austeer.SteeringError, match=r"self-check.*fold.*'ffn'"):
        austeer.steer(model, plan, 2.0).attach()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with austeer.steer(model, plan, 2.0, mode="columns"):
        model(input_ids=torch.tensor([[3, 4, 5]]))


def test_weights_made_in_inference_mode_are_left_alone():
    with torch.inference_mode():
        model = tiny_model("llama")
        with austeer.steer(model, random_plan(model, "ffn", 9), 1.0, mode="fold"):
            pass
    plan = random_plan(model, "ffn", 9)
    assert "inference mode" in austeer.steer(model, plan).report()[0].reason
    with pytest.raises(austeer.SteeringError, match=r"'fold'.*'ffn'.*inference mode"):
        austeer.steer(model, plan, mode="fold")
