"""This library's paths as ways: each takes its own path and is the definition; folding is on only while it runs."""

import pytest
import torch

from bench import catalogue
from bench.steered import UnavailableError, twin
from dense_formula import assert_unchanged, formula_logits, logits, random_plan, snapshot
from tiny_models import ids_of_rows, tiny_model, wide_model

ALPHA = 4.0  # alpha * beta is exact in float32
WAYS = {way.name: way for way in catalogue.OURS}
#: The neuron site is inside the experts of a mixture, and a GPT-2's layers are no plain linear layers.
SITES = {
    ("columns", "llama"): ("attention", "ffn", "layer", "neuron"),
    ("columns", "gpt2"): ("attention", "ffn", "layer", "neuron"),
    ("columns", "mixtral"): ("attention", "ffn", "layer"),
    ("fused", "llama"): ("attention", "ffn", "neuron"),
    ("fused", "mixtral"): ("attention",),
    ("fold", "llama"): ("attention", "ffn", "neuron"),
    ("fold", "gpt2"): ("attention", "ffn", "neuron"),
    ("fold", "mixtral"): ("attention", "ffn"),
}
CASES = [(*key, site) for key, sites in SITES.items() for site in sites]
REFUSED = [
    *(("fused", "gpt2", site) for site in ("attention", "ffn", "layer", "neuron")),
    *(("fold", family, "layer") for family in ("llama", "gpt2", "mixtral")),
    ("fused", "llama", "layer"),
    ("fused", "mixtral", "ffn"),
]


@pytest.mark.parametrize("name, family, site", CASES)
def test_every_path_is_the_definition_and_comes_off_again(name, family, site):
    model, ids = wide_model(family), ids_of_rows()
    plan = random_plan(model, site, 40)
    plain, expected, before = logits(model, ids), formula_logits(model, ids, plan, ALPHA), snapshot(model)
    assert (expected - plain).abs().max() > 0.1
    other = twin(model)
    steered = WAYS[name].make(other, plan, ALPHA)
    with torch.no_grad(), steered.active():
        torch.testing.assert_close(steered.logits(ids["input_ids"]), expected, rtol=1e-9, atol=1e-9)
    assert {row.path for row in steered.steering.report() if row.aus} == {name}
    assert torch.equal(logits(model, ids), plain)
    steered.close()
    assert torch.equal(logits(other, ids), plain)
    assert_unchanged(model, before)


@pytest.mark.parametrize("site", ["attention", "ffn", "neuron"])
def test_folded_weights_are_edited_only_while_it_is_active(site):
    model, ids = wide_model(), ids_of_rows()
    plan, before = random_plan(model, site, 40), snapshot(model)
    plain, expected = logits(model, ids), formula_logits(model, ids, plan, ALPHA)
    steered = WAYS["fold"].make(twin(model), plan, ALPHA)
    assert_unchanged(model, before)
    for _ in range(2):
        with steered.active():
            torch.testing.assert_close(logits(model, ids), expected, rtol=1e-9, atol=1e-9)
        assert torch.equal(logits(model, ids), plain)
        assert_unchanged(model, before)
    with pytest.raises(KeyboardInterrupt), steered.active():
        raise KeyboardInterrupt
    assert_unchanged(model, before)
    steered.close()
    assert_unchanged(model, before)


@pytest.mark.parametrize("name, family, site", REFUSED)
def test_a_path_that_is_not_possible_is_unavailable_and_says_why(name, family, site):
    model = tiny_model(family)
    before = snapshot(model)
    with pytest.raises(UnavailableError, match=rf"mode '{name}' is not possible at site '{site}'"):
        WAYS[name].make(twin(model), random_plan(model, site, 40), ALPHA)
    assert_unchanged(model, before)
