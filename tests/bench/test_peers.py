"""The benchmark's peers: equal to the naive formula, and as wasteful as they are described to be."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from austeer import Pairs
from bench.peers import SITES, public_momentum, reading, stacked_momentum
from naive_momentum import naive_activations, texts_of

PAIRS = Pairs.of(
    [
        ("The soup was", " good", " bad"),
        ("It is", " a fine old house", " awful"),
        ("Everyone at the long table thought that the cake looked", " fresh", " stale"),
        ("So", " yes", " no"),
        ("The view of the river and its many boats was really", " grand", " very poor indeed"),
        ("He said that she was", " right", " wrong"),
        ("One", " two", " three"),
        ("A quiet green place is", " a joy", " a bore"),
        ("They were", " kind", " rude"),  # 18 texts: the second batch of the stacked version is a small one
    ]
)


@pytest.fixture
def tiny64(tiny):
    """In float64 the rounding of a batch is too small to turn a comparison."""
    return tiny.double()


def naive_counts(model, tokenizer, pairs):
    """site -> (positive, negative), from each text alone."""
    sides = {site: x.chunk(2) for site, x in naive_activations(model, tokenizer, texts_of(pairs)).items()}
    return {site: torch.stack([(a > b).sum(0), (a < b).sum(0)]) for site, (a, b) in sides.items()}


def test_both_equal_the_naive_formula(tiny64, demo):
    tokenizer = demo[1]
    expected = naive_counts(tiny64, tokenizer, PAIRS)
    public = public_momentum.measure(tiny64, tokenizer, PAIRS)
    assert public.pairs == len(PAIRS) and public.scoring_seconds > 0
    for counts in (public.counts(), stacked_momentum.measure(tiny64, tokenizer, PAIRS)):
        assert set(counts) == set(SITES)
        for site in SITES:
            for found, right in zip(counts[site], expected[site]):
                assert found.dtype == torch.int64 and torch.equal(found, right), site
    for site in SITES:
        up, down = expected[site] / len(PAIRS)
        torch.testing.assert_close(public.scored[site][2], torch.where(up >= down, up, -down).float())
    # Transformers leaves hooks of its own where hidden states were asked for, on layers and attentions.
    assert not any(layer.self_attn.o_proj._forward_pre_hooks for layer in tiny64.model.layers)
    assert not any(layer.mlp._forward_hooks for layer in tiny64.model.layers)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 5), st.randoms(use_true_random=False))
def test_the_loop_over_aus_scores_as_the_formula(pairs, layers, width, random):
    """On small whole numbers, so that neither side is often larger."""

    def values():
        numbers = [random.randint(-1, 1) for _ in range(pairs * layers * width)]
        return torch.tensor(numbers, dtype=torch.float32).view(pairs, layers, width)

    positive, negative = values(), values()
    up, down, beta = public_momentum.score([list(t) for t in positive], [list(t) for t in negative])
    m = positive - negative
    rate_up, rate_down = (m > 0).float().mean(0), (m < 0).float().mean(0)
    assert torch.equal(up, rate_up) and torch.equal(down, rate_down)
    assert torch.equal(beta, torch.where(rate_up >= rate_down, rate_up, -rate_down))


def test_the_public_algorithm_keeps_every_position_alive(tiny, demo):
    texts = ["The soup was good", "It is"]
    kept = public_momentum.collect(tiny, demo[1], texts)
    lengths = [len(ids) for ids in demo[1](texts)["input_ids"]]
    for site in SITES:
        for text, length in zip(kept[site], lengths):
            assert [x.shape for x in text] == [(32,)] * 3
            assert {x.untyped_storage().nbytes() for x in text} == {length * 32 * 4}


def test_what_runs_how_often(tiny, demo):
    """The public algorithm: each text alone, with the head. The stacked version: 16 texts at a time, without it."""
    batches, heads = [], []
    handles = [
        tiny.model.embed_tokens.register_forward_pre_hook(lambda m, args: batches.append(args[0].shape[0])),
        tiny.lm_head.register_forward_hook(lambda *_: heads.append(1)),
    ]
    public_momentum.measure(tiny, demo[1], PAIRS)
    assert batches == [1] * 18 and len(heads) == 18
    batches.clear(), heads.clear()
    found = stacked_momentum.activations(tiny, demo[1], PAIRS)
    assert batches == [16, 2] and not heads
    for positive, negative in found.values():
        assert positive.shape == negative.shape == (9, 3, 32)
        assert positive.untyped_storage().nbytes() == 9 * 3 * 32 * 4  # last tokens, no more
    for handle in handles:
        handle.remove()


def test_hooks_go_with_an_error(tiny):
    with pytest.raises(ZeroDivisionError), reading(tiny, lambda site, x: 1 // 0):
        tiny(torch.tensor([[3, 4]]))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny.modules())
