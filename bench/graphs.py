"""Times on a device: CUDA-graph replays of calls over rotated inputs, in interleaved rounds, on warm clocks.

On a CPU the same calls are made one by one.
"""

from __future__ import annotations

import functools
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: A sample is to last this many seconds at least, so that the gap between two graphs does not count ...
SAMPLE_SECONDS = {"cuda": 1.5e-3, "cpu": 1e-4}
#: ... but a graph has at most about this many calls, so that capturing it takes milliseconds.
MOST_CALLS = 256


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of as many values as there were rounds."""

    median: float
    low: float
    high: float
    rounds: int


def spread(values: Sequence[float]) -> Spread:
    """The spread of at least two values."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high, len(values))


def copies_of(bytes_each: int, device: torch.device) -> int:
    """How many copies of the inputs make more than three times the L2 cache, so that no call finds its own in it."""
    return min(max(2, 3 * l2_bytes(device) // max(bytes_each, 1) + 1), MOST_CALLS)


@functools.cache
def l2_bytes(device: torch.device) -> int:
    """The size of the L2 cache of a GPU; a nominal 64 KiB of a CPU, whose times are for no comparison."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 1 << 16


def wait(device: torch.device) -> None:
    """Until a GPU has done all that it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def no_collection() -> Iterator[None]:
    """Python's collector off: a collection would be charged to whom it meets."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all captures: libraries keep a workspace for each stream that they have seen."""
    return torch.cuda.Stream(device)


def captured(run: Callable[[], Any], warm_up: Callable[[], Any], device: torch.device) -> tuple[Any, Any]:
    """A CUDA graph of ``run``, and what that gave.

    Args:
        warm_up: compiles kernels, chooses algorithms, allocates workspaces: all forbidden in a capture.
    """
    stream, current = capture_stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        warm_up()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = run()
    return graph, result


class Replay:
    """Calls that do the same work, each on its own copy of the inputs; timed as a whole.

    Args:
        calls: functions of no arguments, one for each copy.
        seconds: what one call is expected to take; decides how often all calls are repeated in a sample.

    Attributes:
        result: what the last call returned; on a GPU a tensor that each replay fills anew.
        count: how many calls a sample makes.
    """

    def __init__(self, calls: Sequence[Callable[[], Any]], device: torch.device, seconds: float):
        self.calls, self.device = list(calls), device
        passes = math.ceil(SAMPLE_SECONDS[device.type] / (max(seconds, 1e-9) * len(self.calls)))
        self.count = len(self.calls) * max(1, min(passes, MOST_CALLS // len(self.calls)))
        self.result: Any = None
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            self._capture()
        else:
            self._run(1)

    def _run(self, passes: int) -> None:
        for _ in range(passes):
            for call in self.calls:
                self.result = call()

    def _capture(self) -> None:
        passes = self.count // len(self.calls)
        self._graph, _ = captured(lambda: self._run(passes), lambda: self._run(1), self.device)
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run(self) -> Any:
        """Makes all calls once more, to their end; returns ``result``."""
        if self._graph is None:
            self._run(1)
        else:
            self._graph.replay()
            torch.cuda.synchronize(self.device)
        return self.result

    def sample(self) -> float:
        """Seconds a call."""
        if self._graph is None:
            begin = time.perf_counter()
            self._run(self.count // len(self.calls))
            return (time.perf_counter() - begin) / self.count
        self._graph.replay()  # not timed: warms the clocks, and keeps the GPU busy until what is timed is queued
        self._begin.record()
        self._graph.replay()
        self._end.record()
        self._end.synchronize()
        return self._begin.elapsed_time(self._end) * 1e-3 / self.count


def interleaved(replays: Mapping[str, Replay], rounds: int) -> dict[str, list[float]]:
    """Seconds a call of each variant, round by round; in each round all are sampled, in a new random order."""
    order, shuffle = list(replays), random.Random(0).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in replays}
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            seconds[name].append(replays[name].sample())
    return seconds


def ratios(values: Sequence[float], reference: Sequence[float]) -> Spread:
    """The spread of the rounds' ratios: what drifts from round to round drops out."""
    return spread([a / b for a, b in zip(values, reference, strict=True)])


def warm_up(device: torch.device) -> None:
    """Keeps a GPU busy for a second, until its clocks have risen. Nothing on a CPU."""
    if device.type != "cuda":
        return
    a = torch.randn(4096, 4096, device=device, dtype=torch.float16)
    end = time.perf_counter() + 1.0
    while time.perf_counter() < end:
        for _ in range(20):
            torch.matmul(a, a)
        torch.cuda.synchronize(device)


def relative_error(found: Tensor, exact: Tensor) -> float:
    """|found - exact| / |exact| in Euclidean norm; infinite where ``found`` has NaN."""
    error = float(torch.linalg.vector_norm(found.double() - exact) / torch.linalg.vector_norm(exact))
    return error if math.isfinite(error) else math.inf


class WrongResultError(Exception):
    """A variant does not compute what it is timed for."""


def check(name: str, found: Tensor, plain: Tensor, exact: Tensor) -> tuple[float, float]:
    """(error, plain PyTorch's error) of a variant, both relative to float64. To be called before it is timed.

    Raises:
        WrongResultError: the error is more than twice plain PyTorch's, and more than rounding's smallest trace.
    """
    if found.shape != exact.shape:
        raise WrongResultError(f"{name}: gives {list(found.shape)}, expected {list(exact.shape)}")
    error, own = relative_error(found, exact), relative_error(plain, exact)
    allowed = 2 * own + torch.finfo(found.dtype).eps / 100
    if error > allowed:
        raise WrongResultError(
            f"{name}: errs by {error:.2e}, expected at most {allowed:.2e}; a wrong result gets no time"
        )
    return error, own
