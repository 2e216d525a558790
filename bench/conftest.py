"""Micro-benchmarks: ``pytest bench --benchmark-only``; compare with a saved run by ``--benchmark-compare``."""

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    """The device of a benchmark; ``-m gpu`` runs those that need one."""
    return torch.device(request.param)


@pytest.fixture
def timed(benchmark, device):
    """Times a function of no arguments to its end on the device, after checking what it gives against ``expected``."""

    def run(function, expected: torch.Tensor, *, group: str, rtol: float = 1e-2):
        got = function()
        error = (got.double() - expected.double()).norm() / expected.double().norm()
        assert error < rtol, f"wrong by {error:.2e}: a wrong result gets no time"
        benchmark.group = group

        def to_its_end():
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()

        benchmark(to_its_end)

    return run
