"""A shift at some tokens as a bias that is there for forward passes wholly in scope, and for nothing else."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from torch.nn.utils import prune
from transformers import LlamaForCausalLM

import austeer
from dense_formula import (
    SITES,
    assert_unchanged,
    formula_at,
    logits,
    modules_of,
    random_plan,
    shift_plan,
    snapshot,
)
from tiny_models import ids_of_rows, tiny_model

IDS = ids_of_rows()
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
SCOPES = ["prompt", "generation", "from_last_prompt_token"]
MODELS = {
    "llama": ("llama", {}),
    "biases of its own": ("llama", {"mlp_bias": True, "attention_bias": True}),
    "gpt2": ("gpt2", {}),
}


def build(name):
    family, changes = MODELS[name]
    return tiny_model(family, **changes)


def layers_of(model):
    return model.model.layers if isinstance(model, LlamaForCausalLM) else model.transformer.h


def down(model, layer=1):
    mlp = layers_of(model)[layer].mlp
    return getattr(mlp, "down_proj", None) or mlp.c_proj


def seen(model):
    """A list to which each forward pass adds the bias of one layer as it is at the end of the layers."""
    found = []
    norm = model.model.norm if isinstance(model, LlamaForCausalLM) else model.transformer.ln_f
    norm.register_forward_pre_hook(lambda *_: found.append(down(model).bias))
    return found


def exchanged(biases, own):
    return [bias is not own for bias in biases]


@torch.no_grad()
def piece_by_piece(model, ids, cuts):
    """The logits of one sequence that is given in pieces."""
    got, cache, at = [], None, 0
    for cut in cuts:
        out = model(ids[:, at : at + cut], past_key_values=cache, use_cache=True)
        got.append(out.logits)
        cache, at = out.past_key_values, at + cut
    return torch.cat(got, 1)


# --- which passes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["prompt", "generation"])
@pytest.mark.parametrize("name", MODELS)
def test_a_pass_wholly_in_scope_has_the_bias_and_all_equal_the_formula(name, scope):
    model, plain = build(name), build(name)
    plan, own, biases = shift_plan(model), down(model).bias, seen(model)
    ids, prompt = IDS["input_ids"], 4
    where = (torch.arange(7) < prompt).expand(2, 7) == (scope == "prompt")
    with formula_at(plain, plan, 0.7, where):
        expected = logits(plain, {"input_ids": ids})
    with austeer.steer(model, plan, 0.7, scope=scope) as steering:
        steering.prompt_length = prompt
        for cuts, whole in (((4, 1, 1, 1), [True, False, False, False]), ((2, 2, 3), [True, True, False])):
            biases.clear()
            torch.testing.assert_close(piece_by_piece(model, ids, cuts), expected, rtol=1e-4, atol=1e-4)
            # A bias of the module's own may change unseen between two calls; there the tensor is steered.
            assert exchanged(biases, own) == [own is None and this == (scope == "prompt") for this in whole]
        biases.clear()
        torch.testing.assert_close(piece_by_piece(model, ids, (3, 3, 1)), expected, rtol=1e-4, atol=1e-4)
        if own is None:
            assert exchanged(biases, own) == ([True, False, False] if scope == "prompt" else [False, False, True])
        report = steering.report()
        assert {row.path for row in report} == {"bias"} and all("switched" in row.reason for row in report)
        assert {row.calls for row in report} == {10} and {row.tokens for row in report} == {3 * 2 * int(where[0].sum())}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", MODELS)
def test_generate_exchanges_the_biases_also_those_of_the_modules_own(name, scope):
    model = build(name)
    plan, own, biases = shift_plan(model), down(model).bias, seen(model)
    before = snapshot(model), modules_of(model)
    with austeer.steer(model, plan, 0.7, scope=scope, mode="columns"):
        expected = model.generate(**IDS, **GREEDY)
    assert not torch.equal(expected, model.generate(**IDS, **GREEDY))
    with austeer.steer(model, plan, 0.7, scope=scope, mode="bias"):
        for _ in range(2):
            biases.clear()
            assert torch.equal(model.generate(**IDS, **GREEDY), expected)
            assert exchanged(biases, own) == [(number == 0) == (scope == "prompt") for number in range(6)]
    assert_unchanged(model, before[0])
    assert modules_of(model) == before[1]


FORMS = {
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "prefill in chunks": {"prefill_chunk_size": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("form", [*FORMS, "assistant"])
def test_ways_of_generating(form, scope):
    model, plan = tiny_model(), shift_plan(tiny_model())
    ids = ids_of_rows(rows=1)
    options = {**GREEDY, **FORMS.get(form, {})}
    if form == "assistant":
        options["assistant_model"] = tiny_model(num_hidden_layers=1)
    found = []
    for mode in ("columns", "auto"):
        with austeer.steer(model, plan, 0.7, scope=scope, mode=mode):
            found.append(model.generate(**ids, **options))
    assert torch.equal(*found)


def test_what_is_possible_is_told_before():
    model, plan = tiny_model(), shift_plan(tiny_model())
    austeer.steer(model, plan, scope="generation", mode="bias")
    for changed, message in (
        ({"scope": (2, 5)}, "only some tokens"),
        ({"plan": {"a": plan}}, "only some tokens"),
        ({"plan": random_plan(model, "ffn", 5, "scale")}, "only some tokens"),
    ):
        with pytest.raises(austeer.SteeringError, match=message):
            austeer.steer(model, **{"plan": plan, "scope": "generation", "mode": "bias", **changed})
    assert {row.path for row in austeer.steer(model, plan, scope=(2, 5)).report()} == {"columns"}


@pytest.mark.parametrize("inside", [False, True])
def test_offloaded_weights(inside):
    """What loads them looks at the module's parameters: where they are offloaded nothing is put there."""
    plain, model = tiny_model(), tiny_model()
    plan = shift_plan(plain, ("ffn", "layer"))
    with austeer.steer(plain, plan, 0.7, scope="generation", mode="columns"):
        expected = plain.generate(**IDS, **GREEDY)
    if not inside:
        cpu_offload(model, execution_device=torch.device("cpu"))
    with austeer.steer(model, plan, 0.7, scope="generation") as steering:
        if inside:
            cpu_offload(model, execution_device=torch.device("cpu"))
        assert torch.equal(model.generate(**IDS, **GREEDY), expected)
        rows = steering.report()
        assert {row.path for row in rows} == {"bias" if inside else "columns"}
        assert inside or all("the weight is offloaded" in row.reason for row in rows)


# --- nothing outside of the pass -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_left_after_a_pass_nor_after_one_that_fails(name):
    model = build(name)
    plan, own, state = shift_plan(model), down(model).bias, copy.deepcopy(model.state_dict())
    with austeer.steer(model, plan, 0.7, scope="generation"):
        model.generate(**IDS, **GREEDY)
        outside = modules_of(model)
        handle = layers_of(model)[2].register_forward_hook(lambda *_: 1 / 0)
        for call in (lambda: model.generate(**IDS, **GREEDY), lambda: logits(model, IDS)):
            with pytest.raises(ZeroDivisionError):
                call()
            assert down(model).bias is own
        handle.remove()
        assert modules_of(model) == outside
        now = model.state_dict()
        assert now.keys() == state.keys() and all(torch.equal(now[key], state[key]) for key in state)
        twin = copy.deepcopy(model)
    assert torch.equal(logits(model, IDS), logits(build(name), IDS))
    with pytest.raises(austeer.SteeringError, match="steered already"), austeer.steer(twin, plan):
        pass


def test_a_layer_that_is_called_by_itself_is_steered_as_the_last_pass_was():
    model = tiny_model()
    plan, mlp, x = shift_plan(model, "ffn", 60), model.model.layers[1].mlp, torch.randn(1, 3, 32)
    delta = torch.zeros(32).index_put_((plan.index[plan.layer == 1].long(),), plan.delta[plan.layer == 1])
    with torch.no_grad():
        plain = mlp(x)
        with austeer.steer(model, plan, 0.7, scope="generation"):
            for _ in range(2):
                piece_by_piece(model, IDS["input_ids"], (6, 1))
                torch.testing.assert_close(mlp(x), plain + 0.7 * delta)
                piece_by_piece(model, IDS["input_ids"], (6,))
                assert torch.equal(mlp(x), plain)


@pytest.mark.parametrize("mode", ["bias", "columns"])
@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("cuts", [(5,), (4, 1)])
def test_a_pass_inside_of_a_pass(cuts, length, mode):
    """It has its own side, and the one around it goes on with its own."""
    model = tiny_model()
    plan, ids, inner = shift_plan(model), IDS["input_ids"], []

    def again(module, args, output):
        if not inner and args[0].shape[1] == length:  # once, in the prompt's pass or in that of a token
            inner.append(None)
            inner[0] = piece_by_piece(model, ids, cuts)

    with austeer.steer(model, plan, 0.7, scope="generation", mode=mode):
        expected = piece_by_piece(model, ids, cuts), piece_by_piece(model, ids, (4, 1))
        model.model.layers[1].register_forward_hook(again)
        assert torch.equal(piece_by_piece(model, ids, (4, 1)), expected[1])
    assert torch.equal(inner[0], expected[0])


@pytest.mark.parametrize(
    ("name", "part"),
    [("llama", "mlp"), ("biases of its own", "mlp"), ("biases of its own", "down"), ("llama", "whole")],
)
def test_compiled_in_part_or_as_a_whole(name, part):
    """A compiled part sees whether the bias is there; a graph of the whole decoder never has one."""
    torch._dynamo.reset()
    family, changes = MODELS[name]
    model = tiny_model(family, num_hidden_layers=1, **changes)
    plan, ids = shift_plan(model, ("ffn", "neuron")), IDS["input_ids"]
    with austeer.steer(model, plan, 0.7, scope="generation", mode="columns"):
        text, expected = model.generate(**IDS, **GREEDY), piece_by_piece(model, ids, (6, 1))
    with austeer.steer(model, plan, 0.7, scope="generation") as steering:
        assert torch.equal(model.generate(**IDS, **GREEDY), text)
        parts = {"mlp": [layer.mlp for layer in layers_of(model)], "down": [down(model, 0)]}
        for module in parts.get(part, [model]):
            module.compile(backend="eager")
        torch.testing.assert_close(piece_by_piece(model, ids, (6, 1)), expected, rtol=1e-4, atol=1e-4)
        assert any(row.compiled for row in steering.report())
        if part != "whole":
            assert torch.equal(model.generate(**IDS, **GREEDY), text)


# --- changed inside --------------------------------------------------------------------------------------------------


def step(model):
    """A training step; of a bias if there is one."""
    layer = down(model)
    (layer.weight if layer.bias is None else layer.bias).data.add_(0.5)


def own_bias(model):
    down(model).bias = nn.Parameter(torch.ones(32))


def count_versions(model):
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.05)


def another_layer(model):
    layer = down(model)
    model.model.layers[1].mlp.down_proj = nn.Linear(layer.in_features, 32, bias=False)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.copy_(layer.weight * 1.5)


def pruned(model):
    prune.random_unstructured(down(model), "weight", 0.4)
    if down(model).bias is not None:
        prune.custom_from_mask(down(model), "bias", torch.arange(32) % 2)


CHANGES = [step, own_bias, count_versions, another_layer, pruned, nn.Module.double, nn.Module.bfloat16]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["llama", "biases of its own"])
@pytest.mark.filterwarnings("ignore:.*steered modules were replaced")
def test_what_is_changed_between_two_generates(name, change):
    """It is as if the tensor were steered."""
    found = []
    for mode in ("columns", "auto"):
        model = build(name)
        # A weight that is written past its version counter is read again with the next strength.
        sites = ("ffn", "layer") if change in (step, another_layer) else SITES
        with austeer.steer(model, shift_plan(model, sites), 0.7, scope="generation", mode=mode):
            model.generate(**IDS, **GREEDY)
            torch.manual_seed(0)
            change(model)
            found.append(model.generate(**IDS, **GREEDY, output_logits=True, return_dict_in_generate=True).logits)
    if change is nn.Module.bfloat16:  # rounding may turn the tokens after the first
        torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=0.1)
    else:
        torch.testing.assert_close(*map(torch.stack, found), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_alpha_and_k_are_live(name):
    model = build(name)
    plan, found = shift_plan(model), []
    for mode in ("columns", "auto"):
        texts = []
        with austeer.steer(model, plan, 0.7, scope="generation", mode=mode) as steering:
            for steering.alpha, steering.k in ((0.7, 100), (-0.5, 60), (0.0, 100), (0.7, 3)):
                texts.append(model.generate(**IDS, **GREEDY, output_logits=True, return_dict_in_generate=True).logits)
        found.append(torch.cat([torch.stack(text) for text in texts]))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_alpha_that_changes_within_one_generate():
    model, found = tiny_model(), []
    for mode in ("columns", "auto"):
        with austeer.steer(model, shift_plan(model), 0.7, scope="generation", mode=mode) as steering:

            def later(ids, scores):
                steering.alpha = -1.0 * ids.shape[1] / 9
                return scores

            options = {"output_logits": True, "return_dict_in_generate": True, "logits_processor": [later]}
            found.append(torch.stack(model.generate(**IDS, **GREEDY, **options).logits))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_made_or_used_in_inference_mode(around):
    with around():
        model = tiny_model()
        steering = austeer.steer(model, shift_plan(model), 0.7, scope="generation").attach()
        first = model.generate(**IDS, **GREEDY)
    steering.alpha = 0.7
    with torch.inference_mode(not torch.is_inference_mode_enabled()):
        assert torch.equal(model.generate(**IDS, **GREEDY), first)
    steering.detach()
    with austeer.steer(model, shift_plan(model), 0.7, scope="generation", mode="columns"):
        assert torch.equal(model.generate(**IDS, **GREEDY), first)


# --- where the tensor is steered instead -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_formula(name):
    model, plain = build(name), build(name)
    plan, biases, own = shift_plan(model), seen(model), down(model).bias
    with formula_at(plain, plan, 0.7):
        plain(**IDS, use_cache=False).logits.square().mean().backward()
    with austeer.steer(model, plan, 0.7, scope="prompt"):
        model(**IDS, use_cache=False).logits.square().mean().backward()
    assert exchanged(biases, own) == [False]
    for (key, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-6, msg=key)


def test_dropout_after_a_projection_is_not_applied_to_the_shift():
    found = []
    for mode in ("columns", "auto"):
        model = tiny_model("gpt2", resid_pdrop=0.5)
        with austeer.steer(model, shift_plan(model), 0.7, scope="generation", mode=mode):
            model.train()
            torch.manual_seed(0)
            found.append(model.generate(**IDS, **GREEDY, output_logits=True, return_dict_in_generate=True).logits)
    assert torch.equal(*map(torch.stack, found))


def test_the_self_check_finds_a_product_without_its_bias(monkeypatch):
    model = tiny_model()
    before = snapshot(model)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: nn.functional.linear(x, self.weight))
    with pytest.raises(austeer.SteeringError, match="self-check: bias at site"):
        austeer.steer(model, shift_plan(model, "ffn"), 1.0, scope="generation").attach()
    assert_unchanged(model, before)
