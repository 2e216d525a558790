"""Whether a model runs shared prompts as it should, asked of the model; and counts that are the same either way."""

import copy
import functools

import pytest
import torch

import austeer
from austeer.forward.shared_prompts import TOLERANCE, tree_form
from austeer.forward.tree_masks import forms
from austeer.models.sites import find_sites
from austeer.models.structure import decoder_of
from letter_tokens import Letters, letter_pairs
from tiny_models import FAMILIES, NARROW, NO_TREE, tiny_model

CPU = torch.device("cpu")
COUNTS = ("positive", "negative")


def asked(model, names=None):
    return tree_form(model, find_sites(model, names), CPU)


def without(model, name):
    """The model, whose decoder no longer gets the argument ``name``."""
    decoder = decoder_of(model)
    forward = decoder.forward

    @functools.wraps(forward)
    def deaf(*args, **options):
        options.pop(name, None)
        return forward(*args, **options)

    decoder.forward = deaf
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_form_is_the_right_one(family):
    # Models on disk are not asked, since that would load them: they are given the first form of their family.
    model = tiny_model(family, **NARROW.get(family, {}))
    form, error = asked(model)
    assert form == next(iter(forms(model, decoder_of(model))), None)
    assert (form, error) == (None, None) if family in NO_TREE else error < 1e-5
    if form is not None:
        assert form == ("mapping" if getattr(model.config.get_text_config(), "layer_types", None) else "tensor")


@pytest.mark.parametrize(
    "dtype, implementation, layers",
    [
        (torch.float32, "sdpa", 30),
        (torch.bfloat16, "sdpa", 30),
        (torch.bfloat16, "eager", 30),
        (torch.float16, "sdpa", 8),  # a CPU takes its time
    ],
)
def test_rounding_is_told_from_a_mistake_on_a_real_model(demo, dtype, implementation, layers):
    model = copy.deepcopy(demo[0]).to(dtype)
    del model.model.layers[layers:]
    model.config.num_hidden_layers = layers
    model.set_attn_implementation(implementation)
    form, error = asked(model, ["attention", "layer"])
    assert form == "tensor" and error < 0.9 * TOLERANCE[dtype]
    for argument in ("attention_mask", "position_ids"):
        form, wrong = asked(without(model, argument), ["layer"])  # where a mistake shows least
        assert form is None and wrong > 1.5 * TOLERANCE[dtype], argument
        del model.model.forward


@pytest.mark.parametrize("argument", ["attention_mask", "position_ids"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral", "gpt2"])
def test_a_model_that_does_not_listen_is_measured_plainly(family, argument):
    pairs = letter_pairs(9)
    plain = austeer.measure(tiny_model(family), Letters(), pairs, share_prompts=False)
    deaf = without(tiny_model(family), argument)
    found = austeer.measure(deaf, Letters(), pairs)
    assert not found.report.shared_prompts and found.report.shared_error > 0.01
    assert found.report.tokens_run == found.report.tokens_texts
    assert_equal(found, plain)


@pytest.mark.parametrize(
    "error", [RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError, AssertionError]
)
def test_a_form_that_a_decoder_refuses_is_not_its_own(error):
    model = tiny_model("gemma2")
    forward = model.model.forward

    @functools.wraps(forward)
    def refuse(*args, attention_mask=None, **options):
        if isinstance(attention_mask, dict):
            raise error("what is this?")
        return forward(*args, attention_mask=attention_mask, **options)

    model.model.forward = refuse
    form, moved = asked(model)
    assert form == "tensor" and moved < 1e-5, "windows are wider than the texts, so one mask does"


def test_a_model_of_numbers_that_are_none():
    model = tiny_model("llama")
    model.model.embed_tokens.weight.data.fill_(float("nan"))
    assert asked(model) == (None, float("inf"))
    with pytest.raises(austeer.CaptureError, match="NaN"):
        austeer.measure(model, Letters(), letter_pairs(3))


def test_dropout_is_off_while_asking():
    model = tiny_model("llama").train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    form, error = asked(model)
    assert form == "tensor" and error < 1e-5
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("context", [10, 24])
def test_texts_fit_a_short_context(context):
    # Learned positions have no more rows than that.
    model = tiny_model("opt", max_position_embeddings=context)
    assert asked(model)[0] == "tensor"
    found = austeer.measure(model, Letters(), letter_pairs(5))
    assert found.cut > 0 and found.report.shared_prompts


@pytest.mark.parametrize("vocabulary", [3, 13, 26, 29, 31])
def test_a_small_vocabulary(vocabulary):
    model = tiny_model("llama", vocab_size=vocabulary)
    assert asked(model)[0] == "tensor"
    assert asked(without(model, "attention_mask"))[0] is None, "the texts must part"


def assert_equal(found, expected):
    for name, counters in expected.sites.items():
        for what in COUNTS:
            assert torch.equal(getattr(found.sites[name], what), getattr(counters, what)), (name, what)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in NO_TREE])
def test_counts_are_the_same_in_float64(family):
    # Rounding is too small to turn a comparison there, so any other difference is a mistake.
    model = tiny_model(family, **NARROW.get(family, {})).double()
    model.set_experts_implementation("eager")  # the grouped one knows no float64
    pairs = letter_pairs(12)
    found, plain = (austeer.measure(model, Letters(), pairs, share_prompts=share) for share in (True, False))
    report = found.report
    assert report.shared_prompts and report.shared_error < 1e-6 and not plain.report.shared_prompts
    assert report.tokens_run < 0.6 * report.tokens_texts == 0.6 * plain.report.tokens_run
    assert_equal(found, plain)
    for name, counters in plain.sites.items():
        torch.testing.assert_close(found.sites[name].delta_sum, counters.delta_sum, rtol=1e-4, atol=1e-5)
