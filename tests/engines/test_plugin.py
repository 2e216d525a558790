"""The vLLM plugin on a real model: requests of one batch, each with another set, write what our own steering does."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

import austeer
from dense_formula import formula_at, logits
from mixes import PROMPTS, TEXT, TOKENS
from plugin_sets import ENGINE, Mix, asks, logits_in, named, written_by_us

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def mixes(demo) -> dict[str, Mix]:
    """Measured plans. The strengths are such that each mix writes something else."""
    from austeer.demo.demo import load_data

    momentum = austeer.measure(
        *demo, load_data().momentum[:24], ["attention", "ffn", "layer", "neuron"], progress=False
    )

    def part(operation: str, site: str, k: int, alpha: float):
        return momentum.select(site=site, k=k, operation=operation), alpha

    attention = part("shift", "attention", 20, 8)
    return {
        "shift attention": Mix([attention]),
        "push ffn": Mix([part("push", "ffn", 40, 4)]),
        "shift layer": Mix([part("shift", "layer", 20, 1.5)]),
        "scale layer": Mix([part("scale", "layer", 10, 1)]),
        "push neuron": Mix([part("push", "neuron", 40, 4)]),
        "shift attention + layer": Mix([attention, part("shift", "layer", 20, 1)]),
        "several operations": Mix([attention, part("push", "ffn", 40, 3), part("scale", "layer", 10, 0.5)]),
        "prompt": Mix([attention], "prompt"),
        "generation": Mix([attention], "generation"),
        "last prompt token": Mix([part("shift", "layer", 20, 2)], "last_prompt_token"),
    }


@pytest.fixture(scope="module")
def expected(demo, mixes):
    """What the model writes greedily for each mix (None: unsteered) after each prompt, run by us before engines are."""
    return written_by_us(*demo, mixes, TOKENS)


@pytest.fixture(scope="module")
def engine(expected, mixes, tmp_path_factory):
    """Prompts are split over batches and batches are mixed: few tokens go into one."""
    from vllm import LLM

    from austeer.models.demo_model import demo_model

    with named(mixes, tmp_path_factory.mktemp("sets")):
        llm = LLM(
            str(demo_model()),
            max_model_len=128,
            max_num_batched_tokens=40,
            max_num_seqs=8,
            enforce_eager=True,
            max_logprobs=-1,
            logprobs_mode="raw_logits",
            **ENGINE,
        )
        yield llm
        llm.llm_engine.engine_core.shutdown()


def test_a_batch_of_mixed_requests_writes_what_our_own_steering_does(demo, expected, engine, mixes):
    asked = [(name, number) for number in range(len(PROMPTS)) for name in expected]
    outputs = engine.generate([PROMPTS[number] for _, number in asked], [asks(name, TOKENS) for name, _ in asked])
    for (name, number), output in zip(asked, outputs, strict=True):
        found = output.outputs[0].token_ids
        assert found == expected[name][number], (name, demo[1].decode(found))


@pytest.mark.parametrize(
    "name",
    ["shift attention", "push ffn", "shift layer", "scale layer", "push neuron", "shift attention + layer"],
)
def test_the_logits_are_those_of_the_dense_formula(demo, engine, mixes, exactness, name):
    model, tokenizer = demo
    ids = tokenizer(TEXT, return_tensors="pt")
    base = logits(model, ids)[0]
    with ExitStack() as stack:
        for plan, alpha in mixes[name].parts:
            stack.enter_context(formula_at(model, plan, alpha))
        expected = logits(model, ids)[0]
    found = logits_in(engine, ids["input_ids"], name)
    assert found.shape == expected.shape
    difference, effect = (found - expected).abs().max().item(), (expected - base).abs().max().item()
    exactness("vLLM, plugin", *name.split(" ", 1), difference, effect)
    assert difference < 1e-3 * effect
    untouched = logits_in(engine, ids["input_ids"], None)
    torch.testing.assert_close(untouched, base, rtol=0, atol=1e-3 * effect)


@pytest.mark.parametrize("name", ["kind", "", 3, []])
def test_an_unknown_set_is_refused_and_the_engine_goes_on(engine, name):
    before = engine.generate(PROMPTS[:1], asks("push ffn", 4))[0].outputs[0].token_ids
    with pytest.raises(Exception, match=r"steering set|expected the name"):
        engine.generate([PROMPTS[0]], asks(name, 4))
    assert engine.generate(PROMPTS[:1], asks("push ffn", 4))[0].outputs[0].token_ids == before
