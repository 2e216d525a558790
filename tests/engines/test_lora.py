"""Plans as LoRA adapters inside one vLLM engine, and in PEFT: tokens and logits are those of our own steering."""

from __future__ import annotations

import json
from contextlib import ExitStack

import pytest
import torch

from austeer.export import export_lora
from dense_formula import formula_at, logits
from mixes import PROMPTS, TEXT, TOKENS, engine_logits

pytestmark = pytest.mark.engine
#: What full logits are compared on.


@pytest.fixture(scope="module")
def engine(demo):
    """One engine with room for every adapter in one batch, that gives the logits of the whole vocabulary."""
    from vllm import LLM

    from austeer.models.demo_model import demo_model

    llm = LLM(
        str(demo_model()),
        dtype="float32",
        max_model_len=128,
        enforce_eager=True,
        enable_lora=True,
        max_loras=4,
        max_lora_rank=16,
        max_logprobs=-1,
        logprobs_mode="raw_logits",
    )
    yield llm
    llm.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def requests(adapters):
    """What asks the engine for a mix: None for the base model."""
    from vllm.lora.request import LoRARequest

    found = {name: LoRARequest(name, number, str(folder)) for number, (name, folder) in enumerate(adapters.items(), 1)}
    return {"base": None, **found}


def test_a_batch_of_mixed_requests_writes_what_our_own_steering_does(demo, engine, requests, written):
    from vllm import SamplingParams

    asked = [(name, number) for number in range(len(PROMPTS)) for name in requests]
    outputs = engine.generate(
        [PROMPTS[number] for _, number in asked],
        SamplingParams(temperature=0, max_tokens=TOKENS),
        lora_request=[requests[name] for name, _ in asked],
    )
    for (name, number), output in zip(asked, outputs, strict=True):
        assert output.outputs[0].token_ids == written[name][number], (name, demo[1].decode(output.outputs[0].token_ids))


@pytest.fixture(scope="module")
def exact(demo, mixes):
    """The dense formula's logits on TEXT for each mix: float32 [tokens, vocabulary]; and the text's token ids."""
    model, tokenizer = demo
    ids = tokenizer(TEXT, return_tensors="pt")
    found = {}
    for name, parts in mixes.items():
        with ExitStack() as stack:
            for plan, alpha in parts:
                stack.enter_context(formula_at(model, plan, alpha))
            found[name] = logits(model, ids)[0]
    return found, ids


def errors(found: torch.Tensor, exact: dict[str, torch.Tensor], name: str) -> tuple[float, float]:
    """The largest error of a logit, and the steering's own largest effect on one."""
    assert found.shape == exact[name].shape
    effect = (exact[name] - exact["base"]).abs().max().item()
    return (found - exact[name]).abs().max().item(), effect


@pytest.mark.parametrize("name", ["attention", "ffn", "attention + ffn"])
def test_the_logits_in_vllm_are_those_of_the_dense_formula(engine, requests, exact, exactness, name):
    expected, ids = exact
    difference, effect = errors(engine_logits(engine, ids["input_ids"], requests[name]), expected, name)
    exactness("vLLM, LoRA adapter", "scale", name, difference, effect)
    assert difference < 1e-3 * effect


def test_the_base_model_is_not_touched(engine, requests, exact):
    expected, ids = exact
    found = engine_logits(engine, ids["input_ids"], None)
    difference = (found - expected["base"]).abs().max().item()
    assert difference < 1e-3 * errors(found, expected, "attention")[1]


def test_the_server_may_choose_alpha_by_the_adapters_scaling(engine, requests, exact, mixes, adapters, tmp_path):
    """An adapter of strength 1 whose ``lora_alpha`` is multiplied by alpha is the adapter of strength alpha."""
    from vllm.lora.request import LoRARequest

    from austeer.models.demo_model import demo_model

    ((plan, alpha),) = mixes["attention"]
    folder = export_lora(plan, demo_model(), tmp_path / "one")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["lora_alpha"] *= alpha
    (folder / "adapter_config.json").write_text(json.dumps(config))
    expected, ids = exact
    found = engine_logits(engine, ids["input_ids"], LoRARequest("scaled", 9, str(folder)))
    difference, effect = errors(found, expected, "attention")
    assert difference < 1e-3 * effect


@pytest.mark.parametrize("name", ["attention", "ffn", "attention + ffn"])
def test_the_logits_in_peft_are_those_of_the_dense_formula(demo, adapters, exact, exactness, name):
    from peft import PeftModel

    expected, ids = exact
    model = PeftModel.from_pretrained(demo[0], adapters[name])
    try:
        difference, effect = errors(logits(model, ids)[0], expected, name)
    finally:
        model.unload()
    exactness("PEFT, LoRA adapter", "scale", name, difference, effect)
    assert difference < 1e-3 * effect
