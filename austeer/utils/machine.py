"""What a machine has free, and how fast it is at what a measurement does: looked up and tried in about a second."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from ..errors import ModelError

#: Seconds that each rate may take to measure.
SECONDS = 0.4

#: Sides of the matrix that is tried are cut to this: more makes no product faster, and a first one would take long.
LARGEST_SIDE = 4096

#: Bytes read at a time, at random places: what lies in the page cache counts as often as it will later.
_CHUNK = 4 * 2**20


@dataclass(frozen=True)
class Machine:
    """Where a measurement is to run.

    Attributes:
        device: "cpu", "cuda:0" ...
        free: bytes of the device's memory. host_free: of the CPU's. disk_free: of the folder for scratch files.
        matmul: floating-point operations a second in matrix products.
        product: tokens, inputs and outputs of the product that was measured; None where none was.
        read: bytes a second from the checkpoint's files; None where they are not here.
    """

    device: str
    free: int
    host_free: int
    disk_free: int
    matmul: float
    product: tuple[int, int, int] | None = None
    read: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def free_on(name: str | None) -> tuple[torch.device, int]:
    """A device, and its free bytes; for a device map the first GPU, and those of all.

    Args:
        name: as in :func:`austeer.models.load_model`.

    Raises:
        ModelError: a device that is not here.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    try:
        devices = [torch.device(name)]
    except RuntimeError:  # a device map
        devices = gpus or [torch.device("cpu")]
    if devices[0].type != "cpu" and not gpus:
        raise ModelError(
            f"device: found {name!r}, and this machine has no GPU; describe another with machine=Machine(...)"
        )
    return devices[0], sum(map(free_memory, devices))


def this_machine(
    device: torch.device,
    free: int,
    dtype: torch.dtype,
    product: tuple[int, int, int],
    files: Sequence[Path],
    scratch: Path,
) -> Machine:
    """This machine, tried now.

    Args:
        device, free: from :func:`free_on`. dtype: of the model.
        product: tokens of a batch, inputs and outputs of the model's largest matrices.
        files: the checkpoint's, as far as they are here. scratch: a folder, which need not be there yet.
    """
    tokens, inputs, outputs = product[0], *(min(side, LARGEST_SIDE) for side in product[1:])
    existing = next(folder for folder in (scratch.absolute(), *scratch.absolute().parents) if folder.exists())
    return Machine(
        device=str(device),
        free=free,
        host_free=free_memory(torch.device("cpu")),
        disk_free=shutil.disk_usage(existing).free,
        matmul=matmul_rate(device, dtype, tokens, inputs, outputs),
        product=(tokens, inputs, outputs),
        read=read_rate(files),
    )


def wait_for(device: torch.device) -> None:
    """Until a GPU has done all that it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def matmul_rate(device: torch.device, dtype: torch.dtype, tokens: int, inputs: int, outputs: int) -> float:
    """Floating-point operations a second of x [tokens, inputs] times a weight [outputs, inputs]."""
    x = torch.full((tokens, inputs), 0.5, dtype=dtype, device=device)
    weight = torch.full((outputs, inputs), 0.5, dtype=dtype, device=device)

    def run(times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            torch.nn.functional.linear(x, weight)
        wait_for(device)
        return time.perf_counter() - start

    run(1)
    once = run(1)
    times = max(1, min(1000, round(SECONDS / max(once, 1e-9))))
    return 2 * tokens * inputs * outputs * times / max(run(times), 1e-9)


def read_rate(files: Sequence[Path]) -> float | None:
    """Bytes a second from files, read at random places for a moment; None without files."""
    sized = [(path, size) for path in files if (size := path.stat().st_size)]
    if not sized:
        return None
    places = random.Random()  # another choice each time: what was read last time lies in the page cache
    read, start = 0, time.perf_counter()
    while (seconds := time.perf_counter() - start) < SECONDS or not read:
        path, size = places.choices(sized, weights=[size for _, size in sized])[0]
        with path.open("rb", buffering=0) as file:
            file.seek(places.randrange(max(1, size - _CHUNK)))
            read += len(file.read(_CHUNK))
    return read / seconds


_CGROUP = Path("/sys/fs/cgroup")


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device, or in the CPU's memory: of the machine, or of the container if that is less.

    Caches do not count as taken: the system's page cache, and the memory that torch keeps on a GPU for reuse.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = psutil.virtual_memory().available
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        statistics = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        used = int((_CGROUP / "memory.current").read_text()) - int(statistics["inactive_file"])
    except (OSError, ValueError, KeyError):  # no container, or no limit
        return free
    return max(0, min(free, limit - used))
