"""Who else has a model's modules and memory: what is edited in place, or patched, would steer them along in silence.

Known are this model's other modules, the other models that are steered now, and memory that other processes map. A
model that is not steered cannot find out that it shares weights with one that is.
"""

from __future__ import annotations

import sys
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path as FilePath

import torch
from torch import Tensor, nn
from torch.multiprocessing import reductions

from ..errors import SteeringError
from ..models.patches import owner_of
from ..models.structure import decoder_of, steered
from .path import Path

#: Said of a module while tensors of it are edited: their names. Copies of the module say it, too.
_MARK = "_austeer_edited"

#: Device, first address and the one behind the last.
Extent = tuple[torch.device, int, int]


class Memory:
    """Extents of memory, of which any two may overlap."""

    def __init__(self, extents: Iterable[Extent]):
        self._bounds: dict[torch.device, tuple[list[int], list[int]]] = {}
        for device, start, end in extents:
            starts, ends = self._bounds.setdefault(device, ([], []))
            starts.append(start)
            ends.append(end)
        for bounds in self._bounds.values():
            for addresses in bounds:
                addresses.sort()

    def overlapping(self, t: Tensor) -> int:
        """How many of the extents the tensor's memory overlaps."""
        count = 0
        for device, start, end in extents_of([t]):
            starts, ends = self._bounds.get(device, ([], []))
            count = bisect_left(starts, end) - bisect_right(ends, start)
        return count


def extents_of(tensors: Iterable[Tensor]) -> Iterator[Extent]:
    """Where each tensor lies; nothing of those without memory of their own (meta, DTensors, quantised ones)."""
    for t in tensors:
        if type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided and t.device.type != "meta" and t.numel():
            last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))
            yield t.device, t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


class Sharing:
    """Who else has the parameters and modules of a model that is to be steered."""

    def __init__(self, model: nn.Module):
        self._places = Counter(module for _, module in model.named_modules(remove_duplicate=False))
        self._own = Memory(extents_of(_tensors(model)))
        self._others = Memory(extents_of(t for other in _others(decoder_of(model)) for t in _tensors(other)))
        self._mapped = Memory(_shared_mappings())

    def places(self, module: nn.Module) -> int:
        """In how many places of the model the module is."""
        return self._places[module]

    def why_not(self, p: Tensor) -> str | None:
        """Who else has a parameter, or None."""
        if self._own.overlapping(p) > 1:
            return "is shared with another module"
        if self._others.overlapping(p):
            return "is shared with another model that is steered now"
        if self._mapped.overlapping(p) or _sent(p):
            return "is shared with other processes or a file, or cannot be written"
        return None


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Every parameter and buffer, tied ones each time."""
    for kind in (model.named_parameters, model.named_buffers):
        for _, t in kind(remove_duplicate=False):
            yield t


def _others(decoder: nn.Module) -> list[nn.Module]:
    """The decoders of the other models that are steered now."""
    return [other for other in steered if other is not decoder]


def _shared_mappings() -> list[Extent]:
    """This process' memory that others, or a file, see changes of, and what cannot be written.

    ``Tensor.is_shared()`` knows neither files that are mapped (``torch.load(mmap=True)`` with MAP_SHARED, NumPy's
    memmap) nor which mappings are private.
    """
    if not sys.platform.startswith("linux"):
        return []
    found = []
    for line in FilePath("/proc/self/maps").read_text(errors="replace").splitlines():
        place, flags = line.split(maxsplit=2)[:2]
        if not flags.startswith("rw") or flags[3] == "s":
            start, end = (int(address, 16) for address in place.split("-"))
            found.append((torch.device("cpu"), start, end))
    return found


def _sent(t: Tensor) -> bool:
    """Whether PyTorch may have sent the tensor to another process, or got it from one."""
    if t.device.type == "cpu":
        return t.is_shared() and not sys.platform.startswith("linux")  # there the mappings say it
    for key, reference in list(reductions.shared_cache.items()):
        storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
        if storage is None or storage.device != t.device:
            continue
        # A tensor that was received has its own entry; of all that were sent of one allocation the last one stands for
        # the others, and so for everything on the device.
        if not isinstance(key, tuple) or storage.data_ptr() == t.untyped_storage().data_ptr():
            return True
    return False


# --- what is edited now ----------------------------------------------------------------------------------------------


def mark(paths: Sequence[Path]) -> list[nn.Module]:
    """Notes what the paths edit, and in which modules."""
    marked = []
    for path in paths:
        for module, names in path.edited():
            vars(module)[_MARK] = {*names, *vars(module).get(_MARK, ())}
            marked.append(module)
    return marked


def unmark(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        vars(module).pop(_MARK, None)


def is_marked(module: nn.Module) -> bool:
    """Whether a tensor of the module is edited: it is steered, or a copy of what was."""
    return _MARK in vars(module)


def _edited(model: nn.Module) -> Iterator[Tensor]:
    """The tensors of a model that are edited now."""
    for module in model.modules():
        for name in vars(module).get(_MARK, ()):
            for t in (module._parameters.get(name), module._buffers.get(name)):
                if t is not None:
                    yield t


def expect_free(decoder: nn.Module) -> None:
    """Raises SteeringError where some steering is on a module of the decoder, or has edited memory of it."""
    for path, module in decoder.named_modules():
        if owner_of(module, Path) is not None or is_marked(module):
            raise SteeringError(
                f"{path}: found a module that is steered already (another model shares it, or the model was copied "
                "while it was steered), expected one that is not; copy before steering"
            )
    edited = Memory(extents_of(t for other in _others(decoder) for t in _edited(other)))
    for name, p in [*decoder.named_parameters(), *decoder.named_buffers()]:
        if edited.overlapping(p):
            raise SteeringError(
                f"{name}: found memory that another steered model shares and whose steering is in it now (fold or "
                "bias), expected weights as they were; leave that context first, or steer both with mode='columns'"
            )


def expect_apart(paths: Sequence[Path], decoder: nn.Module) -> None:
    """Raises SteeringError where another model that is steered now has a module that the paths would change."""
    others = {module for other in _others(decoder) for module in other.modules()}
    for path in paths:
        if path.module in others or any(module in others for module, _ in path.edited()):
            raise SteeringError(
                f"{path.site.path}: found a module that another steered model shares, expected one of this model "
                "alone; leave that context first"
            )
