"""Where the time of the dense form goes at one site: its operations by themselves, the hook around them, and ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

import austeer_kernels as ak

from .graphs import Replay, interleaved, spread

#: What a call takes about, for the length of a sample.
_SECONDS = 2e-6


@torch.no_grad()
def measure(sites: int, shape: tuple[int, int], k: int, dtype: torch.dtype, device: torch.device, rounds: int) -> dict:
    """Microseconds a call of every part, on a tensor [tokens, width], by turns; on a GPU in CUDA graphs.

    ``hook`` is what a PyTorch hook that does nothing adds to a module's call: time of the host, so only on a CPU.

    Args:
        sites: at how many layers the public form runs; is passed on. k: how many of the columns are AUs, in ``columns``
            and in ``index`` (advanced indexing: read, multiply, write).
    """
    tokens, width = shape
    x, steered = (torch.randn(tokens, width, device=device).to(dtype) for _ in range(2))
    gamma = torch.zeros(width, device=device, dtype=dtype)
    index = torch.randperm(width, device=device)[: min(k, width)].sort().values
    few, none = torch.zeros(1, len(index), device=device), torch.zeros(1, len(index), device=device)
    one = torch.ones(len(index), device=device, dtype=dtype)

    def public() -> Tensor:
        return x.copy_(x + gamma * x)

    def advanced() -> Tensor:
        x[:, index] *= one
        return x

    calls: dict[str, Callable[[], Any]] = {
        "multiply": lambda: gamma * x,
        "add": lambda: x + steered,
        "copy": lambda: x.copy_(steered),
        "public form": public,
        "in-place": lambda: x.addcmul_(x, gamma),
        "index": advanced,
        "columns": lambda: ak.steer_columns_(x, index, few, none),
    }
    if device.type == "cpu":
        bare, hooked = nn.Identity(), nn.Identity()
        hooked.register_forward_hook(lambda module, args, output: None)
        calls |= {"bare call": lambda: bare(x), "hooked call": lambda: hooked(x)}
    seconds = interleaved({name: Replay([call], device, _SECONDS) for name, call in calls.items()}, rounds)
    if device.type == "cpu":
        bare_calls = seconds.pop("bare call")
        seconds["hook"] = [a - b for a, b in zip(seconds.pop("hooked call"), bare_calls)]
    us = {name: asdict(spread([1e6 * one for one in values])) for name, values in seconds.items()}
    return {"sites": sites, "shape": [tokens, width], "aus": len(index), "us": us}
