"""Counts what a real forward pass does: operations that do work, the bytes they read and write, their arithmetic.

The definitions are those of :mod:`austeer.costs.work`, so that its predictions can be held against the counts. Views,
allocations and metadata are no work. Each operation reads each tensor that it is given once (as many values as it has,
repeated ones once) and writes each that it makes or changes; of a gather or scatter only the selected values count.
On a CPU this library's operations are counted as the PyTorch operations that they consist of.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from austeer.costs.unsteered import does_work
from austeer_kernels import reference

from .steered import Steered

#: Of their first argument they read as many values as they give.
_GATHER = {"index_select", "index", "embedding", "gather"}
#: Of their first argument they write as many values as their last tensor has, and read none.
_SCATTER = {"index_copy_", "index_put_", "_index_put_impl_", "scatter_"}
#: They write their first argument and do not read it.
_OVERWRITE = {"copy_", "fill_", "zero_"}


@dataclass(frozen=True)
class Counted:
    """One operation.

    Attributes:
        name: as PyTorch's dispatcher has it, "aten::mm". read, written: bytes.
        weights: bytes of the model's parameters among those that were read.
        operations: of floating-point numbers: 2 for a multiplication with an addition; elementwise functions 1 a value.
    """

    name: str
    read: int
    written: int
    weights: int
    operations: int


class CountedOps(TorchDispatchMode):
    """Counts inside its context.

    Args:
        model: whose parameters are told apart from other tensors; None: none are.

    Attributes:
        calls: the operations that did work, in order. launches: how many. read, written, weights, operations: sums.
    """

    def __init__(self, model: nn.Module | None = None):
        super().__init__()
        parameters = () if model is None else model.parameters()
        self._parameters = {p.untyped_storage().data_ptr() for p in parameters}
        self.calls: list[Counted] = []

    @property
    def launches(self) -> int:
        return len(self.calls)

    def __getattr__(self, name: str) -> int:
        if name not in Counted.__dataclass_fields__:
            raise AttributeError(name)
        return sum(getattr(call, name) for call in self.calls)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        tensors = _tensors((args, kwargs))
        if func.namespace == "austeer" and all(t.device.type == "cpu" for t in tensors):
            with self:  # what it consists of passes here one by one
                return getattr(reference, name)(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        result = func(*args, **kwargs)
        if does_work(func):
            self.calls.append(self._count(func, name, args, kwargs, tensors, result))
        return result

    def _count(self, func, name: str, args, kwargs, tensors: list[Tensor], result: Any) -> Counted:
        changed = [
            value
            for argument, value in _bound(func, args, kwargs)
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor)
        ]
        made = _tensors(result) if not changed else []
        written = sum(map(_bytes, [*made, *changed]))
        whole = list(_distinct(tensors))
        weights = 0
        if name in _GATHER or name in _SCATTER or name in _OVERWRITE:
            first, rest = whole[0], whole[1:]
            read = sum(map(_bytes, rest))
            if name in _GATHER:
                read += written
                weights = written if self._is_weight(first) else 0
            elif name in _SCATTER:
                written = _bytes(tensors[-1])
        else:
            read = sum(map(_bytes, whole))
            weights = sum(_bytes(t) for t in whole if self._is_weight(t))
        return Counted(func._schema.name, read, written, weights, _operations(func, name, args, kwargs, result))

    def _is_weight(self, t: Tensor) -> bool:
        return t.untyped_storage().data_ptr() in self._parameters


def count(model: nn.Module, run: Callable[[], Any]) -> CountedOps:
    """What ``run`` does, without gradients, with the model's parameters told apart."""
    with torch.no_grad(), CountedOps(model) as counted:
        run()
    return counted


def _bound(func, args: tuple, kwargs: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """The schema's arguments with what was given for them."""
    for number, argument in enumerate(func._schema.arguments):
        if number < len(args):
            yield argument, args[number]
        elif argument.name in kwargs:
            yield argument, kwargs[argument.name]


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def _distinct(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Each tensor once, where the same values are given twice."""
    seen = set()
    for t in tensors:
        key = (t.untyped_storage().data_ptr(), t.storage_offset(), tuple(t.shape), t.stride())
        if key not in seen:
            seen.add(key)
            yield t


def _bytes(t: Tensor) -> int:
    """Of a tensor's values, those of expanded dimensions once."""
    values = 1
    for size, stride in zip(t.shape, t.stride()):
        values *= size if stride or size == 0 else 1
    return values * t.element_size()


def _operations(func, name: str, args, kwargs, result: Any) -> int:
    if name.startswith("_scaled_dot_product"):
        # PyTorch 2.11's own count refuses fewer keys than queries (grouped heads).
        query, value = args[0], args[2]  # [batch, heads, tokens, width]
        return 2 * query.shape[:3].numel() * value.shape[2] * (query.shape[3] + value.shape[3])
    products = flop_registry.get(func._overloadpacket)
    if products is not None:
        return int(products(*args, **kwargs, out_val=result))
    if torch.Tag.pointwise not in func.tags or not isinstance(result, Tensor) or name == "clone":
        return 0
    return result.numel() * (2 if name in ("addcmul", "addcmul_") else 1)


#: For ways whose steps cannot be taken one by one.
UNKNOWN: dict[str, Any] = dict.fromkeys(("launches", "bytes", "operations", "host_seconds", "device_seconds"))
_TIMES = 3


@torch.no_grad()
def of_step(steered: Steered, ids: Tensor) -> dict[str, Any]:
    """Counts of one token a row after the prompt, in eager mode, of a way whose model takes tokens itself.

    On a CPU ``launches`` are the operations that do work; on a GPU kernels and copies, with ``device_seconds``, the
    time that they run, and ``host_seconds``, until all is queued. Bytes are counted in the same way on both.
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


def of_step_or_why_not(steered: Steered, ids: Tensor) -> dict[str, Any]:
    """The same; where counting fails, of an operation that PyTorch cannot count, say, the reason in its place."""
    try:
        return of_step(steered, ids)
    except Exception as error:  # times are not to be lost to it
        return UNKNOWN | {"not_counted": f"{type(error).__name__}: {error}".splitlines()[0][:300]}


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
