"""One decoding step with a static cache, eager, compiled or as a CUDA graph, where the host is out of the way."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping
from types import FunctionType

import torch
from torch import Tensor
from transformers import StaticCache

from .graphs import captured, no_collection, wait
from .steered import Steered, UnavailableError

EAGER, COMPILE, GRAPH = "eager", "compile", "graph"
#: Steps after which the cache is wound back, outside of what is timed.
ROOM = 32
#: About how long a sample of steps on a GPU is.
SAMPLE_SECONDS = 0.012


class Step:
    """Decodes one token a row after a prompt, again and again at the same place.

    Args:
        steered: a way whose model is a module. ids: [batch, prompt]. execution: "eager", "compile" or "graph".

    Raises:
        UnavailableError: the model cannot be compiled in one graph, or captured.
    """

    @torch.no_grad()
    def __init__(self, steered: Steered, ids: Tensor, execution: str):
        self._steered, self.compiled = steered, execution == COMPILE
        model, (rows, length) = steered.model, ids.shape
        self.token = ids[:, :1].clone()
        self._position = torch.full_like(self.token, length)
        self._cache = StaticCache(config=model.config, max_cache_len=length + ROOM)  # type: ignore[arg-type]
        # Four dimensions: nothing is worked out on the host, which a graph would freeze. Added to the scores, as every
        # attention takes it; some would add True as 1.
        hidden = torch.arange(length + ROOM, device=ids.device) > length
        lowest = torch.finfo(model.dtype).min
        self._mask = torch.where(hidden, lowest, 0.0).to(model.dtype).expand(rows, 1, 1, -1).contiguous()
        with steered.active():
            model(ids, past_key_values=self._cache, use_cache=True)
            # What says how far a layer of the cache is filled; the rest are keys, values and settings.
            filled = [
                {k: v for k, v in vars(c).items() if k.startswith("cumulative_length")} for c in self._cache.layers
            ]
            self._filled = [{k: v.clone() if isinstance(v, Tensor) else v for k, v in of.items()} for of in filled]
            self._call: Callable[[], Tensor] = self._eager()
            self._graph: torch.cuda.CUDAGraph | None = None
            try:
                if execution == COMPILE:
                    self._call = torch.compile(self._call, fullgraph=True, dynamic=False)
                    self._call()
                elif execution == GRAPH:
                    self._capture(ids.device)
            except Exception as error:
                raise UnavailableError(f"{execution}: {type(error).__name__}: {error}".splitlines()[0][:300]) from error
        self.rewind()

    def _eager(self) -> Callable[[], Tensor]:
        """The step, as a function with code of its own: compiled code is looked up by it, and each way has another."""

        def step() -> Tensor:
            return model(
                input_ids=token, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
            ).logits[:, -1]

        model, token, mask = self._steered.model, self.token, self._mask
        position, cache = self._position, self._cache
        return FunctionType(step.__code__.replace(), globals(), "step", None, step.__closure__)  # type: ignore[return-value]

    def _capture(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise UnavailableError("found a CPU, expected a GPU; use execution 'eager' or 'compile'")

        def warm_up() -> None:
            self.rewind()
            self._call()
            self.rewind()
            # What waits for the device breaks a capture, and a broken capture may end the process (PyTorch 2.11 keeps
            # its allocator in capture mode); here it is an error like any other.
            torch.cuda.set_sync_debug_mode("error")
            try:
                self._call()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            self.rewind()

        self._graph, self._out = captured(self._call, warm_up, device)

    def rewind(self) -> None:
        """Makes the cache end with the prompt again."""
        for layer, filled in zip(self._cache.layers, self._filled):
            for name, value in filled.items():
                if isinstance(value, Tensor):
                    getattr(layer, name).copy_(value)
                else:
                    setattr(layer, name, value)

    @torch.no_grad()
    def run(self) -> Tensor:
        """The logits [batch, vocabulary] of the step after the prompt."""
        self.rewind()
        with self._steered.active():
            if self._graph is None:
                return self._call().clone()
            self._graph.replay()
            return self._out.clone()

    @torch.no_grad()
    def advance(self, steps: int) -> None:
        """Steps one after another, queued and no more; the cache has room for ``ROOM`` since it was wound back."""
        for _ in range(steps):
            if self._graph is None:
                self._call()
            else:
                self._graph.replay()

    @torch.no_grad()
    def sample(self, steps: int) -> float:
        """Seconds a step, of fewer than ``ROOM`` steps one after another; under a graph by the device's own clock."""
        self.rewind()
        with self._steered.active():
            if self._graph is not None:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self.advance(1)  # not timed: keeps the device busy until what is timed is queued
                begin.record()
                self.advance(steps)
                end.record()
                end.synchronize()
                return begin.elapsed_time(end) * 1e-3 / steps
            wait(self.token.device)
            start = time.perf_counter()
            self.advance(steps)
            wait(self.token.device)
            return (time.perf_counter() - start) / steps


def by_turns(
    steps: Mapping[str, Step], group: int, go_on: Callable[[int], bool], on_group: Callable[[], None]
) -> dict[str, list[list[float]]]:
    """Seconds a step of every way, [groups][group]; in a new random order at each sample."""
    shuffle, order = random.Random(0).shuffle, list(steps)
    seconds: dict[str, list[list[float]]] = {name: [] for name in steps}
    # On a GPU a sample is so long that its ends do not count; a step of a large model is by itself.
    longest = max((step.sample(1) for step in steps.values() if step.token.is_cuda), default=SAMPLE_SECONDS)
    together = max(1, min(ROOM - 2, round(SAMPLE_SECONDS / longest)))
    if any(step.compiled for step in steps.values()):
        together = 1  # where a cache counts on the host, each further place would be compiled anew
    number = -1  # one more group warms up
    while number < 0 or go_on(number):
        gc.collect()
        with no_collection():
            found: dict[str, list[float]] = {name: [] for name in steps}
            for _ in range(group):
                shuffle(order)
                for name in order:
                    found[name].append(steps[name].sample(together))
        if number >= 0:
            for name, values in found.items():
                seconds[name].append(values)
        number += 1
        on_group()
    return seconds
