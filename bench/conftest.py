"""Micro-benchmarks: ``pytest bench --benchmark-only``; compare with a saved run by ``--benchmark-compare``.

``--benchmark-group-by=group`` prints what belongs side by side in one table; ``-m gpu`` runs what needs a GPU.
"""

import functools

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.gate import Exact, Gate
from bench.lineup import GATE_TOKENS, prompts
from bench.plans import spread_plan


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


#: Llamas of random weights: one that a CPU decodes in milliseconds, and one of the shape of Llama-3.2-1B.
SHAPES = {
    "cpu": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4},
    "cuda": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}


@functools.cache
def _model(kind: str) -> tuple[LlamaForCausalLM, Exact]:
    torch.manual_seed(0)
    heads = SHAPES[kind]["num_attention_heads"]
    config = LlamaConfig(**SHAPES[kind], vocab_size=2048, num_key_value_heads=max(heads // 4, 1))
    with torch.device(kind):
        model = LlamaForCausalLM(config).to(DTYPES[kind]).eval()
    return model, Exact(model)


@functools.cache
def _gate(kind: str, k: int) -> Gate:
    model, exact = _model(kind)
    return Gate(model, exact, spread_plan(model, "ffn", k), prompts(model, 1, GATE_TOKENS)(-2))


@pytest.fixture
def random_llama(device):
    """A Llama of random weights on the device; the same one for all benchmarks."""
    return _model(device.type)[0]


@pytest.fixture
def gate_of(device):
    """The gate of that model for k AUs at the ffn site; its ``alpha`` is the strength to steer with."""
    return lambda k: _gate(device.type, k)


def pytest_benchmark_update_machine_info(config, machine_info):
    """A result is published: the machine's name on its network is nobody's business."""
    machine_info.pop("node", None)


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Only the statistics are kept; single samples would be megabytes."""
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
