"""How fast a device can be at best: bytes and products a second, and what one more launch costs it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from ..errors import AusteerError
from ..utils.machine import matmul_rate, wait_for

#: Bytes of the tensors that are moved to measure bandwidth: more than the caches hold, except those of large servers.
MOVED = 2**28

_TILE = (512, 2048, 2048)


@dataclass(frozen=True)
class Ceilings:
    """What predictions in seconds are made with.

    Attributes:
        bandwidth: bytes a second, read and written together, of the plain operation that moves most.
        flops: floating-point operations a second in products.
        launch: seconds of device time for one more small operation: on a GPU between two kernels of a CUDA graph (in
            eager mode the host needs several times that), on a CPU for calling it.
        source: where the figures are from.
    """

    bandwidth: float
    flops: float
    launch: float
    source: str

    def __post_init__(self) -> None:
        for name in ("bandwidth", "flops"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise AusteerError(f"{name}: found {value!r}, expected a number above 0, for example 3e12")
        if not 0 <= self.launch < float("inf"):
            raise AusteerError(f"launch: found {self.launch!r}, expected seconds, 0 or more, for example 2e-6")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def seconds(self, moved: float, operations: float, launches: float) -> float:
        """The floor: whichever of memory and arithmetic takes longer, and the launches one after the other."""
        return max(moved / self.bandwidth, operations / self.flops) + launches * self.launch


def ceilings(
    device: torch.device,
    dtype: torch.dtype,
    bandwidth: float | None = None,
    flops: float | None = None,
    launch: float | None = None,
) -> Ceilings:
    """What is given, and for the rest a device of this machine, tried for about a second.

    For "cuda" where there is no GPU: an H100, on which a copy, the bf16 product and the launch were measured; its
    float32 product is the data sheet's.
    """
    given = {"bandwidth": bandwidth, "flops": flops, "launch": launch}
    missing = [name for name, value in given.items() if value is None]
    if device.type == "cuda" and not torch.cuda.is_available():
        known = {"bandwidth": 3.0e12, "flops": 798e12 if dtype.itemsize == 2 else 67e12, "launch": 2e-6}
        source = "an H100 SXM, as there is no GPU here"
        found = {name: known[name] for name in missing}
    else:
        measure: dict[str, Callable[[], float]] = {
            "bandwidth": lambda: _byte_rate(device),
            "flops": lambda: matmul_rate(device, dtype, *_TILE),
            "launch": lambda: _launch_seconds(device),
        }
        source = f"measured on this {device.type}"
        found = {name: measure[name]() for name in missing}
    if len(missing) < len(given):
        names = ", ".join(name for name in given if name not in missing)
        source = f"{source}; {names} as given" if missing else "as given"
    return Ceilings(**{**given, **found}, source=source)  # type: ignore[arg-type]


@torch.no_grad()
def _byte_rate(device: torch.device) -> float:
    """Of the fastest of several: on an H200 a copy moves 2.8 TB/s, an addition 4.3, and a sum reads 4.3."""
    source, target = (torch.ones(MOVED // 4, device=device) for _ in range(2))
    # Tensors read and written.
    operations: dict[Callable[[], object], int] = {
        lambda: target.copy_(source): 2,
        lambda: torch.add(source, target, out=target): 3,
        lambda: source.sum(): 1,
        lambda: source.amax(): 1,
    }
    times = 10 if device.type == "cuda" else 1  # queued, so that waiting for the device counts little

    def run(operation: Callable[[], object]) -> None:
        for _ in range(times):
            operation()

    return max(
        tensors * MOVED * times / _best(partial(run, operation), device, 3) for operation, tensors in operations.items()
    )


@torch.no_grad()
def _launch_seconds(device: torch.device, times: int = 200) -> float:
    x = torch.ones(64, device=device)

    def run() -> None:
        for _ in range(times):
            x.mul_(x)

    if device.type == "cuda":
        run()  # compiles and allocates what a capture may not
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return _best(graph.replay, device, 5) / times
    return _best(run, device, 5) / times


def _best(run: Callable[[], object], device: torch.device, times: int) -> float:
    """Seconds of the fastest of some runs after a first one."""
    took = []
    for _ in range(times + 1):
        start = time.perf_counter()
        run()
        wait_for(device)
        took.append(time.perf_counter() - start)
    return min(took[1:])
