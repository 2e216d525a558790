"""Scopes on models whose caches tell how many tokens they hold, tell it wrongly, or not at all."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, StaticCache

import austeer
from austeer.models.families import Layout
from austeer.steering.cached_tokens import CachedTokens, reported
from dense_formula import greedy_by_recomputing, random_plan
from tiny_models import HYBRIDS, ids_of_rows, tiny_model

NEW = 3
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
ALL_LINEAR = {"layer_types": ["linear_attention"] * 3}
LINEAR = {"minimax, all linear": ("minimax", ALL_LINEAR), "qwen3_next": ("qwen3_next", {})}
MODELS = {**{family: (family, {}) for family in HYBRIDS if family != "rwkv"}, **LINEAR}


def by_hand(model):
    """Paths enough for the site ``layer``, whatever the layers are made of."""
    decoder = model.get_decoder() if hasattr(model.get_decoder(), "layers") else model.base_model
    return Layout(layers="blocks" if hasattr(decoder, "blocks") else "layers", attention="none", ffn="none")


@pytest.mark.parametrize("case", MODELS)
def test_generation_equals_recomputation(case):
    family, changes = MODELS[case]
    model = tiny_model(family, **changes)
    layout, batch = by_hand(model), ids_of_rows(2, 6)
    plan = random_plan(model, "layer", 40, "shift", layout=layout)
    steered = {"from_last_prompt_token": range(5, 8), (2, 7): range(2, 7)}
    for scope, columns in steered.items():
        expected = greedy_by_recomputing(model, batch, plan, 2.0, scope, NEW, layout)
        with austeer.steer(model, plan, 2.0, scope=scope, layout=layout) as steering:
            assert torch.equal(model.generate(batch["input_ids"], **GREEDY), expected), scope
        assert {row.tokens for row in steering.report()} == {2 * len(columns)}, scope


@pytest.mark.parametrize("case", ["minimax", "mamba", "mamba2", "minimax, all linear"])
def test_step_by_step_equals_whole(case):
    """Direct calls: a cache that the model makes, and in MiniMax and Mamba one that counts nothing."""
    family, changes = MODELS[case]
    model = tiny_model(family, **changes)
    layout, ids = by_hand(model), ids_of_rows(2, 8)["input_ids"]
    plan = random_plan(model, "layer", 40, "shift", layout=layout)
    name = "past_key_values" if family == "minimax" else "cache_params"
    with torch.no_grad(), austeer.steer(model, plan, 2.0, scope=(2, 7), layout=layout) as steering:
        whole = model(ids).logits
        parts, cache = [], None
        for begin, end in ((0, 5), (5, 6), (6, 7), (7, 8)):
            given = {name: cache, "use_cache": True}
            if family == "minimax":  # which takes its cache's word for them
                given["position_ids"] = torch.arange(begin, end)[None]
            output = model(ids[:, begin:end], **given)
            parts.append(output.logits)
            cache = output[name]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)
    assert {row.tokens for row in steering.report()} == {2 * 2 * 5}


def test_a_cache_that_was_not_seen_being_filled_is_refused():
    model = tiny_model("mamba")
    layout, ids = by_hand(model), ids_of_rows(2, 6)["input_ids"]
    steering = austeer.steer(model, random_plan(model, "layer", 9, layout=layout), scope="prompt", layout=layout)
    with torch.no_grad():
        unseen = model(ids, use_cache=True).cache_params
        with steering:
            seen = model(ids, use_cache=True).cache_params
            for cache in (unseen, copy.deepcopy(seen)):
                with pytest.raises(austeer.SteeringError, match=r"cache_params: .*DynamicCache"):
                    model(ids[:, :1], cache_params=cache)
            model(ids[:, :1], cache_params=seen)
        with steering:
            model(ids)
            with pytest.raises(austeer.SteeringError, match=r"cache_params: .*DynamicCache"):
                model(ids[:, :1], cache_params=seen)  # what ran in between was not counted


def test_a_state_that_is_no_cache_is_refused():
    model = tiny_model("rwkv")
    layout, ids = by_hand(model), ids_of_rows(2, 6)["input_ids"]
    plan = random_plan(model, "layer", 40, "shift", layout=layout)
    with austeer.steer(model, plan, scope="prompt", layout=layout):
        with pytest.raises(austeer.SteeringError, match="state: found a list"):
            model.generate(ids, **GREEDY)
        model.generate(ids, **GREEDY, use_cache=False)


def test_what_can_be_taken_back_is_not_counted():
    counted, cache = CachedTokens(), linear_cache()
    counted.after({"cache_params": cache}, None, 5)
    assert counted.before({"cache_params": cache}) == 5
    cache.layers[0].record_past = True
    with pytest.raises(austeer.SteeringError, match="cache_params"):
        counted.before({"cache_params": cache})


def linear_cache():
    cache = DynamicCache(config=tiny_model("mamba").config)
    assert reported(cache) == 0
    cache.update_conv_state(torch.ones(1, 4, 3), 0)
    return cache


def test_in_a_graph_the_length_is_read_on_the_device():
    """A number of now would become part of a captured graph, and hold at every replay."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    mixed = StaticCache(config=tiny_model("gemma3_text", layer_types=kinds).config, max_cache_len=16)
    windows = StaticCache(config=tiny_model("mistral", sliding_window=8).config, max_cache_len=16)
    for cache in (mixed, windows):
        for layer in range(3):
            cache.update(torch.ones(1, 2, 5, 12), torch.ones(1, 2, 5, 12), layer)
    assert reported(mixed) == 5 and isinstance(reported(mixed, capturing=True), torch.Tensor)
    assert reported(windows) == 5
    with pytest.raises(austeer.SteeringError, match="windows"):
        reported(windows, capturing=True)


def test_an_object_with_a_length_of_its_own():
    assert reported(SimpleNamespace(get_seq_length=lambda: 7)) == 7
    assert CachedTokens().before({"input_ids": torch.ones(1, 2)}) == 0
