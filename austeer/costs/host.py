"""What the host takes to call operations in eager mode: for the model, and for each way to steer at a site.

A launch of an unsteered model stands for everything around it, Transformers' Python and PyTorch's modules too, and is
what differs from one machine to another: it is measured on this one, or given. The parts of what a way adds were
measured beside it on one machine (below), and are taken to be slower or faster elsewhere as the model is.
"""

from __future__ import annotations

import functools
import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..errors import AusteerError
from ..models.skeleton import skeleton
from ..utils.machine import wait_for
from .unsteered import traced

# Host us in eager mode, one decoded token of Llama-3.1-8B at a time, k = 100 at ffn in 32 layers: an NVIDIA H200,
# torch 2.11, transformers 5.17 (bench/results/nvidia-h200/inference-llama-3.1-8b-eager-2026-11-27.json). What a way
# adds a site is the difference of its token to the unsteered one over 32.
#: A launch of the model itself: a token of 44.6 ms over the 1301 launches of :func:`.unsteered.traced`.
MODEL = 44600 / 1301
#: A PyTorch operation of someone else's: the public code's form, written into the forward pass, is three of them.
OPERATION = 59 / 3
#: Entering a PyTorch hook: one with a single operation takes 35.
HOOK = 35 - OPERATION
#: Indexing with a tensor of positions, reading and writing: a hook that multiplies so takes 112, with three operations.
INDEXING = 112 - HOOK - 3 * OPERATION
#: The Python of PEFT's adapter around its four operations, which take 181 together.
ADAPTER = 181 - 4 * OPERATION
# Parts of our own kernels' calls, by experiments on a CPU with a driver that does nothing and caches evicted before
# each site. They add up to 238 for a sparse kernel and 398 for a split product, where the H200 showed 262 and 370.
#: accelerate's wrapper and our Python. PyTorch's registry of operations. Our launcher and Triton's, each launch.
WRAPPER, REGISTRY, KERNEL = 18.0, 40.0, 180.0
#: ESTIMATED: the bound method of the run-time form, as entering a hook. On a CPU (`python -m bench.host --cold`) one
#: operation in it took 0.8 to 1.2 times as long as the hook with one, the three of push 1.6 times.
BOUND = HOOK

#: Way -> (us a site, us an operation) on that machine, where no kernel of ours runs.
_WAYS: dict[str, tuple[float, float]] = {
    "fold": (0.0, 0.0),
    "bias": (0.0, 0.0),
    "columns": (BOUND, OPERATION),
    "fused": (WRAPPER + REGISTRY, OPERATION),
    "dense": (WRAPPER, OPERATION),
    "public": (0.0, OPERATION),
    "dense hook": (HOOK, OPERATION),
    "sparse hook": (HOOK + INDEXING, OPERATION),
    "lora": (ADAPTER, OPERATION),
}


@dataclass(frozen=True)
class Host:
    """The host's pace.

    Attributes:
        launch: seconds of the host for each launch of a model in eager mode. source: where that is from.
    """

    launch: float
    source: str

    def __post_init__(self) -> None:
        if not 0 <= self.launch < math.inf:
            raise AusteerError(
                f"host_us: found {self.launch * 1e6!r}, expected microseconds a launch, 0 or more, for example 34.3"
            )

    @classmethod
    def of(cls, device: torch.device, us: float | None = None) -> Host:
        """What is given; or this machine's, measured; or for "cuda" without a GPU here an H200's."""
        if us is not None:
            return cls(us * 1e-6, "as given")
        if device.type == "cuda" and not torch.cuda.is_available():
            return cls(MODEL * 1e-6, "an H200's, as there is no GPU here")
        return cls(_measured(device), "measured on this machine")

    def site(self, way: str, launches: int, kernel: bool) -> float:
        """Seconds of the host that a way adds at one site.

        Args:
            launches: that it adds. kernel: whether a kernel of this library is among what it runs.
        """
        if launches == 0 and not kernel:
            return 0.0
        once, each = _WAYS[way]
        if kernel:
            once, each = WRAPPER + REGISTRY, KERNEL
            if way == "fused":  # one kernel in place of the product; the launches beyond it finish its sum
                once += KERNEL - OPERATION
        return (once + each * launches) * self.launch / MODEL

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@functools.cache
def _measured(device: torch.device, layers: int = 4, times: int = 20) -> float:
    """Host seconds a launch: the fastest decoded token of a model so narrow that the device waits."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers, "num_attention_heads": 4}
    config = AutoConfig.for_model("llama", vocab_size=256, num_key_value_heads=2, **sizes)
    launches, _ = traced(skeleton(config, torch.float32), 1, 1, 8)
    with torch.device(device), torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        ids = torch.zeros(1, 8, dtype=torch.long, device=device)
    took = []
    with torch.no_grad():
        for _ in range(times):
            cache = model(ids, use_cache=True).past_key_values
            wait_for(device)
            begin = time.perf_counter()
            model(ids[:, :1], past_key_values=cache, use_cache=True)
            wait_for(device)
            took.append(time.perf_counter() - begin)
    return min(took) / launches
