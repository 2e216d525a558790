"""Sites: the right modules and widths in every family, and clear complaints elsewhere."""

import copy
import json
from dataclasses import replace

import peft
import pytest
import torch

import austeer
from austeer import Layout, SiteError, find_sites
from austeer.models.families import LAYOUTS
from austeer.models.sites import Fingerprint, fingerprint
from austeer.models.structure import decoder_of, input_device
from dense_formula import logits, random_plan
from tiny_models import FAMILIES, tiny_model


def test_known_model_in_numbers(demo):
    sites = find_sites(demo[0])
    assert {name: (len(found), found[0].width) for name, found in sites.items()} == {
        "attention": (30, 576),
        "ffn": (30, 576),
        "layer": (30, 576),
        "neuron": (30, 1536),
    }
    assert sites["attention"][29].path == "model.layers.29.self_attn.o_proj"
    assert sites["ffn"][3].path == "model.layers.3.mlp"


@pytest.mark.parametrize("family", FAMILIES)
def test_headless_compiled_and_wrapped_models_have_the_same_sites(family):
    model = tiny_model(family)
    full, bare = find_sites(model), find_sites(model.base_model)
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    compiled, decoder = torch.compile(model, backend="eager"), decoder_of(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=[full["attention"][0].path], r=2))
    inside = find_sites(wrapped)
    for name, found in full.items():
        assert [site.path for site in found] == [f"{prefix}{site.path}" for site in bare[name]]
        assert [(s.path, s.width) for s in inside[name]] == [(f"base_model.model.{s.path}", s.width) for s in found]
    assert find_sites(compiled) == full
    assert all(decoder_of(m) is decoder for m in (model.base_model, compiled, wrapped, torch.compile(wrapped), decoder))
    # What is run to measure: the language model, without head and vision tower.
    names = [name for name, _ in decoder.named_modules()]
    assert not any("vision" in name or "visual" in name or "lm_head" in name for name in names)
    assert fingerprint(model, full).model_type == model.config.get_text_config().model_type


def test_a_site_is_one_width_in_all_layers():
    model = tiny_model("qwen3_next", linear_value_head_dim=8)
    assert list(find_sites(model)) == ["ffn", "layer"]
    with pytest.raises(SiteError, match=r"'attention'.*qwen3_next.* 32 in layer 0.* 48 in layer 1"):
        find_sites(model, "attention")


def test_a_layout_by_hand_takes_alternatives_and_may_leave_out_the_down_projection(tiny):
    expected = find_sites(tiny)
    layout = Layout(
        layers="layers",
        attention=("attn", "self_attn.o_proj"),
        ffn=("moe", "mlp"),
        down=("w2", "mlp.down_proj"),
        residual="as it is",
    )
    assert find_sites(tiny, layout=layout) == expected
    without = find_sites(tiny, layout=replace(layout, down=()))
    assert list(without) == ["attention", "ffn", "layer"]
    assert [(s.path, s.projection, s.parts) for s in without["ffn"]] == [(s.path, None, ()) for s in expected["ffn"]]
    with pytest.raises(SiteError, match=r"'neuron'.*layer 0.*down projection"):
        find_sites(tiny, "neuron", layout=replace(layout, down=()))


def test_names_choose_and_repeat_only_once(tiny):
    assert list(find_sites(tiny, ["ffn", "attention", "ffn"])) == ["ffn", "attention"]
    assert len(find_sites(tiny, ["ffn", "ffn"])["ffn"]) == 3


def test_unknown_site(tiny):
    with pytest.raises(SiteError, match=r"'mlp'.*attention, ffn, layer, neuron"):
        find_sites(tiny, ["attention", "mlp"])


def test_a_family_that_is_not_in_the_table_is_found_by_structure_or_takes_a_layout(tiny):
    expected = find_sites(tiny)
    tiny.config.model_type = "novel"
    found = find_sites(tiny)
    assert {site.bias for site in found["layer"]} == {None}, "structure does not tell how a layer adds up"
    assert found == expected | {"layer": [replace(site, bias=None) for site in expected["layer"]]}
    for layer in tiny.model.layers:
        layer.second_mlp = copy.deepcopy(layer.mlp)
    with pytest.raises(SiteError, match=r"novel.*mlp, second_mlp.*layout="):
        find_sites(tiny)
    assert find_sites(tiny, layout=LAYOUTS["llama"]) == expected


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layers": "blocks"}, "'blocks'.*embed_tokens, layers"),
        ({"attention": "attn.out"}, r"layer 0.*llama.*'attn\.out'.*self_attn"),
        ({"ffn": "feed_forward"}, "'feed_forward'.*mlp.*layout="),
        ({"down": "mlp.up"}, r"'mlp\.up'"),
        ({"down": "mlp.act_fn"}, "SiLU.*in_features"),
    ],
)
def test_layout_that_does_not_fit(tiny, change, message):
    with pytest.raises(SiteError, match=message):
        find_sites(tiny, layout=Layout(**(vars(LAYOUTS["llama"]) | change)))


def test_model_without_config():
    with pytest.raises(SiteError, match=r"Linear.*config"):
        find_sites(torch.nn.Linear(2, 2))


def test_fingerprint_survives_json(demo):
    found = fingerprint(demo[0], find_sites(demo[0], ["attention", "neuron"]))
    assert found == Fingerprint(
        "llama", 30, {"attention": 576, "neuron": 1536}, "HuggingFaceTB/SmolLM2-135M-Instruct", None
    )
    assert Fingerprint.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_fingerprint_does_not_tell_where_a_folder_lay(tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "my-model")
    model = type(tiny).from_pretrained(tmp_path / "my-model")
    assert fingerprint(model, find_sites(model)).name == "my-model"


@pytest.mark.parametrize(
    "change",
    [
        {"layers": 0},
        {"layers": "30"},
        {"layers": None},
        {"widths": {"ffn": -1}},
        {"widths": [576]},
        {"widths": None},
        {"model_type": 7},
        {"extra": 1},
    ],
)
def test_what_is_no_fingerprint(change):
    data = {"model_type": "llama", "layers": 3, "widths": {"ffn": 8}, "name": "a", "revision": None} | change
    with pytest.raises((TypeError, ValueError)):
        Fingerprint.from_json(data)


def test_input_device_of_an_offloaded_model(tiny):
    assert input_device(tiny) == torch.device("cpu")
    offloaded = copy.deepcopy(tiny)
    offloaded.model.embed_tokens.to("meta")
    assert input_device(offloaded) == torch.device("cpu")


def test_layers_and_modules_that_are_one_are_refused(tiny):
    shared = copy.deepcopy(tiny)
    shared.model.layers[2].mlp = shared.model.layers[0].mlp
    with pytest.raises(SiteError, match=r"'ffn'.*layers 0 and 2.*model\.layers\.2\.mlp"):
        find_sites(shared, "ffn")
    assert len(find_sites(shared, "attention")["attention"]) == 3
    repeated = copy.deepcopy(tiny)
    repeated.model.layers = torch.nn.ModuleList([*tiny.model.layers[:2], tiny.model.layers[0]])
    with pytest.raises(SiteError, match="layers 0 and 2"):
        find_sites(repeated, "layer")


def test_a_config_that_bypasses_the_projections_is_refused():
    with pytest.raises(SiteError, match=r"slow_but_exact.*False"):
        find_sites(tiny_model("bloom", slow_but_exact=True, pretraining_tp=2))


def test_layers_that_return_lists_are_steered_and_captured():
    model = tiny_model("openai-gpt", n_embd=32, n_layer=3, n_head=4, n_positions=64)
    ids = {"input_ids": torch.tensor([[3, 4, 5]])}
    plan = random_plan(model, "layer", 20)
    plain = logits(model, ids)
    with austeer.steer(model, plan, 2.0):
        assert not torch.equal(logits(model, ids), plain)
