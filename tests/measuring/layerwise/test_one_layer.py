"""One layer in the model's own forward pass: what else it may be given, and what is found out and refused."""

import pytest
import torch
from torch import nn
from transformers import LlamaModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.gptj.modeling_gptj import GPTJBlock, GPTJModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from austeer import find_sites
from austeer.measuring.layerwise.layerwise import Layerwise, why_not
from austeer.measuring.layerwise.one_layer import Anatomy, LayerwiseError
from austeer.models.families import LAYOUTS
from layer_runs import assert_equal, blocks_of, in_plain_order, layer_by_layer, snapshot
from tiny_models import tiny_model


class PerLayerInputs(LlamaModel):
    """Every layer is given something made from the token embedding."""

    def forward(self, input_ids=None, **kwargs):
        return super().forward(input_ids, per_layer=self.embed_tokens(input_ids).mean(-1), **kwargs)


class SharedState(LlamaModel):
    """Layers are given something in which they may leave things for others."""

    def forward(self, input_ids=None, **kwargs):
        return super().forward(input_ids, shared={}, **kwargs)


class FromFirstLayer(GPTJModel):
    """What layer 0 returns beside its output is handed to those above."""

    def forward(self, input_ids=None, **kwargs):
        hidden, beside = self.wte(input_ids), None
        positions = torch.arange(input_ids.shape[1])[None]
        for block in self.h:
            hidden, weights = block(hidden, position_ids=positions, layer_past=beside)[:2]
            beside = weights if beside is None else beside
        return self.ln_f(hidden)


class WithoutPast(GPTJBlock):
    """Takes what layer 0 returns, and makes no use of it."""

    def forward(self, hidden, position_ids=None, layer_past=None):
        return super().forward(hidden, position_ids=position_ids, attention_mask=None, use_cache=False)


@pytest.mark.parametrize(
    ("family", "changed", "name"),
    [
        ("llama", PerLayerInputs, "layer 0.* per_layer"),
        ("llama", SharedState, "layer 0.* shared,"),
        ("gptj", FromFirstLayer, "layer 1.* layer_past"),
    ],
)
def test_layers_that_take_more_are_refused(family, changed, name):
    model = tiny_model(family)
    decoder = model.get_decoder()
    decoder.__class__ = changed
    if changed is FromFirstLayer:
        for block in decoder.h:
            block.__class__ = WithoutPast
    before = snapshot(model)
    with pytest.raises(LayerwiseError, match=rf"\({family}\): {name}.*strategy='resident'"):
        layer_by_layer(model, find_sites(model, ["attention"]), blocks_of())
    assert snapshot(model) == before


@pytest.mark.skipif("gemma4_unified_text" not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, reason="a newer family")
def test_a_real_family_with_shared_keys_and_values(monkeypatch):
    model = tiny_model("gemma4_unified_text")
    with pytest.raises(LayerwiseError, match=r"gemma4_unified_text.*family"):
        Layerwise(model, {})
    sites = find_sites(model, ["layer"])
    monkeypatch.setitem(LAYOUTS, "gemma4_unified_text", LAYOUTS["llama"])
    with pytest.raises(LayerwiseError, match=r"layer 0.*shared_kv_states"):
        layer_by_layer(model, sites, blocks_of())


def test_families_that_are_not_known_and_weights_that_are_nowhere():
    assert "family" in why_not(tiny_model("persimmon"))
    with torch.device("meta"):
        assert "meta device" in why_not(tiny_model())
    assert why_not(tiny_model()) is None


def quantised(model):
    model.config.quantization_config = {"quant_method": "other"}
    return "quantised"


def split(model):
    class Split(nn.Parameter):
        device_mesh, placements = object(), ()

    model.model.layers[1].mlp.up_proj.weight = Split(torch.zeros(48, 32))
    return "split"


def compiled(model):
    model.model.layers[0].compile()
    return "compiled"


def other_embedding(model):
    class Lookup(nn.Module):
        pass

    model.model.embed_tokens = Lookup()
    return "Lookup"


@pytest.mark.parametrize("change", [quantised, split, compiled, other_embedding])
def test_models_that_are_refused(change):
    model = tiny_model()
    found = change(model)
    with pytest.raises(LayerwiseError, match=rf"\(llama\): .*{found}.*strategy='resident'"):
        Anatomy(model)
    assert found in why_not(model)


def test_what_others_hooked_on_the_layers_has_its_effect():
    model = tiny_model()
    sites, blocks = find_sites(model), blocks_of()
    plain = in_plain_order(model, sites, blocks)
    model.model.layers[0].register_forward_hook(lambda module, args, output: -output)
    model.model.layers[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    expected = in_plain_order(model, sites, blocks)
    assert not torch.equal(expected["layer"]["positive"], plain["layer"]["positive"])
    assert_equal(layer_by_layer(model, sites, blocks)[0], expected)


class Full(LlamaDecoderLayer):
    """A layer that runs out of memory on more than three rows."""

    largest = 0

    def forward(self, hidden_states, **kwargs):
        if hidden_states.shape[0] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        Full.largest = max(Full.largest, hidden_states.shape[0])
        return super().forward(hidden_states, **kwargs)


@pytest.mark.parametrize("share", [False, True])
def test_batches_that_do_not_fit_run_in_halves(share):
    model = tiny_model()
    sites, blocks = find_sites(model), blocks_of((9,), tokens=400, share=share)
    assert max(batch.ids.shape[0] for batch in blocks[0].batches) > 5
    expected = in_plain_order(model, sites, blocks)
    model.model.layers[1].__class__ = Full
    found, _ = layer_by_layer(model, sites, blocks)
    assert Full.largest > 1
    for name in sites:  # other batch sizes round otherwise: the counts may differ where values nearly tie
        difference = (found[name]["delta_sum"] - expected[name]["delta_sum"]).abs().max()
        assert difference < 1e-4 * expected[name]["delta_sum"].abs().max()


def test_row_that_does_not_fit():
    model = tiny_model()

    class Tiny(LlamaDecoderLayer):
        def forward(self, hidden_states, **kwargs):
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.model.layers[0].__class__ = Tiny
    before = snapshot(model)
    with pytest.raises(LayerwiseError, match=r"\d+ tokens .*cpu.*max_length"):
        layer_by_layer(model, find_sites(model), blocks_of())
    assert snapshot(model) == before
