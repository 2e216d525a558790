"""``shift`` in vLLM without a plugin: biases of a folded checkpoint give the tokens and logits of our own steering."""

from __future__ import annotations

import json
from contextlib import ExitStack

import pytest
import torch

from austeer.export import export_checkpoint
from austeer.models.demo_model import demo_model
from dense_formula import formula_at, logits
from mixes import PROMPTS, TEXT, TOKENS, engine_logits, steered

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def parts(momentum):
    """Measured plans for two sites at once, of the strength that the README recommends or less."""
    return [
        (momentum.select(site="attention", k=10, operation="shift"), 8.0),
        (momentum.select(site="ffn", k=32, operation="shift"), 0.5),
    ]


@pytest.fixture(scope="module")
def folder(parts, tmp_path_factory):
    out = export_checkpoint(parts, demo_model(), tmp_path_factory.mktemp("biases") / "shift", progress=False)
    config = json.loads((out / "config.json").read_text())
    assert config["attention_bias"] is True and config["mlp_bias"] is True
    return out


@pytest.fixture(scope="module")
def engine(folder):
    from vllm import LLM

    llm = LLM(
        str(folder),
        dtype="float32",
        max_model_len=128,
        enforce_eager=True,
        max_logprobs=-1,
        logprobs_mode="raw_logits",
    )
    yield llm
    llm.llm_engine.engine_core.shutdown()


def greedy(model, tokenizer, prompt):
    ids = tokenizer(prompt, return_tensors="pt")
    return model.generate(**ids, max_new_tokens=TOKENS, do_sample=False)[0, ids["input_ids"].shape[1] :].tolist()


def test_vllm_writes_what_our_own_steering_does(demo, engine, parts):
    from vllm import SamplingParams

    outputs = engine.generate(list(PROMPTS), SamplingParams(temperature=0, max_tokens=TOKENS))
    found = [list(output.outputs[0].token_ids) for output in outputs]
    with steered(demo[0], parts):
        expected = [greedy(*demo, prompt) for prompt in PROMPTS]
    assert found == expected
    for tokens, prompt in zip(found, PROMPTS, strict=True):
        assert tokens != greedy(*demo, prompt)


def test_the_logits_are_those_of_the_dense_formula(demo, engine, parts, exactness):
    model, tokenizer = demo
    ids = tokenizer(TEXT, return_tensors="pt")
    with ExitStack() as stack:
        for plan, alpha in parts:
            stack.enter_context(formula_at(model, plan, alpha))
        expected = logits(model, ids)[0]
    effect = (expected - logits(model, ids)[0]).abs().max().item()
    found = engine_logits(engine, ids["input_ids"], None)
    assert found.shape == expected.shape
    difference = (found - expected).abs().max().item()
    exactness("vLLM, folded checkpoint", "shift", "attention + ffn", difference, effect)
    assert difference < 1e-3 * effect


def test_the_checkpoint_in_transformers(demo, folder, parts):
    from transformers import AutoModelForCausalLM

    model, tokenizer = demo
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for prompt in PROMPTS:
        with steered(model, parts):
            expected = greedy(model, tokenizer, prompt)
        assert greedy(loaded, tokenizer, prompt) == expected
