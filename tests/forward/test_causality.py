"""Whether attention is causal, asked of the model; and models in which it is not: measured even, not scored."""

import pytest
import torch

import austeer
from austeer.baselines.pair_activations import pair_activations
from austeer.causal.check import causal_check
from austeer.forward.causality import expect_causal, is_causal, plain_batches
from austeer.making.momentum_signs import momentum_signs
from austeer.models.sites import find_sites
from austeer.models.structure import decoder_of
from austeer.tasks import Task, cross_entropy, log_odds
from austeer.tasks.evaluate import evaluate
from austeer.tuning.tune import tune
from letter_tokens import Letters, letter_pairs
from tiny_models import FAMILIES, HYBRIDS, NARROW, tiny_model

PAIRS = austeer.Pairs.of(letter_pairs(12))


def seeing_all(family):
    """A model in which each token sees those after it: by its config where it knows that, by its layers else."""
    if family in ("gemma", "gemma2", "gemma3_text"):
        return tiny_model(family, use_bidirectional_attention=True)
    model = tiny_model(family)
    model.config.is_causal = False
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    return model


BIDIRECTIONAL = ["gemma3_text", "gemma", "llama", "qwen3", "mixtral"]


@pytest.mark.parametrize("family", [*FAMILIES, *(family for family in HYBRIDS if family != "rwkv")])
def test_decoders_are_causal(family):
    assert is_causal(tiny_model(family, **NARROW.get(family, {})))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", BIDIRECTIONAL)
def test_bidirectional_attention_is_found(family, dtype):
    model = seeing_all(family)
    if family == "mixtral":  # grouped products have no float64
        model.set_experts_implementation("eager")
    assert not is_causal(model.to(dtype)) and is_causal(tiny_model(family).to(torch.bfloat16))


def test_the_answer_is_remembered_and_asked_anew_where_the_model_changed():
    model = tiny_model("llama")
    calls = []
    decoder_of(model).layers[0].register_forward_hook(lambda *_: calls.append(0))
    assert is_causal(model) and is_causal(model) and len(calls) == 2
    for layer in decoder_of(model).layers:
        layer.self_attn.is_causal = False
    model.config.is_causal = False
    assert not is_causal(model) and len(calls) == 4


def test_only_the_first_layer_of_each_kind_is_run():
    model = tiny_model("gemma3_text", **NARROW["gemma3_text"])
    calls = []
    for number, layer in enumerate(decoder_of(model).layers):
        layer.register_forward_hook(lambda *_, number=number: calls.append(number))
    assert is_causal(model) and calls == [0, 1, 0, 1]


@pytest.mark.parametrize("family", BIDIRECTIONAL)
@pytest.mark.parametrize("share", [True, False])
def test_counts_do_not_depend_on_the_batch(family, share):
    model = seeing_all(family)
    alone = austeer.measure(model, Letters(), PAIRS, batch_tokens=1, share_prompts=False)
    found = austeer.measure(model, Letters(), PAIRS, share_prompts=share)
    assert not found.report.shared_prompts and found.report.padding == 0
    assert found.report.batches < alone.report.batches
    for site, counters in alone.sites.items():
        assert torch.equal(found.sites[site].positive, counters.positive)
        assert torch.equal(found.sites[site].negative, counters.negative)


def test_activations_of_single_pairs_do_not_depend_on_the_batch():
    model = seeing_all("gemma3_text")
    sites = find_sites(model, ["ffn"])["ffn"]
    together = pair_activations(model, Letters(), PAIRS, sites)
    assert together.number == list(range(len(PAIRS)))
    for number, pair in enumerate(PAIRS):
        two = pair_activations(model, Letters(), austeer.Pairs.of([pair, PAIRS[number - 1]]), sites)
        torch.testing.assert_close(together.positive[number], two.positive[0])
        torch.testing.assert_close(together.negative[number], two.negative[0])


def test_a_layerwise_measurement_asks_too():
    model = seeing_all("gemma3_text")
    alone = austeer.measure(model, Letters(), PAIRS, "ffn", batch_tokens=1, share_prompts=False)
    found = austeer.measure(model, Letters(), PAIRS, "ffn", strategy="layerwise")
    assert torch.equal(found.sites["ffn"].positive, alone.sites["ffn"].positive)


def test_signs_of_pairs_do_not_depend_on_the_batch():
    model = seeing_all("gemma3_text")
    texts = Letters()([pair.prompt + pair.positive for pair in PAIRS])["input_ids"]
    others = Letters()([pair.prompt + pair.negative for pair in PAIRS])["input_ids"]
    together = momentum_signs(model, texts, others, "ffn", [0, 1], [3, 4])
    for number, (a, b) in enumerate(zip(texts, others)):
        assert (momentum_signs(model, [a], [b], "ffn", [0, 1], [3, 4]) == together[number]).all()


def test_scores_are_refused_before_anything_runs():
    model, tokenizer = seeing_all("gemma3_text"), Letters()
    task = Task.of_pairs(PAIRS)
    momentum = austeer.measure(model, tokenizer, PAIRS, "ffn")
    plan = momentum.select(site="ffn", k=5)
    attempts = {
        "log_odds": lambda: log_odds(model, tokenizer, PAIRS),
        "cross_entropy": lambda: cross_entropy(model, tokenizer, ["some text"]),
        "evaluate": lambda: evaluate(model, tokenizer, task, {"mine": (plan, 2.0)}),
        "tune": lambda: tune(model, tokenizer, task, seed=0),
        "check": lambda: causal_check(model, tokenizer, task, momentum, "ffn", n=2),
    }
    for name, attempt in attempts.items():
        with pytest.raises(austeer.TaskError, match="bidirectional"):
            attempt()
            pytest.fail(name)
    assert not austeer.is_steered(model)
    expect_causal(tiny_model("gemma3_text"))


def test_texts_beyond_a_scaled_context_are_apart_in_every_batch():
    """LongRoPE: a long text changes the positions of the others in its batch."""
    rope = {
        **{"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 12},
        **{"short_factor": [1.0] * 4, "long_factor": [4.0] * 4},
    }
    model = tiny_model("phi3", head_dim=8, rope_parameters=rope, original_max_position_embeddings=12)
    texts = [[5] * length for length in (4, 11, 12, 13, 20, 21)]
    for batch in plain_batches(model, texts, 10**6):
        assert len({len(texts[i]) > 12 for i in batch.texts.tolist()}) == 1
