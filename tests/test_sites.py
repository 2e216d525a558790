"""Sites: the right modules and widths in every family, and clear complaints elsewhere."""

import copy
import json

import pytest
import torch

from austeer import Layout, SiteError, find_sites
from austeer.sites import LAYOUTS, SITE_NAMES, Fingerprint, decoder_of, fingerprint, input_device


@pytest.mark.parametrize("family", LAYOUTS)
def test_sites_are_what_the_table_says(tiny_of, family):
    model = tiny_of(family)
    sites = find_sites(model)
    assert list(sites) == list(SITE_NAMES)
    seen = {}

    def remember(path, side):
        module = model.get_submodule(path)
        if side == "input":
            return module.register_forward_pre_hook(lambda m, args: seen.__setitem__((path, side), args[0]))
        return module.register_forward_hook(
            lambda m, args, out: seen.__setitem__((path, side), out[0] if isinstance(out, tuple) else out)
        )

    for name, found in sites.items():
        assert [site.layer for site in found] == [0, 1, 2] and {site.name for site in found} == {name}
        for site in found:
            remember(site.path, site.side)
            if site.projection:
                remember(site.projection, site.side)
    with torch.no_grad():
        hidden = model(torch.arange(5)[None], output_hidden_states=True).hidden_states
    for name, found in sites.items():
        for site in found:
            tensor = seen[site.path, site.side]
            assert tensor.shape == (1, 5, site.width), site
            # What is folded into or fused with the projection is the site's own tensor.
            assert site.projection is None or torch.equal(seen[site.projection, site.side], tensor), site
        assert (found[0].projection is None) == (name == "layer")
    # The layer site is the residual stream; only the last of hidden_states has gone through the final norm.
    for site in sites["layer"][:-1]:
        assert torch.equal(seen[site.path, "output"], hidden[site.layer + 1]), site
    # A neuron is an input of the projection whose output is the ffn site.
    for ffn, neuron in zip(sites["ffn"], sites["neuron"]):
        assert ffn.projection == neuron.projection == neuron.path


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


def test_headless_and_compiled_models_have_the_same_sites(tiny):
    full, bare = find_sites(tiny), find_sites(tiny.model)
    for name in SITE_NAMES:
        assert [site.path for site in full[name]] == [f"model.{site.path}" for site in bare[name]]
    assert find_sites(torch.compile(tiny, backend="eager")) == full
    assert decoder_of(tiny) is decoder_of(tiny.model) is tiny.model


def test_names_choose_and_repeat_only_once(tiny):
    assert list(find_sites(tiny, ["ffn", "attention", "ffn"])) == ["ffn", "attention"]
    assert len(find_sites(tiny, ["ffn", "ffn"])["ffn"]) == 3


def test_unknown_site(tiny):
    with pytest.raises(SiteError, match=r"site 'mlp' is not known; expected one of attention, ffn, layer, neuron"):
        find_sites(tiny, ["attention", "mlp"])


def test_unknown_family_lists_the_known_and_takes_a_layout(tiny):
    expected = find_sites(tiny)
    tiny.config.model_type = "novel"
    with pytest.raises(SiteError, match=r"family 'novel' is not known; known are cohere, .*layout=austeer\.Layout"):
        find_sites(tiny)
    assert find_sites(tiny, layout=LAYOUTS["llama"]) == expected


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layers": "blocks"}, r"has no module 'blocks'; found embed_tokens, layers"),
        (
            {"attention": "attn.out"},
            r"layer 0 of LlamaForCausalLM \(llama\) has no module 'attn\.out'; found self_attn",
        ),
        ({"ffn": "feed_forward"}, r"has no module 'feed_forward'; found .*mlp.*layout=austeer\.Layout"),
        ({"down": "mlp.up"}, r"has no module 'mlp\.up'"),
        ({"down": "mlp.act_fn"}, r"SiLU.*: found no in_features, expected a linear layer"),
    ],
)
def test_layout_that_does_not_fit(tiny, change, message):
    with pytest.raises(SiteError, match=message):
        find_sites(tiny, layout=Layout(**(vars(LAYOUTS["llama"]) | change)))


def test_model_without_config():
    with pytest.raises(SiteError, match="Linear: found no config, expected a Transformers model"):
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
