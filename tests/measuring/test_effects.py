"""Effects of AUs: the gradient of the log-odds of pairs, the same by differences, in trees and after a stop."""

import pytest
import torch

import austeer
from austeer import CaptureError, Momentum, PairsError, SelectionError, find_sites
from austeer.measuring import strategies
from austeer.tasks import log_odds
from dense_formula import hook
from letter_tokens import Letters
from tiny_models import tiny_model, wide_model

SITES = ("attention", "ffn", "layer", "neuron")
PAIRS = austeer.Pairs.of(
    [
        ("a view of", " the river", " the old mill"),
        ("some tea", " was warm", " was cold and weak"),
        ("two", " roads meet", " roads part"),
        ("the soup", " is", " is good"),  # the one begins the other
        ("a view of", " boats", " roads"),
        ("white bread", " and tea", " and tea"),  # equal sides count for nothing
        ("her boat", " left", " stayed"),
        ("that mill", " turns", " stands"),
    ]
)


def measured(model, sites=SITES, pairs=PAIRS, **options):
    return austeer.measure(model, Letters(), pairs, list(sites), effects=True, progress=False, **options)


def difference(model, site, index, step=5e-3):
    """The mean change of the log-odds of PAIRS by a shift of one AU, from two passes."""
    found = []
    for sign in (1, -1):

        def change(x, sign=sign):
            x = x.clone()
            x[..., index] += sign * step
            return x

        handle = hook(model, site, change)
        found.append(log_odds(model, Letters(), PAIRS).mean())
        handle.remove()
    return float(found[0] - found[1]) / (2 * step)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "qwen3_moe"])
def test_an_effect_is_the_change_of_the_log_odds_by_a_shift(family, share):
    model = wide_model(family)
    found = find_sites(model, SITES[: 3 if family == "qwen3_moe" else 4])
    momentum = measured(model, found, share_prompts=share)
    for name, sites in found.items():
        assert momentum.effect(name).dtype == torch.float64
        for row in (0, len(sites) - 1):
            index = int(momentum.effect(name)[row].abs().argmax())
            expected = difference(model, sites[row], index)
            assert float(momentum.effect(name)[row, index]) == pytest.approx(expected, rel=0.03, abs=1e-4)


def test_effects_are_counted_as_activations_are():
    momentum = measured(tiny_model())
    effects = momentum.effects
    assert (effects.pairs, effects.identical, effects.half_pairs) == (8, 1, momentum.half_pairs)
    counters = effects.counters("ffn")
    assert int((counters.positive + counters.negative).max()) == 7
    one, other = momentum.halves()
    both = one.effect("ffn") * one.pairs + other.effect("ffn") * other.pairs
    torch.testing.assert_close(both / 8, momentum.effect("ffn"))
    assert float((one.effect("ffn") - other.effect("ffn")).abs().max()) > 0
    plain = austeer.measure(tiny_model(), Letters(), PAIRS, SITES, progress=False)
    assert plain.effects is None and momentum.report.seconds.effects > 0
    for name, t in plain.counters("neuron").tensors().items():
        assert torch.equal(t, momentum.counters("neuron").tensors()[name]), "activations are counted as without effects"


def test_parts_add_up_and_files_keep_them(tmp_path):
    model = tiny_model()
    whole = measured(model)
    first, second = (
        measured(model, pairs=austeer.Pairs.of(list(PAIRS)[rows])) for rows in (slice(0, 3), slice(3, None))
    )
    merged = first.merge(second)
    torch.testing.assert_close(merged.effect("layer"), whole.effect("layer"), rtol=1e-4, atol=1e-6)
    loaded = Momentum.load(merged.save(tmp_path / "m.momentum"))
    assert torch.equal(loaded.effect("layer"), merged.effect("layer"))
    assert torch.equal(loaded.halves()[1].effect("ffn"), merged.halves()[1].effect("ffn"))
    without = austeer.measure(model, Letters(), PAIRS, SITES, progress=False)
    assert merged.merge(without).effects is None
    with pytest.raises(SelectionError, match=r"effects: .*effects=True"):
        Momentum.load(without.save(tmp_path / "p.momentum")).effect("ffn")


def test_a_stop_in_the_middle_of_a_block_counts_nothing_twice(tmp_path, monkeypatch):
    model, path = tiny_model(), tmp_path / "m.checkpoint"
    options = {"block_pairs": 2, "checkpoint_every": 2, "batch_tokens": 20}
    whole, plain, ran = measured(model, **options), strategies.effects_of, []

    def failing(*arguments):
        ran.append(arguments)
        if len(ran) == 4:
            raise RuntimeError("a broken machine")
        return plain(*arguments)

    monkeypatch.setattr(strategies, "effects_of", failing)
    with pytest.raises(RuntimeError, match="broken"):
        measured(model, checkpoint=path, **options)
    monkeypatch.undo()
    again = measured(model, checkpoint=path, resume=True, **options)
    assert again.report.resumed > 0
    for site in SITES:
        for name, t in whole.effects.counters(site).tensors().items():
            assert torch.equal(t, again.effects.counters(site).tensors()[name])
    with pytest.raises(austeer.FileFormatError, match="effects"):
        austeer.measure(model, Letters(), PAIRS, SITES, checkpoint=path, resume=True, progress=False, **options)


def test_layers_that_are_not_measured_still_run():
    """Their effects are not counted, but they stand between a shift and what is read."""
    momentum = measured(tiny_model(), layers=[0])
    torch.testing.assert_close(momentum.effect("ffn"), measured(tiny_model()).effect("ffn")[:1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    expected = measured(tiny_model()).effect("ffn")
    found = measured(tiny_model().to(dtype)).effect("ffn")
    assert float(torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1]) > 0.99


def test_what_cannot_have_effects_is_refused():
    model = tiny_model()
    with pytest.raises(PairsError, match=r"pair 0: .*different tokens.*'Text:'"):
        measured(model, pairs=austeer.Pairs.of([("", "one", "two"), ("a", " b", " c")]))
    with pytest.raises(CaptureError, match=r"effects: .*layerwise.*resident"):
        measured(model, strategy="layerwise")
    with pytest.raises(CaptureError, match=r"no head"):
        measured(model.model)
    assert all(p.requires_grad for p in model.parameters())


class Begun(Letters):
    """Begins every text with a token of its own."""

    bos_token_id = 1

    def __call__(self, texts, add_special_tokens=True, **options):
        ids = super().__call__(texts)["input_ids"]
        return {"input_ids": [[1, *row] for row in ids] if add_special_tokens else ids}


def test_texts_that_are_too_long_are_cut_at_one_place_for_effects():
    """Where each were cut by itself, the prompts of a pair would no longer be alike, and be taken for answers."""
    model, prompt = tiny_model(), "a view of the river and its many boats"
    pairs = [(prompt + end, " is", " was not good") for end in ("", " here")]
    kept = [(row[0][len(row[0]) - 6 :], *row[1:]) for row in pairs]  # 20 tokens: 1, 6 of the prompt, 13 of the longer
    options = {"effects": True, "progress": False}
    long = austeer.measure(model, Begun(), pairs, ["ffn"], max_length=20, **options)
    short = austeer.measure(model, Begun(), kept, ["ffn"], **options)
    assert long.cut > 0
    torch.testing.assert_close(long.effect("ffn"), short.effect("ffn"))


def test_under_inference_mode_too():
    model = tiny_model()
    with torch.inference_mode():
        found = measured(model)
    torch.testing.assert_close(found.effect("ffn"), measured(model).effect("ffn"))
