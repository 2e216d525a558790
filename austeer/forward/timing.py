"""Time per token of variants of one model, interleaved, so that a machine's drift meets all of them alike."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from ..models.structure import input_device
from ..utils.machine import wait_for


@dataclass(frozen=True)
class Timing:
    """Seconds a token of one variant, and its ratio to the reference, round by round.

    Attributes:
        seconds: median seconds a token. rounds: how many.
        ratio: median of the rounds' ratios to the reference variant. low, high: their quartiles.
    """

    seconds: float
    ratio: float
    low: float
    high: float
    rounds: int


def decode_times(
    model: nn.Module,
    tokenizer,
    variants: Mapping[str, Callable[[], AbstractContextManager]],
    *,
    prompt: str,
    tokens: int = 8,
    rounds: int = 12,
    seed: int = 0,
    on_round: Callable[[], None] = lambda: None,
    is_over: Callable[[], bool] = lambda: False,
) -> dict[str, Timing]:
    """Times greedy decoding at batch 1 with a KV cache; the first variant is the reference of the ratios.

    In each round every variant decodes ``tokens`` tokens once, in a new random order. Entering the variant's context,
    the prompt's pass and one token come before the clock starts. One more round, not counted, warms up.

    Args:
        is_over: whether time is up: then no further rounds are made, and the result is empty if there was none.
    """
    ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=input_device(model))
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants)
    shuffle = random.Random(seed).shuffle
    for number in range(rounds + 1):
        if number not in (0, 2) and is_over():  # one round alone has no spread
            break
        shuffle(order)
        for name in order:
            with variants[name]():
                took = _decode(model, ids, tokens)
            if number:
                seconds[name].append(took / tokens)
        on_round()
    reference, found = seconds[next(iter(variants))], {}
    if not reference:
        return {}
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(values, reference, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        found[name] = Timing(statistics.median(values), statistics.median(ratios), low, high, len(values))
    return found


@torch.no_grad()
def _decode(model: nn.Module, ids: torch.Tensor, tokens: int) -> float:
    output = model(ids, use_cache=True)
    start = 0.0
    for step in range(tokens + 1):
        if step == 1:
            wait_for(ids.device)
            start = time.perf_counter()
        token = output.logits[:, -1:].argmax(-1)
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
    wait_for(ids.device)
    return time.perf_counter() - start
