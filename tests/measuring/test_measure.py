"""measure(): equal to a naive loop on a real model, and nothing left behind; texts, tokenizers, complaints."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BloomConfig, BloomForCausalLM

import austeer
from austeer import CaptureError, Layout, PairsError, SelectionError, SiteError
from austeer.demo.demo import load_data
from austeer.forward.capture import LastTokens
from austeer.forward.packing import batches
from austeer.models.sites import find_sites
from naive_momentum import SITES, assert_like, naive_activations, numbered_pairs, texts_of


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_counts_equal_a_naive_loop_on_a_real_model(demo, measured):
    model, tokenizer = demo
    pairs = load_data().tuning[:24]
    texts = texts_of(pairs)
    naive = naive_activations(model, tokenizer, texts)

    # How much batching and padding moves an activation, by site and layer: the longest and shortest texts in one batch.
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    sample = order[:8] + order[-8:]
    capture = LastTokens(model, find_sites(model, SITES), len(sample))
    with capture.attached():
        for batch in batches([tokenizer(texts[i])["input_ids"] for i in sample], 10**6):
            capture.run(batch)

    assert measured.pairs == 24 and measured.cut == 0
    for name in SITES:
        error = (capture.buffers[name] - naive[name][sample]).abs().amax((0, 2))  # [layers]
        scale = naive[name].abs().amax((0, 2))
        assert (error <= 1e-4 * scale).all(), "more than rounding: padding or positions are wrong"
        # Two activations err in a difference, and 16 texts do not hold the largest error of 48.
        delta = (naive[name][:24] - naive[name][24:]).double()  # [pairs, layers, width]
        near = delta.abs() <= 4 * error[:, None].double()
        counters = measured.counters(name)
        differing = torch.zeros_like(counters.positive, dtype=torch.bool)
        for counted, wins in ((counters.positive, delta > 0), (counters.negative, delta < 0)):
            differing |= counted != wins.sum(0)
            certain, ties = (wins & ~near).sum(0), near.sum(0)
            assert ((certain <= counted) & (counted <= certain + ties)).all(), "a count that no near tie explains"
        assert near.double().mean() < 0.02, "the rounding bound is too wide to test anything"
        assert differing.double().mean() < 0.01

        torch.testing.assert_close(counters.delta_sum, delta.sum(0), rtol=0, atol=24 * 4 * float(error.max()))
        size = delta.abs().amax((0, 2))[:, None]
        bound = 24 * 8 * error[:, None].double() * size
        assert ((counters.delta_square_sum - delta.square().sum(0)).abs() <= bound).all()


def test_counts_are_exact_where_each_text_runs_alone(tiny, demo):
    # With batches of one text nothing is padded, so not even rounding may differ.
    pairs = numbered_pairs(9)
    found = austeer.measure(tiny, demo[1], pairs, SITES, batch_tokens=1, share_prompts=False)
    naive = naive_activations(tiny, demo[1], texts_of(pairs))
    for name in SITES:
        delta = naive[name][:9].double() - naive[name][9:].double()
        counters = found.counters(name)
        assert torch.equal(counters.positive, (naive[name][:9] > naive[name][9:]).sum(0))
        assert torch.equal(counters.negative, (naive[name][:9] < naive[name][9:]).sum(0))
        torch.testing.assert_close(counters.delta_sum, delta.sum(0), rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(counters.delta_square_sum, delta.square().sum(0), rtol=1e-12, atol=1e-15)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 200), st.integers(1, 12))
def test_batch_and_block_size_do_not_matter(tiny64, demo, batch_tokens, block_pairs):
    pairs = numbered_pairs(10)
    expected = austeer.measure(tiny64, demo[1], pairs, batch_tokens=1)
    found = austeer.measure(tiny64, demo[1], pairs, batch_tokens=batch_tokens, block_pairs=block_pairs)
    assert_like(found, expected)


def test_model_is_left_as_it_was(tiny, demo):
    tiny.train()
    tiny.model.layers[1].eval()  # a mixture must come back as a mixture
    before, state = [m.training for m in tiny.modules()], copy.deepcopy(tiny.state_dict())
    count = hooks(tiny)
    austeer.measure(tiny, demo[1], numbered_pairs(3))
    assert [m.training for m in tiny.modules()] == before and hooks(tiny) == count
    assert all(torch.equal(t, state[name]) for name, t in tiny.state_dict().items())
    assert all(p.grad is None for p in tiny.parameters())


def test_dropout_is_off(tiny, demo):
    expected = austeer.measure(tiny, demo[1], numbered_pairs(3))
    for layer in tiny.model.layers:
        layer.self_attn.attention_dropout = 0.5
    assert_like(austeer.measure(tiny.train(), demo[1], numbered_pairs(3)), expected)


def test_training_mode_and_hooks_are_restored_after_an_error(tiny, demo):
    tiny.train().model.embed_tokens.weight.data.fill_(float("nan"))
    with pytest.raises(CaptureError):
        austeer.measure(tiny, demo[1], numbered_pairs(3))
    assert all(m.training for m in tiny.modules()) and hooks(tiny) == 0


def test_headless_and_compiled_models_are_measured_alike(tiny, demo):
    pairs = numbered_pairs(4)
    expected = austeer.measure(tiny, demo[1], pairs, ["layer"]).counters("layer")
    for model in (tiny.model, torch.compile(tiny, backend="eager")):
        found = austeer.measure(model, demo[1], pairs, ["layer"]).counters("layer")
        assert all(torch.equal(a, b) for a, b in zip(found.tensors().values(), expected.tensors().values()))


def test_long_texts_are_cut_and_counted(tiny, demo):
    long = ("word " * 600, " good", " bad")
    short = ("It is", " fine", " awful")
    found = austeer.measure(tiny, demo[1], [long, short])
    assert found.cut == 2, "the model's context is 512 tokens"
    # The answer decides: what was cut off changes nothing.
    same = austeer.measure(tiny, demo[1], [("other " * 300 + "word " * 600, " good", " bad"), short])
    assert_like(same, found)
    assert austeer.measure(tiny, demo[1], [long, short], max_length=3).cut == 2
    assert austeer.measure(tiny, demo[1], [long, short], max_length=2).cut == 4


def test_unknown_family_by_layout_and_without_a_context_length(demo):
    # Bloom encodes positions in its attention scores and has no longest text.
    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=len(demo[1]), hidden_size=32, n_layer=2, n_head=4)).eval()
    layout = Layout(layers="h", attention="self_attention.dense", ffn="mlp", down="mlp.dense_4h_to_h")
    pairs = numbered_pairs(5)
    with pytest.raises(PairsError, match=r"context length.*max_length"):
        austeer.measure(model, demo[1], pairs, layout=layout)
    options = {"sites": austeer.models.sites.SITE_NAMES, "layout": layout, "max_length": 64}
    found = austeer.measure(model, demo[1], pairs, **options)
    shapes = {name: tuple(c.positive.shape) for name, c in found.sites.items()}
    assert shapes == dict.fromkeys(("attention", "ffn", "layer"), (2, 32)) | {"neuron": (2, 128)}
    alone = austeer.measure(model, demo[1], pairs, **options, batch_tokens=1)
    for name, counters in alone.sites.items():
        torch.testing.assert_close(found.counters(name).delta_sum, counters.delta_sum, rtol=1e-4, atol=1e-6)


def test_chat_template_is_noted(tiny, demo):
    pairs = numbered_pairs(3).with_chat_template(demo[1])
    found = austeer.measure(tiny, demo[1], pairs)
    assert found.chat_template
    with pytest.raises(SelectionError, match=r"merge: .*chat_template False.*True"):
        found.merge(austeer.measure(tiny, demo[1], numbered_pairs(3)))


def test_a_steered_model_is_refused(tiny, demo):
    own = austeer.measure(tiny, demo[1], [("a", " b", " c"), ("d", " e", " f")], ["ffn"])
    with pytest.warns(austeer.SteeringWarning), austeer.steer(tiny, own.select("ffn", k=2), mode="columns"):  # noqa: SIM117
        with pytest.raises(austeer.SteeringError, match="model is steered"):
            austeer.measure(tiny, demo[1], [("a", " b", " c"), ("d", " e", " f")], ["ffn"])


def test_no_sites_no_pairs_unknown_site(tiny, demo):
    with pytest.raises(SiteError, match=r"sites: .*none"):
        austeer.measure(tiny, demo[1], numbered_pairs(2), [])
    with pytest.raises(SiteError, match=r"'mlp'.*attention, ffn"):
        austeer.measure(tiny, demo[1], numbered_pairs(2), ["mlp"])
    with pytest.raises(PairsError, match=r"memory: .*no pairs"):
        austeer.measure(tiny, demo[1], numbered_pairs(2)[:0])


def test_site_named_twice_is_measured_once(tiny, demo):
    found = austeer.measure(tiny, demo[1], numbered_pairs(2), ["ffn", "ffn"])
    assert_like(found, austeer.measure(tiny, demo[1], numbered_pairs(2), ["ffn"]))


def test_identical_pairs_add_no_evidence(demo):
    """Equal texts in different batches differ by rounding, which must not count as a sign."""
    same = [
        (f"The {thing} in the {place}", " was here", " was here") for thing in ("cat", "dog") for place in "abcdefgh"
    ]
    pairs = austeer.Pairs.of([*same, ("The trip was", " wonderful", " terrible"), ("It was", " good", " bad")])
    momentum = austeer.measure(*demo, pairs, "ffn", batch_tokens=40, progress=False)
    assert momentum.pairs == 18 and momentum.identical == 16
    counters = momentum.sites["ffn"]
    assert (counters.positive + counters.negative).max() <= 2
