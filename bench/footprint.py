"""What a way to steer holds in memory, and what a run needs at its peak."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
#: What is written there to set the peak to what is resident now (Linux, Documentation/filesystems/proc).
_FORGET_PEAK = "5"


class Held(TorchDispatchMode):
    """Notes the storages that operations make inside its context."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not any(returned.alias_info for returned in func._schema.returns):  # neither a view nor in place
            for one in tree_leaves(result):
                if isinstance(one, Tensor) and one.device.type != "meta" and one.layout == torch.strided:
                    storage = one.untyped_storage()
                    self._made[StorageWeakRef(storage)] = storage.nbytes()
        return result

    @property
    def bytes(self) -> int:
        """Of those that are still there."""
        gc.collect(1)  # what only cycles hold; what is older than the context is none of it
        return sum(nbytes for storage, nbytes in self._made.items() if not storage.expired())


def peak(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that a run needs at once over what was taken before.

    On a GPU what PyTorch allocated; on a CPU what was resident (Linux), in pages: run it once before.

    Raises:
        OSError: this system does not count them.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with suppress(AttributeError, OSError):  # glibc alone has it: a second run would else find all that it needs there
        ctypes.CDLL(None).malloc_trim(0)
    _CLEAR.write_text(_FORGET_PEAK, encoding="ascii")
    before = _resident("VmRSS")
    run()
    return max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    """Bytes of ``VmRSS`` (resident now) or ``VmHWM`` (the most so far)."""
    found = dict(line.split(":", 1) for line in _STATUS.read_text(encoding="utf-8").splitlines() if ":" in line)
    return int(found[field].split()[0]) * 1024
