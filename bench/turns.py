"""Several models generating by turns: after each token of one comes a token of another, so drift meets all alike.

Each generation is a greenlet that hands over in a stopping criterion, which Transformers calls after every token: any
library's own ``generate`` can take part, and what is timed is all that its user waits for. Without greenlet whole
generations take turns, and the criterion only looks at the clock.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from .graphs import no_collection, wait
from .steered import Steered

try:
    import greenlet
except ImportError:
    greenlet = None

#: What takes turns here: "tokens", or "generations" without greenlet.
TURNS = "generations" if greenlet is None else "tokens"


class _EachToken(StoppingCriteria):
    """Stops nothing; calls a function after each token."""

    def __init__(self, ids: Tensor, call: Callable[[], object]):
        self._nobody, self._call = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device), call

    def __call__(self, input_ids, scores, **options) -> Tensor:  # type: ignore[override]
        self._call()
        return self._nobody


def _generate(steered: Steered, ids: Tensor, tokens: int, call: Callable[[], object]) -> Tensor:
    """Greedy tokens, exactly so many."""
    criteria = StoppingCriteriaList([_EachToken(ids, call)])
    length = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    return steered.generate(ids, **length, do_sample=False, stopping_criteria=criteria)


class Generation:
    """One greedy generation that goes on by a token at a time."""

    def __init__(self, steered: Steered, ids: Tensor, tokens: int):
        self._steered, self._ids, self._tokens = steered, ids, tokens
        self._greenlet = greenlet.greenlet(self._run)
        self.output: Tensor | None = None

    def _run(self) -> None:
        self.output = _generate(self._steered, self._ids, self._tokens, lambda: greenlet.getcurrent().parent.switch())

    def step(self) -> float:
        """Seconds until the next token is there."""
        with self._steered.active():
            wait(self._ids.device)
            begin = time.perf_counter()
            self._greenlet.switch()
            wait(self._ids.device)
            return time.perf_counter() - begin

    def finish(self) -> Tensor:
        """Lets it end; [batch, prompt + tokens]."""
        with self._steered.active():
            while not self._greenlet.dead:
                self._greenlet.switch()
        assert self.output is not None
        return self.output

    def abandon(self) -> None:
        """Ends it where it is."""
        if self._greenlet and not self._greenlet.dead:
            self._greenlet.throw(greenlet.GreenletExit)


def _whole(steered: Steered, ids: Tensor, tokens: int) -> list[float]:
    """Seconds of each token of one generation."""
    times: list[float] = []

    def tick() -> None:
        wait(ids.device)
        times.append(time.perf_counter())

    with steered.active():
        tick()
        _generate(steered, ids, tokens, tick)
    return [end - start for start, end in pairwise(times)]


def by_turns(
    ways: Mapping[str, Steered],
    prompts: Callable[[int], Tensor],
    tokens: int,
    go_on: Callable[[int], bool],
    on_generation: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, list[list[float]]]]:
    """Seconds of all ways, token by token, in a new random order at each.

    Args:
        prompts: the token numbers [batch, prompt] of each generation, by its number; that of the first, which only
            warms up, is -1. tokens: at least 2, of each generation.
        go_on: whether there is to be another generation, by how many there were.

    Returns:
        "first_token" and "token" (further ones): by way [generations][tokens].
    """
    shuffle = random.Random(0).shuffle
    times: dict[str, dict[str, list[list[float]]]] = {
        what: {name: [] for name in ways} for what in ("first_token", "token")
    }
    order, number = list(ways), -1
    gradients = torch.is_grad_enabled()  # a generation that was left in the middle has switched them off
    while number < 0 or go_on(number):
        ids = prompts(number)
        running = {} if greenlet is None else {name: Generation(way, ids, tokens) for name, way in ways.items()}
        gc.collect()
        try:
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            with no_collection():
                for _ in range(tokens if running else 1):
                    shuffle(order)
                    for name in order:
                        seconds[name] += [running[name].step()] if running else _whole(ways[name], ids, tokens)
                for generation in running.values():
                    generation.finish()
        finally:
            for generation in running.values():
                generation.abandon()
            torch.set_grad_enabled(gradients)
        if number >= 0:
            for name, (first, *rest) in seconds.items():
                times["first_token"][name].append([first])
                times["token"][name].append(rest)
        number += 1
        on_generation()
    return times
