"""The structural detector: what it finds without the table, and what it refuses."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import peft
import pytest
import torch
from torch import nn

import austeer
from austeer import SiteError, find_sites
from austeer.models.detect import detect
from austeer.models.families import LAYOUTS
from austeer.models.structure import decoder_of, text_config
from dense_formula import formula_logits, logits, random_plan
from tiny_models import FAMILIES, tiny_model


@pytest.fixture
def no_table(monkeypatch):
    for family in list(LAYOUTS):
        monkeypatch.delitem(LAYOUTS, family)


@pytest.fixture
def expected_of():
    """The sites by the table, cleared or not: taken before. How layers add up, structure does not tell."""
    table = {name: replace(layout, shared="", residual="") for name, layout in LAYOUTS.items()}
    return lambda model: find_sites(model, layout=table[text_config(model).model_type])


@pytest.mark.parametrize("family", FAMILIES)
def test_finds_in_every_family_what_the_table_says(expected_of, no_table, family):
    model = tiny_model(family)
    assert find_sites(model) == expected_of(model)
    assert find_sites(model.base_model)["layer"][0].width == 32


@pytest.mark.parametrize(
    "family", ["bloom", "deepseek_v3", "gpt_neox", "llama", "opt", "phi", "qwen3_moe", "starcoder2"]
)
def test_square_layers(expected_of, no_table, family):
    """Every linear layer of the feed-forward block, and of attention, is square: only names tell them apart."""
    sizes = {"intermediate_size": 32, "moe_intermediate_size": 32, "ffn_dim": 32, "num_key_value_heads": 4}
    sizes |= {"v_head_dim": 8} if family == "deepseek_v3" else {"head_dim": 8}
    model = tiny_model(family, **sizes)
    assert find_sites(model) == expected_of(model)


def test_sees_through_lora(expected_of, no_table):
    model = tiny_model("llama")
    expected = expected_of(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["o_proj", "down_proj", "up_proj"], r=32))
    found = find_sites(wrapped)
    for name in expected:
        assert [s.path for s in found[name]] == [f"base_model.model.{s.path}" for s in expected[name]]


def found_in(model):
    return detect(decoder_of(model), text_config(model), "Novel (novel)")


def change_layers(change):
    def apply(model):
        for layer in model.model.layers:
            change(layer)

    return apply


def second_list(model):
    model.model.others = copy.deepcopy(model.model.layers)


def square_and_nameless(layer):
    layer.mlp.a, layer.mlp.b = nn.Linear(48, 32), nn.Linear(48, 32)
    del layer.mlp.down_proj


@pytest.mark.parametrize(
    "change, message",
    [
        (second_list, "3 decoder layers.* layers, others.*LlamaModel"),
        (lambda m: setattr(m.config, "num_hidden_layers", 5), "5 decoder layers.*none.*LlamaModel"),
        (lambda m: setattr(m.config, "is_encoder_decoder", True), "encoder.*decoder"),
        (change_layers(lambda layer: delattr(layer, "self_attn")), "attention.*none.*mlp"),
        (
            change_layers(lambda layer: setattr(layer, "attn2", copy.deepcopy(layer.self_attn))),
            "layer 0.*attention.*self_attn, attn2",
        ),
        (change_layers(lambda layer: delattr(layer, "mlp")), "MLP.*none.*self_attn"),
        (change_layers(lambda layer: setattr(layer, "shared_mlp", copy.deepcopy(layer.mlp))), "MLP.*mlp, shared_mlp"),
        (change_layers(square_and_nameless), "32 .*mlp.a, mlp.b.*mlp.gate_proj"),
        (
            change_layers(lambda layer: setattr(layer.mlp, "post_norm", nn.LayerNorm(32, elementwise_affine=False))),
            r"layer 0.*mlp\.post_norm.*LayerNorm",
        ),
        (
            change_layers(lambda layer: setattr(layer.self_attn, "o_proj", nn.Linear(48, 31))),
            r"32 .*self_attn.*none.*self_attn\.q_proj",
        ),
    ],
)
def test_what_is_ambiguous_or_missing_is_refused_with_what_was_found(change, message):
    model = tiny_model("llama")
    change(model)
    with pytest.raises(SiteError, match=rf"(?s)Novel.*{message}.*Layout\(layers='layers'"):
        found_in(model)


def test_a_config_that_does_not_say_how_many_layers_there_are():
    with pytest.raises(SiteError, match=r"num_hidden_layers.*hidden_size.*none"):
        detect(tiny_model("llama").model, SimpleNamespace(hidden_size=32), "Novel (novel)")


def test_layers_of_two_kinds_that_one_list_of_alternatives_cannot_tell_apart():
    model = tiny_model("llama")
    attention = model.model.layers[1].self_attn
    attention.dense, attention.o_proj = attention.o_proj, nn.Identity()
    with pytest.raises(SiteError, match=r"layer 1.*self_attn.o_proj, self_attn.dense"):
        found_in(model)


IDS = {"input_ids": torch.tensor([[3, 1, 40, 22, 9]])}


@pytest.mark.parametrize(
    "family, ffn, changes",
    [
        ("gpt_bigcode", "mlp", {"n_embd": 32, "n_layer": 3, "n_head": 4}),
        ("hunyuan_v1_moe", "mlp", {"num_experts_per_tok": 2, "num_local_experts": 4}),
        ("lfm2", "feed_forward", {}),
        ("persimmon", "mlp", {"head_dim": 8}),
        ("seed_oss", "mlp", {}),
        ("solar_open", "mlp", {"num_experts_per_tok": 2, "n_routed_experts": 4, "moe_intermediate_size": 24}),
        ("xglm", "fc2", {"d_model": 32, "num_layers": 3, "attention_heads": 4, "ffn_dim": 48}),
    ],
)
def test_families_that_are_not_in_the_table(family, ffn, changes):
    assert family not in LAYOUTS
    model = tiny_model(family, **changes)
    sites, plain = find_sites(model), logits(model, IDS)
    assert all(site.path.endswith(f".{ffn}") for site in sites["ffn"])
    for site in sites:
        plan = random_plan(model, site, 30)
        expected = formula_logits(model, IDS, plan, 1.5)
        with austeer.steer(model, plan, 1.5) as steering:
            got = logits(model, IDS)
            assert {row.path for row in steering.report()} == {"columns" if site == "layer" else "fold"}
        assert (expected - plain).abs().max() > 1e-2
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model, IDS), plain)


def test_a_mixture_that_is_not_understood_has_sites_but_is_not_folded(no_table):
    """A list of experts, as in models with code of their own."""
    model = tiny_model("mixtral")

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(32, 2)
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32)) for _ in "ab")

        def forward(self, x):
            weights = self.gate(x).softmax(-1)
            return sum(weights[..., i, None] * expert(x) for i, expert in enumerate(self.experts))

    for layer in model.model.layers:
        layer.mlp = Block()
    sites = find_sites(model)
    assert list(sites) == ["attention", "ffn", "layer"]
    assert {(s.projection, s.parts) for s in sites["ffn"]} == {(None, ())}
    with torch.no_grad():
        assert model(torch.arange(5)[None]).logits.isfinite().all()


def test_a_second_block_beside_projections_in_the_layer_is_refused(no_table):
    model = tiny_model("opt")
    for layer in model.model.decoder.layers:
        layer.adapter = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 32))
    with pytest.raises(SiteError, match=r"MLP.*adapter, fc2"):
        find_sites(model)


def test_a_mixture_after_dense_layers_has_a_summed_output(no_table):
    model = tiny_model("deepseek_v3")
    for layer in model.model.layers[1:]:
        layer.mlp.experts = nn.ModuleList([nn.Linear(32, 32)])  # of no kind that is understood
    sites = find_sites(model)
    assert sites["ffn"][0].parts and not sites["ffn"][1].parts and "neuron" not in sites


def test_experts_kept_in_embeddings_are_no_dense_block(no_table):
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp.keys = nn.Embedding(4, 32)
    with pytest.raises(SiteError, match=r"embedding.*mlp"):
        find_sites(model)
