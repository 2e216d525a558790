"""Micro-benchmarks: ``pytest bench --benchmark-only``; compare with a saved run by ``--benchmark-compare``.

``--benchmark-group-by=group`` prints what belongs side by side in one table; ``-m gpu`` runs what needs a GPU.
"""

import functools

import pytest
import torch

from bench import shapes
from bench.catalogue import WAYS
from bench.graphs import wait
from bench.lineup import Case, Lineup


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    """The device of a benchmark; ``-m gpu`` runs those that need one."""
    return torch.device(request.param)


@pytest.fixture
def to_its_end(benchmark, device):
    """Times a function of no arguments to its end on the device."""

    def run(function, group: str, **known):
        def call():
            function()
            wait(device)

        call()
        benchmark.group = group
        benchmark.extra_info |= known
        benchmark(call)

    return run


@pytest.fixture
def timed(to_its_end):
    """The same, after checking what it gives against ``expected``."""

    def run(function, expected: torch.Tensor, *, group: str, rtol: float = 1e-2):
        error = (function().double() - expected.double()).norm() / expected.double().norm()
        assert error < rtol, f"wrong by {error:.2e}: a wrong result gets no time"
        to_its_end(function, group)

    return run


#: The sizes of two Llamas of random weights: one that a CPU decodes in milliseconds, and Llama-3.2-1B.
SIZES = (*shapes.SIZES[1:6], "head_dim")
SHAPES = {"cpu": (256, 688, 4, 4, 1, 64), "cuda": (2048, 8192, 16, 32, 8, 64)}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}


@functools.cache
def _model(kind: str) -> torch.nn.Module:
    shape = shapes.tiny(shapes.LLAMA_8B, **dict(zip(SIZES, SHAPES[kind])))
    return shapes.build(shape, torch.device(kind), DTYPES[kind])


@functools.cache
def _lineup(kind: str, batch: int, k: int) -> Lineup:
    return Lineup(_model(kind), Case(batch=batch, k=k), WAYS)


@pytest.fixture
def lineup_of(device):
    """All ways for so many rows and AUs of a random Llama on the device; the same ones for all benchmarks."""
    return functools.partial(_lineup, device.type)


def pytest_benchmark_update_machine_info(config, machine_info):
    """A result is published: the machine's name on its network is nobody's business."""
    machine_info.pop("node", None)


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Only the statistics are kept; single samples would be megabytes."""
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
