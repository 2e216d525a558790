"""What one decoding step launches and moves: counted operation by operation, and on a GPU with the profiler."""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .counted_ops import CountedOps
from .steered import Steered

#: For ways whose steps cannot be taken one by one.
UNKNOWN: dict[str, Any] = dict.fromkeys(("launches", "bytes", "operations", "host_seconds", "device_seconds"))
_TIMES = 3


@torch.no_grad()
def of_step(steered: Steered, ids: Tensor) -> dict[str, Any]:
    """Counts of one token a row after the prompt, in eager mode.

    On a CPU ``launches`` are the operations that do work, ``bytes`` what they read and write and ``operations`` their
    arithmetic (:mod:`bench.counted_ops`). On a GPU ``launches`` are kernels and copies, ``device_seconds`` the time
    that they run, and ``host_seconds`` the time until all is queued; bytes are counted in the same way.

    Args:
        steered: its model takes tokens itself. ids: [batch, prompt].
    """
    model, token = steered.model, ids[:, :1]
    with steered.active():
        cache = model(ids, use_cache=True).past_key_values
        spare = copy.deepcopy(cache)  # not every cache can forget a token

        def step() -> None:
            model(token, past_key_values=cache, use_cache=True)

        model(token, past_key_values=spare, use_cache=True)
        with CountedOps(model) as counted:
            step()
        found = UNKNOWN | {
            "launches": counted.launches,
            "bytes": counted.read + counted.written,
            "operations": counted.operations,
        }
        return found | (_on_gpu(model, step, ids.device) if ids.is_cuda else {})


def _on_gpu(model: nn.Module, step: Any, device: torch.device) -> dict[str, Any]:
    host = []
    for _ in range(_TIMES):
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        step()
        host.append(time.perf_counter() - begin)
    torch.cuda.synchronize(device)
    # Of the device alone: reading the host's tens of thousands of events would take seconds.
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(_TIMES):
            step()
        torch.cuda.synchronize(device)
    events = [event for event in profiled.events() if event.device_type == DeviceType.CUDA]
    return {
        "launches": len(events) / _TIMES,
        "device_seconds": sum(event.time_range.elapsed_us() for event in events) * 1e-6 / _TIMES,
        "host_seconds": statistics.median(host),
    }
