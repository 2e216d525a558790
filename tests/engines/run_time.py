"""Requests to an engine of the vLLM plugin that runs in this process, and what comes of them."""

from __future__ import annotations

from dataclasses import replace

import torch

import austeer
from mixes import PROMPTS

TOKENS, BLOCK, SLOTS = 24, 32, 3
#: Of several blocks, the last of them not full.
LONG = " ".join(PROMPTS) * 5


def ask(engine, *asked: dict | None, prompt: str | dict = LONG) -> list[list[int]]:
    """The tokens of requests that run at once, each with such ``extra_args``."""
    from vllm import SamplingParams

    params = [SamplingParams(temperature=0, min_tokens=TOKENS, max_tokens=TOKENS, extra_args=extra) for extra in asked]
    outputs = engine.generate([prompt] * len(params), params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def hits(engine) -> int:
    """Prompt tokens that came from the prefix cache so far."""
    return next(metric.value for metric in engine.get_metrics() if metric.name == "vllm:prefix_cache_hits")


def put_off(engine) -> int:
    """How often requests were put off so far."""
    return next(metric.value for metric in engine.get_metrics() if metric.name == "vllm:num_preemptions")


def plan_beside(plan: austeer.Plan) -> austeer.Plan:
    """The same strengths at the AUs after a plan's own."""
    taken = set(plan.keys())  # a plan's items are its AUs
    index = []
    for site, layer, at in plan.keys():  # noqa: SIM118
        at = next(i % plan.model.widths[site] for i in range(at + 1, at + 200) if (site, layer, i) not in taken)
        taken.add((site, layer, at))
        index.append(at)
    return replace(plan, index=torch.tensor(index, dtype=torch.int32))


def single_tokens(tokenizer, tokens: list[int]) -> list[tuple[int, str]]:
    """Of some tokens those that are the whole text of themselves: (place, text)."""
    texts = [(place, tokenizer.decode([token])) for place, token in enumerate(tokens)]
    return [
        (place, text)
        for place, text in texts
        if tokenizer(text, add_special_tokens=False)["input_ids"] == [tokens[place]]
        and tokens.index(tokens[place]) == place
    ]
