"""Fewer layers than there are: the same counts of those asked for, the others not run, and the model whole again."""

import copy
from collections import Counter

import numpy as np
import peft
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, MusicgenForConditionalGeneration

import austeer
from austeer import Momentum, SiteError
from austeer.forward.causality import is_causal
from austeer.models.sites import find_sites, layers_path
from austeer.models.skeleton import named_dtype
from austeer.models.structure import first_layers, input_device, vocabulary_size
from letter_tokens import Letters, letter_pairs
from tiny_models import FAMILIES, tiny_model


def measured(model, layers=None, sites=None, pairs=6, **options):
    return austeer.measure(
        model, Letters(), letter_pairs(pairs), sites or list(find_sites(model)), layers=layers, **options
    )


def modules(model):
    return [(name, id(module)) for name, module in model.named_modules()]


@pytest.fixture
def llama():
    return tiny_model("llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_those_of_the_whole_measurement(family):
    model = tiny_model(family)
    before, state, count = modules(model), copy.deepcopy(model.state_dict()), len(find_sites(model)["layer"])
    whole = measured(model, max_length=64)
    for layers in ([1], [0, count - 1]):
        part = measured(model, layers, max_length=64)
        assert part.layers == tuple(layers) and part.model == whole.model and part.pairs == whole.pairs
        for name, counters in whole.sites.items():
            for what, t in counters.tensors().items():
                assert torch.equal(part.sites[name].tensors()[what], t[layers]), (name, what, "bit for bit")
    assert modules(model) == before
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "falcon", "mpt", "gemma3", "qwen3_next"])
def test_layers_above_are_not_run(family, share):
    model, ran = tiny_model(family), Counter()
    layers = model.get_submodule(layers_path(model))
    assert is_causal(model)  # asked once for a model, of the first layer of each kind
    for number, layer in enumerate(layers):
        layer.register_forward_hook(lambda module, args, output, number=number: ran.update([number]))
    measured(model, [1], max_length=64, share_prompts=share)
    assert set(ran) == {0, 1} and ran[0] == ran[1], "also not to find out about shared prompts"
    ran.clear()
    measured(model, [0], max_length=64, share_prompts=share)
    assert set(ran) == {0}


@pytest.mark.parametrize("where", ["embedding", "layer"])
def test_the_model_is_whole_again_after_an_exception(llama, where):
    llama.train()
    before = modules(llama)
    module = llama.model.embed_tokens if where == "embedding" else llama.model.layers[0].mlp

    def fail(*args):
        assert len(llama.model.layers) == 1
        raise KeyboardInterrupt

    handle = module.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        measured(llama, [0])
    handle.remove()
    assert modules(llama) == before and all(m.training for m in llama.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.modules())
    assert measured(llama).layers == (0, 1, 2)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("headless", [False, True])
def test_headless_and_compiled_models(llama, headless, compiled):
    expected = measured(llama, None, ["layer"]).counters("layer")
    model = llama.model if headless else llama
    model = torch.compile(model, backend="eager") if compiled else model
    for layers in ([0, 1], [0, 1, 2]):
        found = measured(model, layers, ["layer"]).counters("layer")
        assert torch.equal(found.positive, expected.positive[layers])


@pytest.mark.parametrize(
    "asked, layers", [([2, 0, 2], (0, 2)), (range(2), (0, 1)), (1, (1,)), (np.arange(1, 3), (1, 2))]
)
def test_layers_in_any_order_and_form(llama, asked, layers):
    found = measured(llama, asked, ["ffn"])
    assert found.layers == layers and found.counters("ffn").positive.shape == (len(layers), 32)
    assert all(type(n) is int for n in found.layers)


@pytest.mark.parametrize(
    "asked, shown", [([], "'none'"), ([3], "3"), ([0, -1], "-1"), ([True], "True"), ("1", "'1'"), ([1.0], "1.0")]
)
def test_layers_that_are_not_there(llama, asked, shown):
    with pytest.raises(SiteError, match=f"layers.*{shown}.* 0 to 2"):
        measured(llama, asked, ["ffn"])


# --- what comes of it ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", ["effect", "public"])
def test_a_plan_names_the_models_layers(llama, ties):
    whole, part = measured(llama, None, ["ffn"], 20), measured(llama, [0, 2], ["ffn"], 20)
    expected = [unit for unit in whole.select("ffn", k=96, ties=ties) if unit.layer != 1]
    found = list(part.select("ffn", k=64, ties=ties))
    assert found == expected and {unit.layer for unit in found} == {0, 2}
    with austeer.steer(llama, part.select("ffn", k=3), alpha=0.5):
        llama(torch.tensor([[5, 6, 7]]))


def test_files_keep_the_layers(llama, tmp_path):
    part = measured(llama, [0, 2], ["ffn"])
    loaded = Momentum.load(part.save(tmp_path / "m.safetensors"))
    assert loaded.layers == (0, 2) and loaded.select("ffn", k=9) == part.select("ffn", k=9)
    assert loaded.report is None
    assert part.merge(loaded).layers == (0, 2) and part.merge(loaded).pairs == 12


def test_the_layer_at_fault_is_the_models(llama):
    llama.model.layers[2].mlp.down_proj.weight.data[5, 3] = float("nan")
    with pytest.raises(austeer.CaptureError, match=r"'ffn', layer 2, AU 5.*NaN"):
        measured(llama, [0, 2], ["ffn"])
    measured(llama, [0, 1], ["ffn"])


# --- the context by itself -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_a_list_of_modules_is_shorter_for_a_while(llama, count):
    layers, before = llama.model.layers, modules(llama)
    kept = list(layers)[:count]
    with first_layers(llama, "model.layers", count):
        assert list(llama.model.layers) == kept
        assert not llama.model.layers.training
        assert not any(name.startswith(f"model.layers.{count}") for name in llama.state_dict())
    assert llama.model.layers is layers and modules(llama) == before


# --- models that are no decoder of text alone ------------------------------------------------------------------------


def test_a_config_with_several_text_models_is_refused_by_its_class():
    config = AutoConfig.for_model("musicgen", **{
        part: {"model_type": kind} for part, kind in (("text_encoder", "t5"), ("audio_encoder", "encodec"))
    }, decoder={"model_type": "musicgen_decoder"})  # fmt: skip
    with torch.device("meta"):
        model = MusicgenForConditionalGeneration._from_config(config)
    for attempt in (lambda: find_sites(model), lambda: named_dtype(config)):
        with pytest.raises(SiteError, match=r"musicgen\).*text_encoder.*decoder"):
            attempt()
    with pytest.raises(SiteError, match="MusicgenForConditionalGeneration"):
        find_sites(model)


@pytest.mark.parametrize("family", ["t5", "bart", "marian", "m2m_100", "blenderbot"])
def test_encoder_decoders_are_refused_by_their_class(family):
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(family))
    with pytest.raises(SiteError, match=rf"{type(model).__name__}.*encoder and a decoder.*decoder alone"):
        find_sites(model)


@pytest.mark.parametrize("family", ["vit", "wav2vec2", "clip"])
def test_models_that_take_no_text_tokens_are_refused_by_their_class(family):
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(family))
    for ask in (vocabulary_size, input_device):
        with pytest.raises(SiteError, match=rf"{type(model).__name__}.*text tokens"):
            ask(model)


def test_an_embedding_with_an_adapter_counts_its_tokens(llama):
    wrapped = peft.get_peft_model(llama, peft.LoraConfig(target_modules=["embed_tokens"], r=2))
    assert vocabulary_size(wrapped) == 64 and input_device(wrapped).type == "cpu"
