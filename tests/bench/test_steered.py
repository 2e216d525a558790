"""Twins: the same weights, and nothing else in common."""

import pytest
import torch
from transformers import GenerationConfig

from bench.steered import Steered, twin
from tiny_models import ids_of_rows, tiny_model

FAMILIES = ["llama", "gpt2", "gemma2", "mixtral"]


@pytest.fixture(params=FAMILIES)
def model(request):
    return tiny_model(request.param)


@torch.no_grad()
def test_a_twin_shares_every_weight_and_buffer(model):
    other = twin(model)
    for kind in ("parameters", "buffers"):
        own, shared = list(getattr(model, kind)()), list(getattr(other, kind)())
        assert len(own) == len(shared) and all(a is b for a, b in zip(own, shared))
    ids = ids_of_rows()["input_ids"]
    assert torch.equal(other(ids).logits, model(ids).logits)


@torch.no_grad()
def test_what_is_put_on_a_twin_is_not_on_the_model(model):
    ids = ids_of_rows()["input_ids"]
    before, other = model(ids).logits, twin(model)
    other.get_input_embeddings().register_forward_hook(lambda module, args, output: output + 1)
    decoder = other.get_decoder()
    decoder.forward = lambda *args, original=decoder.forward, **options: original(*args, **options)
    other.generation_config.max_new_tokens = 3
    other.config.use_cache = False
    assert torch.equal(model(ids).logits, before) and not torch.equal(other(ids).logits, before)
    assert not model.get_input_embeddings()._forward_hooks and "forward" not in vars(model.get_decoder())
    assert model.generation_config.max_new_tokens != 3 and model.config.use_cache
    assert not any(a is b for a, b in zip(model.modules(), other.modules()))


@torch.no_grad()
def test_a_twin_generates_the_tokens_of_the_largest_logits(model):
    model.generation_config.eos_token_id = list(range(0, 64, 2))
    model.generation_config.repetition_penalty = 5.0
    ids = ids_of_rows()["input_ids"]
    tokens = Steered(twin(model)).generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert tokens.shape == (2, 7 + 6)
    assert torch.equal(tokens[:, 7:], model(tokens).logits.argmax(-1)[:, 6:-1])
    assert model.generation_config.repetition_penalty == 5.0


@torch.no_grad()
def test_the_base_steers_nothing_and_attends_to_every_token(model):
    ids = ids_of_rows()["input_ids"]
    ids[:, :3] = model.config.get_text_config().pad_token_id or 0  # what generate would mask by itself
    steered = Steered(twin(model))
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    model.generation_config = GenerationConfig()  # as a twin's
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    with steered.active():
        assert torch.equal(steered.generate(ids, **options), expected)
        assert torch.equal(steered.logits(ids), model(ids, use_cache=False).logits)
    assert steered.logits(ids).shape == (*ids.shape, 64)
    steered.close()
