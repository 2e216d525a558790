"""Steering sets for the vLLM plugin, and what our own steering and the dense formula make of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import austeer
from austeer.plans.serving import KEY, VARIABLE
from austeer.vllm import OPTIONS
from dense_formula import formula_at
from mixes import PROMPTS, Parts, engine_logits

#: What every engine with the plugin is started with.
ENGINE: dict[str, Any] = {"dtype": "float32", **OPTIONS}


@dataclass(frozen=True)
class Mix:
    """Plans with their strengths, and the scope of all of them."""

    parts: Parts
    scope: str = "all"

    @property
    def one_operation(self) -> bool:
        return len({plan.operation for plan, _ in self.parts}) == 1


@contextmanager
def named(mixes: Mapping[str, Mix], folder: Path, **declared: Any) -> Iterator[None]:
    """Engines that are started and asked in the context have these sets; the plans go into ``folder``.

    Args:
        declared: what else AUSTEER_SETS says.
    """
    sets = {}
    for name, mix in mixes.items():
        plans = []
        for number, (plan, alpha) in enumerate(mix.parts):
            path = folder / f"{name}-{number}".replace(" ", "-")
            plan.save_pretrained(path)
            plans.append({"plan": str(path), "alpha": alpha})
        sets[name] = {"plans": plans, "scope": mix.scope}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, json.dumps({"sets": sets, **declared}))
        yield


@contextmanager
def run_by_us(model: nn.Module, mix: Mix) -> Iterator[None]:
    """The model under our own steering; under the formula, where plans of several operations meet."""
    with ExitStack() as stack:
        if mix.one_operation:
            first, *rest = (plan for plan, _ in mix.parts)
            alpha = {plan.sites[0]: alpha for plan, alpha in mix.parts}
            stack.enter_context(austeer.steer(model, sum(rest, first), alpha=alpha, scope=mix.scope))
        else:
            assert mix.scope == "all"
            for plan, alpha in mix.parts:
                stack.enter_context(formula_at(model, plan, alpha))
        yield


def written_by_us(
    model: nn.Module, tokenizer: Any, mixes: Mapping[str, Mix], tokens: int
) -> dict[str | None, list[list[int]]]:
    """What the model writes greedily for each mix (None: unsteered) after each of PROMPTS, as Transformers runs it."""
    found: dict[str | None, list[list[int]]] = {name: [] for name in (None, *mixes)}
    for name, texts in found.items():
        with nullcontext() if name is None else run_by_us(model, mixes[name]):
            for prompt in PROMPTS:
                ids = tokenizer(prompt, return_tensors="pt")
                output = model.generate(**ids, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)  # type: ignore[operator]
                texts.append(output[0][ids["input_ids"].shape[1] :].tolist())
    # Otherwise an engine that ignores sets, or scopes, would pass for one that runs them.
    assert len(set(map(str, found.values()))) == len(found), found
    return found


def asks(name: str | None, tokens: int, **options: Any) -> Any:
    """The parameters of a request for a set."""
    from vllm import SamplingParams

    extra = None if name is None else {KEY: name}
    return SamplingParams(temperature=0, min_tokens=tokens, max_tokens=tokens, extra_args=extra, **options)


def logits_in(engine: Any, ids: torch.Tensor, name: str | None) -> torch.Tensor:
    """An engine's logits with a set: float32 [tokens, vocabulary]."""
    return engine_logits(engine, ids, extra_args=None if name is None else {KEY: name})


def random_mixes(model: nn.Module, seed: int = 0) -> dict[str, Mix]:
    """Random plans at every site, by the name of operation and site."""
    from dense_formula import random_plan

    kinds = [("attention", "shift"), ("neuron", "push"), ("ffn", "scale"), ("layer", "push"), ("layer", "shift")]
    plans: list[austeer.Plan] = [random_plan(model, site, 12, operation, seed) for site, operation in kinds]
    return {f"{plan.operation} {plan.sites[0]}": Mix([(plan, 1.5)]) for plan in plans}


@contextmanager
def run_in_process(sets: str) -> Iterator[None]:
    """Engines that are started and asked in the context have these sets, and run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, sets)
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        yield
