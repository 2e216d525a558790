"""Whole steered forward passes, a prefill and a decoding step, under every way that can be had here.

The ratios that are published come from ``austeer bench``, which takes turns token by token. These show a pull request
what it does to each way: compare it with main by ``--benchmark-compare``, or by ``austeer bench --compare``.
"""

from contextlib import ExitStack

import pytest
import torch

from bench.catalogue import AGAIN, UNSTEERED, WAYS
from bench.lineup import prompts
from bench.plans import spread_plan
from bench.steered import UnavailableError, twin

PROMPT = 32


def prefill(model, ids):
    return lambda: model(ids, use_cache=True, logits_to_keep=1)


def decode(model, ids):
    """One step after the prompt, again and again at the same place."""
    cache, token = model(ids, use_cache=True).past_key_values, ids[:, :1]

    def step():
        model(token, past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return step


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other would show what else the machine does, and the model is small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.benchmark(max_time=0.4, min_rounds=5, disable_gc=True)
@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("k", [10, 100])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("phase", [prefill, decode], ids=lambda phase: phase.__name__)
@torch.no_grad()
def test_forward(benchmark, device, random_llama, gate_of, phase, batch, k, way):
    if not WAYS[way].module:
        pytest.skip(f"{way} only generates as a whole; austeer bench times it")
    gate = gate_of(k)
    with ExitStack() as stack:
        try:
            steered = WAYS[way].make(twin(random_llama), spread_plan(random_llama, "ffn", k), gate.alpha)
        except UnavailableError as reason:
            pytest.skip(str(reason))
        stack.callback(steered.close)
        outcome = gate(steered)
        if way not in (UNSTEERED, AGAIN):
            assert not outcome.reason, f"{outcome.reason}: a wrong result gets no time"
            benchmark.extra_info["error"] = outcome.error
        stack.enter_context(steered.active())
        run = phase(steered.model, prompts(random_llama, batch, PROMPT)(-1))

        def to_its_end():
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()

        to_its_end()
        benchmark.group = f"{phase.__name__}, batch {batch}, k={k}, {device}"
        benchmark.extra_info |= {
            **{"way": way, "phase": phase.__name__, "k": k, "batch": batch, "site": "ffn"},
            **{"device": device.type, "dtype": str(random_llama.dtype).removeprefix("torch.")},
            **{"effect": outcome.effect, "allowed": outcome.allowed, "alpha": gate.alpha},
        }
        benchmark(to_its_end)
