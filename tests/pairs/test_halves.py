"""Halves of the pairs: decided by the prompt alone, and about equal."""

import austeer
from austeer.pairs.halves import half_of, half_rows, half_rows_without_texts
from naive_momentum import assert_like, numbered_pairs

PROMPTS = [f"{i} {text}" for i, text in enumerate(["The soup was", "Ünï", "", "a\nb"] * 500)]


def test_which_half_never_changes():
    """Files of different days and machines are merged: these are for ever."""
    prompts = ("The soup was", "The old boat was", "", "Ünï – ☃", "a\nb", "c", "d", "e")
    assert [half_of(prompt) for prompt in prompts] == [True, True, True, True, True, False, True, True]


def test_halves_are_about_equal():
    assert 900 < len(half_rows(PROMPTS)) < 1100  # 2000 fair coins: 4.5 standard deviations
    assert 900 < len(half_rows_without_texts("a.safetensors", 0, 2000)) < 1100


def test_pairs_of_one_prompt_stay_together(tiny64, demo):
    answers = [(" good", " bad"), (" fine", " poor"), (" fresh", " stale")]
    prompts = ("The soup was", "It is", "Bread is", "The film was")
    pairs = [(prompt, *answer) for prompt in prompts for answer in answers]
    found = austeer.measure(tiny64, demo[1], pairs)
    inside = [pair for pair in pairs if half_of(pair[0])]
    assert found.half_pairs == len(inside) and 0 < len(inside) < 12 and not len(inside) % 3
    half, rest = found.halves()
    assert_like(half.merge(rest), austeer.Momentum(**{**vars(found), "half": None, "half_pairs": 0}))
    own = austeer.measure(tiny64, demo[1], inside)
    for site, counters in own.sites.items():
        assert half.sites[site].positive.equal(counters.positive)
        assert half.sites[site].negative.equal(counters.negative)


def test_pairs_of_one_prompt_for_all_are_divided_by_their_texts(tiny64, demo):
    """Of a frame ("Sentence:"), or of no prompt, every pair would be in one half; equal ones stay together."""
    for prompt in ("Sentence:", ""):
        pairs = [(prompt, f" a fine word {i % 6}", f" a poor one {i % 6}") for i in range(12)]
        found = austeer.measure(tiny64, demo[1], pairs, block_pairs=5)
        inside = [pair for pair in pairs if half_of("\n".join(pair))]
        assert found.half_pairs == len(inside) and 0 < len(inside) < 12 and not len(inside) % 2
        own = austeer.measure(tiny64, demo[1], inside)
        for site, counters in own.sites.items():
            assert found.half[site].positive.equal(counters.positive)


def test_any_order_and_any_cut_gives_the_same_halves(tiny64, demo):
    pairs = list(numbered_pairs(12))
    expected = austeer.measure(tiny64, demo[1], pairs)
    assert 0 < expected.half_pairs < 12
    turned = austeer.measure(tiny64, demo[1], pairs[::-1], block_pairs=5, batch_tokens=30)
    merged = austeer.measure(tiny64, demo[1], pairs[7:]).merge(austeer.measure(tiny64, demo[1], pairs[:7]))
    layerwise = austeer.measure(tiny64, demo[1], pairs, strategy="layerwise", block_pairs=3)
    for other in (turned, merged, layerwise):
        assert_like(other, expected)
