"""Where weights are while they are not needed, and bringing them: accelerate's offload, or another device's memory.

Accelerate loads an offloaded weight each time its module runs. Here the weights of a whole part of the model are loaded
once, stay for as many forward passes as are wanted, and go; accelerate's hooks rest meanwhile.
"""

from __future__ import annotations

import copy
import hashlib
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from safetensors import SafetensorError
from torch import Tensor, nn

from ..errors import AusteerError
from .hooks import hooks_on


class WeightsError(AusteerError):
    """Weights that cannot be loaded for a while and given back."""


@dataclass
class Traffic:
    """What was loaded. Weights that are where they are needed are not.

    Attributes:
        read: bytes, in the model's dtype.
        held: bytes that are loaded now, those that are read ahead included. peak: the most so far.
        waited: seconds for which the model waited for weights.
    """

    read: int = 0
    held: int = 0
    peak: int = 0
    waited: float = 0.0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def add(self, size: int) -> None:
        with self._lock:
            self.read += size
            self.held += size
            self.peak = max(self.peak, self.held)

    def free(self, size: int) -> None:
        with self._lock:
            self.held -= size


@dataclass(frozen=True)
class _Slot:
    """One parameter or buffer that is elsewhere.

    Attributes:
        path: its name, for messages. where: the module's own dictionary of parameters or of buffers. name: in it.
        original: what is there now, and will be again.
        source: what has the values under ``key``; None: ``original`` has.
        target: the device that they are wanted on.
    """

    path: str
    where: dict[str, Any]
    name: str
    original: Tensor
    source: Mapping[str, Tensor] | None
    key: str
    target: torch.device

    @property
    def size(self) -> int:
        return self.original.numel() * self.original.element_size()

    @property
    def ready(self) -> bool:
        """Whether the values lie in the memory of the device already, so that nothing is copied."""
        if self.target.type != "cpu" or not isinstance(self.source, dict) or self.key not in self.source:
            return False
        return self.source[self.key].dtype == self.original.dtype


class LayerWeights:
    """Modules whose weights come and go together.

    Args:
        modules: by their paths; without what they contain, unless that is listed, too.
        device: where they are wanted; by default where accelerate runs them, and where they are otherwise.
        traffic: counts what is loaded.

    Raises:
        WeightsError: a quantised or split weight, or one on the meta device that accelerate does not know of.
    """

    def __init__(self, modules: Mapping[str, nn.Module], device: torch.device | None, traffic: Traffic):
        self.traffic = traffic
        self._slots = list(_slots(modules, device))
        hooks = (hook for module in modules.values() for hook in hooks_on(module))
        self._hooks = [hook for hook in hooks if isinstance(hook, AlignDevicesHook)]
        self._device = device
        self._before: list[tuple[AlignDevicesHook, bool, object]] = []
        self._loaded: dict[int, Tensor] = {}  # by the identity of the original: tied weights are loaded once
        self._counted = 0
        self._unwanted = False

    @property
    def size(self) -> int:
        """Bytes that it takes while it is here, without what is here always."""
        return sum({id(slot.original): slot.size for slot in self._slots if not slot.ready}.values())

    def fetch(self) -> None:
        """Reads the weights into the CPU's memory, page-locked on the way to a GPU; a thread may do it.

        Raises:
            WeightsError: a file that is missing, damaged or of another model.
        """
        for slot in self._slots:
            if id(slot.original) not in self._loaded and not self._unwanted:
                value = _read(slot)
                if not slot.ready:
                    self._counted += slot.size
                    self.traffic.add(slot.size)
                self._loaded[id(slot.original)] = value

    def place(self) -> None:
        """Puts what was fetched into the modules. Accelerate's hooks then load and unload nothing."""
        targets = {id(slot.original): slot.target for slot in self._slots}
        for key, target in targets.items():
            self._loaded[key] = self._loaded[key].to(target, non_blocking=True)
        for slot in self._slots:
            value = self._loaded[id(slot.original)]
            is_parameter = isinstance(slot.original, nn.Parameter)
            slot.where[slot.name] = nn.Parameter(value, requires_grad=False) if is_parameter else value
        for hook in self._hooks:
            self._before.append((hook, hook.offload, hook.execution_device))
            hook.offload = False
            if self._device is not None:
                hook.execution_device = self._device

    def release(self) -> None:
        """The modules are as they were, and the weights are gone; also where they never came."""
        for hook, offload, execution_device in reversed(self._before):
            hook.offload, hook.execution_device = offload, execution_device
        self._before.clear()
        for slot in self._slots:
            slot.where[slot.name] = slot.original
        self._loaded.clear()
        self.traffic.free(self._counted)
        self._counted = 0

    def cancel(self) -> None:
        """Ends a ``fetch`` in another thread soon; the part is of no use afterwards."""
        self._unwanted = True

    @contextmanager
    def here(self) -> Iterator[None]:
        """The weights are in the modules while the context is open."""
        try:
            start = time.perf_counter()
            self.fetch()
            self.place()
            self.traffic.waited += time.perf_counter() - start
            yield
        finally:
            self.release()


def in_turn(parts: Sequence[LayerWeights]) -> Generator[LayerWeights, None, None]:
    """Each part while its weights are here; those of the next are read meanwhile by a thread. Close it when done."""
    reader = ThreadPoolExecutor(1, thread_name_prefix="austeer-weights")
    try:
        coming = reader.submit(parts[0].fetch) if parts else None
        for number, part in enumerate(parts):
            assert coming is not None
            start = time.perf_counter()
            coming.result()
            part.place()
            part.traffic.waited += time.perf_counter() - start
            if number + 1 < len(parts):
                coming = reader.submit(parts[number + 1].fetch)
            yield part
            part.release()
    finally:
        for part in parts:
            part.cancel()
        reader.shutdown()  # first: it must not load what is released
        for part in parts:
            part.release()


def signature(model: nn.Module) -> str:
    """A hash of a few values of some weights: it tells models of one architecture apart, offloaded ones as well."""
    parameters = dict(model.named_parameters())
    here = [name for name, p in parameters.items() if p.device.type != "meta"]
    # Some kinds of offload can only be read whole: few, and small ones, of which two are matrices.
    apart = sorted((name for name in parameters if name not in set(here)), key=lambda name: parameters[name].numel())
    matrices = [name for name in apart if parameters[name].dim() > 1]
    chosen = [*here[:: max(1, len(here) // 32)], *apart[:6], *matrices[:2]]
    modules = dict(model.named_modules())
    owners = {path: modules[path] for path in {name.rpartition(".")[0] for name in chosen}}
    try:
        elsewhere = {slot.path: slot for slot in _slots(owners, None)}
    except WeightsError:
        elsewhere = {}
    digest = hashlib.sha256()
    for name in chosen:
        value: Tensor = parameters[name]
        try:
            if value.device.type == "meta":
                slot = elsewhere[name]
                assert slot.source is not None
                value = slot.source[slot.key]
            # A tensor from a file is a promise: little of it is read here.
            some = value.detach().flatten()[:: max(1, value.numel() // 8)][:8].cpu().double()
            digest.update(f"{name} {some.tolist()}".encode())
        except (KeyError, OSError, RuntimeError, TypeError, NotImplementedError, SafetensorError):
            digest.update(name.encode())  # quantised or split in a way that is not read so
    return digest.hexdigest()


def read_parameter(model: nn.Module, name: str) -> Tensor:
    """A parameter's values on the CPU, offloaded or not; without a copy where they lie in its memory.

    Raises:
        WeightsError: as in :class:`LayerWeights`.
    """
    names = name.rpartition(".")[0].split(".")
    above = {path: model.get_submodule(path) for path in (".".join(names[:n]) for n in range(len(names) + 1))}
    for slot in _slots(above, None):
        if slot.path == name:
            return _read(replace(slot, target=torch.device("cpu")))
    return model.get_parameter(name).detach().cpu()


def exact(device: torch.device | str | int) -> torch.device:
    """A device with its number, as tensors name theirs."""
    found = torch.device(device)
    if found.type == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device()) if found == torch.device("cuda") else found


def _slots(modules: Mapping[str, nn.Module], device: torch.device | None) -> Iterator[_Slot]:
    offloading = {
        path: hook
        for path, module in modules.items()
        for hook in hooks_on(module)
        if isinstance(hook, AlignDevicesHook) and hook.offload
    }
    for path, module in modules.items():
        kinds: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for where in kinds:
            for name, value in where.items():
                if value is None or (value.device.type != "meta" and device in (None, value.device)):
                    continue
                full = f"{path}.{name}" if path else name
                if type(value) not in (Tensor, nn.Parameter):
                    raise WeightsError(
                        f"{full}: found a {type(value).__name__} that would have to be loaded for a while, expected a "
                        "plain parameter; measure with strategy='resident'"
                    )
                if value.device.type != "meta":
                    assert device is not None
                    yield _Slot(full, where, name, value, None, "", device)
                    continue
                found = _offloading(offloading, path, full)
                if found is None:
                    raise WeightsError(
                        f"{full} is on the meta device, and no accelerate hook says where its values are; load the "
                        "model with from_pretrained(..., device_map=...)"
                    )
                hook, key = found
                source, key = _source(hook.weights_map, key)
                target = device or exact("cpu" if hook.execution_device is None else hook.execution_device)
                yield _Slot(full, where, name, value, source, key, target)


def _offloading(hooks: Mapping[str, AlignDevicesHook], path: str, full: str) -> tuple[AlignDevicesHook, str] | None:
    """The hook that loads a module's tensor, and the tensor's name from the hook's module."""
    if path in hooks:
        return hooks[path], full.removeprefix(f"{path}.")
    for above, hook in hooks.items():
        if hook.place_submodules and (not above or path.startswith(f"{above}.")):
            return hook, full.removeprefix(f"{above}." if above else "")
    return None


def _source(weights: Any, key: str) -> tuple[Mapping[str, Tensor], str]:
    """What really has the values, and their name there; what has them in memory is a dictionary."""
    while isinstance(weights, PrefixedDataset):
        weights, key = weights.dataset, f"{weights.prefix}{key}"
    if isinstance(weights, OffloadedWeightsLoader):
        if key in weights.state_dict:
            return weights.state_dict, key
        weights = copy.copy(weights)
        weights.device = None  # it would read to the GPU, one pageable tensor after the other
    return weights, key


def _read(slot: _Slot) -> Tensor:
    """A weight in the CPU's memory."""
    if slot.source is None:
        return slot.original
    try:
        value = slot.source[slot.key]
    except (KeyError, OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise WeightsError(
            f"{slot.path}: its weights could not be read ({type(error).__name__}: {error}). The model's files may have "
            "been moved or damaged since it was loaded: load it again, or copy its files anew"
        ) from error
    if value.shape != slot.original.shape:
        raise WeightsError(
            f"{slot.path}: found weights {list(value.shape)}, expected {list(slot.original.shape)}; the files are "
            "another model's"
        )
    if slot.ready:
        return value
    # A tensor from a file is a promise: it is read when it is copied.
    pin = slot.target.type == "cuda"
    return torch.empty(value.shape, dtype=slot.original.dtype, pin_memory=pin, device="cpu").copy_(value)
