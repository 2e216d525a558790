"""Texts as a tree: in every family each looks as it does alone, with windows and chunks, eager and sdpa."""

import pytest
import torch
from transformers import MistralModel

from austeer.forward.capture import LastTokens
from austeer.forward.packing import batches
from austeer.forward.tree_masks import forms, longest_short_text
from austeer.models.sites import find_sites
from austeer.models.structure import decoder_of
from tiny_models import FAMILIES, NARROW, NO_TREE, tiny_model


def words(seed, count):
    return torch.randint(3, 60, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


# One tree of 12 texts with branches of branches, more columns than the models have positions (128), and some by
# themselves.
PROMPT = words(0, 50)
TEXTS = [
    *([*PROMPT, 3 + n, *words(n, 7)] for n in range(11)),
    PROMPT[:30] + words(20, 20),
    PROMPT[:30] + words(20, 12) + words(21, 4),
    PROMPT[:9],
    words(22, 17),
    words(23, 3),
]


def activations(model, form=None):
    """Last-token activations of each text, alone or as trees: site name -> [texts, layers, width]."""
    sites = find_sites(model, ["attention", "layer"])
    capture = LastTokens(model, sites, len(TEXTS))
    if form is None:
        run = [batch for i, text in enumerate(TEXTS) for batch in _only(i, batches([text], 1, False))]
    else:
        capture.tree = form
        run = list(batches(TEXTS, 1000))
        assert max(batch.ids.shape[1] for batch in run if batch.sees is not None) > 128
        assert sum(batch.tokens for batch in run) < 0.4 * sum(map(len, TEXTS))
    with capture.attached():
        for batch in run:
            capture.run(batch)
    return capture.buffers


def _only(number, found):
    for batch in found:
        batch.texts.fill_(number)
        yield batch


def error(found, expected):
    """The largest difference in any layer, relative to the largest value there."""
    return max(
        float(((found[name] - t).abs().amax((0, 2)) / t.abs().amax((0, 2))).max()) for name, t in expected.items()
    )


def form_of(model):
    return next(iter(forms(model, decoder_of(model))))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in NO_TREE])
def test_a_tree_equals_each_text_alone(family):
    model = tiny_model(family)
    assert error(activations(model, form_of(model)), activations(model)) < 1e-5


@pytest.mark.parametrize("family", NARROW)
def test_windows_and_chunks_are_counted_in_positions(family):
    wide, narrow = tiny_model(family), tiny_model(family, **NARROW[family])
    expected = activations(narrow)
    assert error(activations(wide), expected) > 0.02, "the window must matter to this test"
    assert form_of(narrow) == form_of(wide), "short texts show nothing of windows, so they may not decide"
    assert error(activations(narrow, form_of(narrow)), expected) < 1e-5


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3", "llama4_text", "qwen2_vl", "gpt2", "opt"])
def test_eager_and_sdpa(family, implementation):
    model = tiny_model(family, **NARROW.get(family, {}))
    model.set_attn_implementation(implementation)
    assert error(activations(model, form_of(model)), activations(model)) < 1e-5


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-6), (torch.bfloat16, 0.1), (torch.float16, 0.01)])
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "opt"])
def test_other_dtypes(family, dtype, bound):
    model = tiny_model(family, **NARROW.get(family, {})).to(dtype)
    assert error(activations(model, form_of(model)), activations(model)) < bound


@pytest.mark.parametrize("family", ["llama", "glm4", "stablelm", "gpt_neox"])
def test_a_window_that_the_model_ignores_is_ignored(family):
    model = tiny_model(family, sliding_window=6)
    assert model.config.sliding_window == 6
    assert error(activations(model, form_of(model)), activations(model)) < 1e-5


def test_a_subclass_from_elsewhere_has_the_windows_of_its_parent():
    model = tiny_model("mistral", sliding_window=6)
    model.model.__class__ = type("Mine", (MistralModel,), {"__module__": "no.module.of.this.name"})
    assert error(activations(model, form_of(model)), activations(model)) < 1e-5


def test_a_mask_of_the_other_kind_is_wrong():
    # What tells the forms apart: one mask for all kinds of layers gives something else.
    model = tiny_model("gemma2", **NARROW["gemma2"])
    assert forms(model, decoder_of(model)) == ("mapping", "tensor")
    assert error(activations(model, "tensor"), activations(model)) > 0.02


_HALF = 4  # pairs of entries in a rotary embedding of head_dim 8

#: Positions that are scaled otherwise in texts of more than 32 tokens, for all texts of a batch alike.
LONGROPE = {
    "head_dim": 8,
    "max_position_embeddings": 128,
    "original_max_position_embeddings": 32,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * _HALF,
        "long_factor": [4.0] * _HALF,
        "original_max_position_embeddings": 32,
    },
}


@pytest.mark.parametrize("share", [False, True])
def test_texts_beyond_the_original_context_do_not_change_the_others(share):
    model = tiny_model("phi3", **LONGROPE)
    apart = longest_short_text(model)
    assert apart == 32
    sites = find_sites(model, ["attention", "layer"])

    def run(apart):
        capture = LastTokens(model, sites, len(TEXTS))
        with capture.attached():
            for batch in batches(TEXTS, 1000, share, apart):
                capture.run(batch)
        return capture.buffers

    expected = activations(model)
    assert error(run(None), expected) > 0.02, "together they would"
    assert error(run(apart), expected) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_elsewhere_texts_of_any_length_may_meet(family):
    assert longest_short_text(tiny_model(family)) is None


def test_falcon_with_alibi_counts_along_the_row():
    for alibi in (False, True):
        model = tiny_model("falcon", alibi=alibi)
        assert list(forms(model, decoder_of(model))) == ([] if alibi else ["tensor"])


def test_attention_that_takes_no_mask():
    model = tiny_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    assert list(forms(model, decoder_of(model))) == []


def test_a_decoder_without_positions():
    model = tiny_model("llama")
    forward = model.model.forward
    model.model.forward = lambda input_ids=None, attention_mask=None, **options: forward(input_ids, attention_mask)
    assert list(forms(model, model.model)) == []


def test_an_unknown_family_may_count_windows_along_the_row():
    model = tiny_model("llama")
    model.config.model_type = "gpt_neo"  # which does, and would be measured wrongly, in silence
    assert list(forms(model, decoder_of(model))) == []


def test_a_model_that_says_it_is_bidirectional_takes_no_tree():
    """Also where nothing can be asked of it: on the meta device, for an estimate."""
    with torch.device("meta"):
        model = tiny_model("gemma3_text", use_bidirectional_attention=True)
    assert not list(forms(model, decoder_of(model)))
