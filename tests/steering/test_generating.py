"""Every way in which Transformers generates text gives, under steering, the text of the definition without a cache."""

import copy
import inspect

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

import austeer
from dense_formula import SITES, formula_at, random_plan
from tiny_models import ids_of_rows, left_padded, tiny_model

TOKENS = 10
GREEDY = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
TEXTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16], [17, 18, 19, 20, 21, 22]]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def plan(model):
    return random_plan(model, SITES, 25)


def by_formula(model, plan, alpha, inputs, **options):
    """What the definition's own hooks generate, without a cache."""
    with formula_at(model, plan, alpha):
        torch.manual_seed(1)
        return model.generate(**inputs, **(GREEDY | {"use_cache": False} | options))


def steered(model, plan, alpha, inputs, mode, **options):
    with austeer.steer(model, plan, alpha, mode=mode):
        torch.manual_seed(1)
        return model.generate(**inputs, **(GREEDY | options))


#: The same text as greedy decoding without a cache, by other means.
GREEDY_FORMS = {
    "dynamic cache": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "prefill in chunks": {"prefill_chunk_size": 3},
    "static cache, prefill in chunks": {"cache_implementation": "static", "prefill_chunk_size": 3},
    "hidden states": {"output_hidden_states": True, "output_attentions": True},
}


@pytest.fixture(scope="module")
def greedy(model, plan):
    expected = by_formula(model, plan, 0.7, ids_of_rows())
    assert not torch.equal(expected, model.generate(**ids_of_rows(), **GREEDY))
    return expected


@pytest.mark.parametrize("mode", ["auto", "columns", "dense"])
@pytest.mark.parametrize("form", GREEDY_FORMS)
def test_greedy_decoding(model, plan, greedy, form, mode):
    assert torch.equal(steered(model, plan, 0.7, ids_of_rows(), mode, **GREEDY_FORMS[form]), greedy)


@pytest.mark.parametrize("mode", ["auto", "columns"])
@pytest.mark.parametrize("form", ["prompt lookup", "assistant"])
def test_speculative_decoding(model, plan, form, mode):
    """Several tokens are checked in one pass, and the cache is cut back; a draft model is not steered by it."""
    ids = ids_of_rows(rows=1)
    expected = by_formula(model, plan, 0.7, ids)
    helper = tiny_model(num_hidden_layers=1)
    options = {"prompt_lookup_num_tokens": 3} if form == "prompt lookup" else {"assistant_model": helper}
    assert torch.equal(steered(model, plan, 0.7, ids, mode, **options), expected)


SEARCHES = {
    "beams": {"num_beams": 3},
    "several beams returned": {"num_beams": 4, "num_return_sequences": 3},
    "sampling": {"do_sample": True, "temperature": 0.8},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "sampling beams": {"do_sample": True, "num_beams": 2},
    "penalty": {"repetition_penalty": 1.5},
}


@pytest.mark.parametrize("mode", ["auto", "columns"])
@pytest.mark.parametrize("form", SEARCHES)
def test_searching_and_sampling(model, plan, form, mode):
    options = SEARCHES[form]
    expected = by_formula(model, plan, 0.7, ids_of_rows(), **options)
    assert torch.equal(steered(model, plan, 0.7, ids_of_rows(), mode, **options), expected)


SLIDING = {
    "mistral": {"sliding_window": 4},
    "gemma2": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "llama": {},
}


@pytest.mark.parametrize(
    ("mode", "cache"), [("auto", "static"), ("columns", "dynamic"), ("columns", "static"), ("columns", None)]
)
@pytest.mark.parametrize("family", SLIDING)
def test_each_row_of_a_left_padded_batch_is_as_the_row_alone(family, mode, cache):
    """Also where the window is shorter than the text, in all layers or in some."""
    # Tied heads make a random model repeat its last token whatever is steered.
    model = tiny_model(family, tie_word_embeddings=False, **SLIDING[family])
    plan = random_plan(model, SITES, 25)
    options = {"cache_implementation": cache} if cache else {"use_cache": False}
    together = steered(model, plan, 0.5, left_padded(TEXTS), mode, **options)[:, -TOKENS:]
    unsteered = model.generate(**left_padded(TEXTS), **GREEDY)[:, -TOKENS:]
    for row, (text, without) in enumerate(zip(TEXTS, unsteered)):
        alone = by_formula(model, plan, 0.5, left_padded([text]))[0, -TOKENS:]
        assert torch.equal(together[row], alone)
        assert not torch.equal(alone, without)


def requests(model, texts):
    """What continuous batching makes of requests of unlike length, packed in one row."""
    config = GenerationConfig(max_new_tokens=TOKENS, do_sample=False, eos_token_id=[96], pad_token_id=0)
    # By default it takes all of the memory. Transformers 5.17 calls a page a block.
    page = "page_size" if "page_size" in inspect.signature(ContinuousBatchingConfig).parameters else "block_size"
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=16, **{page: 32})
    found = model.generate_batch(texts, config, continuous_batching_config=small, progress_bar=False)
    assert not model.config._attn_implementation.startswith("paged")  # it puts back the attention that it replaced
    return [found[name] for name in sorted(found)]


def continuous(model, texts):
    return [request.generated_tokens for request in requests(model, texts)]


@pytest.fixture(scope="module")
def batching():
    """A model whose texts end, and its unsteered texts."""
    model = tiny_model(eos_token_id=63)
    return model, continuous(model, TEXTS)


@pytest.mark.parametrize("mode", ["auto", "columns"])
def test_continuous_batching(batching, mode):
    model, without = batching
    plan, plain = random_plan(model, SITES, 25), copy.deepcopy(model)
    options = {"eos_token_id": 96, "min_new_tokens": 0}
    expected = [by_formula(plain, plan, 0.7, left_padded([text]), **options)[0, len(text) :].tolist() for text in TEXTS]
    with austeer.steer(model, plan, 0.7, mode=mode):
        assert continuous(model, TEXTS) == expected
    assert continuous(model, TEXTS) == without != expected


@pytest.mark.parametrize("kind", ["scope", "rows"])
def test_continuous_batching_refuses_what_it_cannot_tell_apart(batching, kind):
    """At the call; and in the forward pass, for whoever packs requests in another way."""
    model, without = batching
    plan = random_plan(model, SITES, 25)
    steering = (
        austeer.steer(model, plan, 0.7, scope="generation")
        if kind == "scope"
        else austeer.steer(model, {"one": plan}, 0.7)
    )
    with pytest.warns(austeer.SteeringWarning), steering:
        if kind == "rows":
            steering.rows(["one", None, "one"])
        packed = {"input_ids": torch.tensor([[3, 4, 5]]), "cu_seq_lens_q": torch.tensor([0, 1, 3])}
        for call in (lambda: requests(model, TEXTS), model.init_continuous_batching, lambda: model(**packed)):
            with pytest.raises(austeer.SteeringError, match="continuous batching"):
                call()
    assert not {"generate", "generate_batch", "init_continuous_batching"} & set(vars(model))
    assert continuous(model, TEXTS) == without
