"""What a way to steer holds in memory, and what a run needs at its peak."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
#: What is written there to set the peak to what is resident now (Linux, Documentation/filesystems/proc).
_FORGET_PEAK = "5"


def resident(field: str) -> int:
    """Bytes of ``VmRSS`` (resident now) or ``VmHWM`` (the most so far)."""
    found = dict(line.split(":", 1) for line in _STATUS.read_text(encoding="utf-8").splitlines() if ":" in line)
    return int(found[field].split()[0]) * 1024


def forget_peak() -> None:
    """Sets ``VmHWM`` to what is resident now.

    Raises:
        OSError: this system does not count peaks.
    """
    _CLEAR.write_text(_FORGET_PEAK, encoding="ascii")


def storages(*models: nn.Module) -> dict[int, int]:
    """Bytes of every storage that a tensor of this process has, by address.

    Args:
        models: theirs count, too, where the collector was told to leave them out (``gc.freeze``).
    """
    gc.collect()
    # A compiler's stand-ins have no memory, and say so with an error.
    tensors = [o for o in gc.get_objects() if issubclass(type(o), Tensor) and not issubclass(type(o), FakeTensor)]
    tensors += [t for model in models for t in (*model.parameters(), *model.buffers())]
    found: dict[int, int] = {}
    for tensor in tensors:
        if tensor.device.type != "meta" and tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def added(before: dict[int, int]) -> int:
    """Bytes of the storages that are there now, and were not before."""
    return sum(nbytes for address, nbytes in storages().items() if address not in before)


def _give_back() -> None:
    """Has the C library return what it keeps for later: a second run would else find all that it needs there."""
    with suppress(AttributeError, OSError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)


def peak(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that a run needs at once over what was taken before; None where this system does not count them.

    On a GPU what PyTorch allocated; on a CPU what was resident (Linux), in pages: run it once before.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        _give_back()
        forget_peak()
        before = resident("VmRSS")
        run()
        return max(0, resident("VmHWM") - before)
    except OSError:
        return None
