"""The ways in which a site can be steered while it runs: fused, columns, dense.

Each puts one strength table on one module and takes it off again, leaving no trace, as an accelerate hook, so that it
composes with device maps and offload. fold.py has the way that runs nothing.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from accelerate.hooks import ModelHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn

from austeer_kernels import reference

from .capture import first_tensor
from .errors import SteeringError
from .sites import Site
from .strengths import StrengthTable

# The checked functions of austeer_kernels check what is true of every call here; naming the overload saves a search.
_steer_columns = torch.ops.austeer.steer_columns_.default
_steered_linear = torch.ops.austeer.steered_linear.default

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Path:
    """One steered site. ``attach`` and ``detach`` are exact opposites.

    ``detach`` may be called at any time, also after an ``attach`` that was broken off, and again.

    Attributes:
        site, table: what is steered and how strongly.
        module: the module that is changed.
        calls: how often it ran in eager mode; None where that is not counted (fold).
        traced: whether it became part of a compiled graph.
    """

    name: str

    def __init__(self, site: Site, table: StrengthTable, module: nn.Module):
        self.site, self.table, self.module = site, table, module
        self.calls: int | None = 0
        self.traced = False

    def attach(self) -> None:
        raise TypeError(f"{type(self).__name__} is abstract")

    def detach(self) -> None:
        raise TypeError(f"{type(self).__name__} is abstract")


class _Hook(ModelHook):
    """Calls back into its path; accelerate calls it around the module's forward."""

    def __init__(self, path: HookPath):
        self.path = path

    def init_hook(self, module: nn.Module) -> nn.Module:
        self.path.bind(module)
        return module

    def detach_hook(self, module: nn.Module) -> nn.Module:
        self.path.release(module)
        return module

    def pre_forward(self, module: nn.Module, *args, **kwargs):
        path = self.path
        if path.reads_input:
            if args:
                args = (path.steer(args[0]), *args[1:])
            else:  # every module that has an input-side site takes one tensor, whatever its name
                name = next(iter(kwargs))
                kwargs = {**kwargs, name: path.steer(kwargs[name])}
        return args, kwargs

    def post_forward(self, module: nn.Module, output):
        path = self.path
        if not path.reads_output:
            return output
        if isinstance(output, tuple):
            return (path.steer(first_tensor(output)), *output[1:])
        return path.steer(output)


class HookPath(Path):
    """A path that is an accelerate hook on ``module``."""

    reads_input = reads_output = False

    def __init__(self, site: Site, table: StrengthTable, module: nn.Module):
        super().__init__(site, table, module)
        self._had_forward = "forward" in vars(module)
        self._hook = _Hook(self)

    def attach(self) -> None:
        add_hook_to_module(self.module, self._hook, append=True)

    def detach(self) -> None:
        found = getattr(self.module, "_hf_hook", None)
        if found is None or not _contains(found, self._hook):
            return
        rest = _without(found, self._hook)
        if rest is not None:
            # Removing accelerate's own hook would load offloaded weights back: take out ours only.
            self.release(self.module)
            self.module._hf_hook = rest
            return
        remove_hook_from_module(self.module)
        if not self._had_forward:
            # accelerate leaves the original bound method in the instance; without it the class's serves again
            vars(self.module).pop("forward", None)

    def bind(self, module: nn.Module) -> None:
        """Called when the hook is put on the module."""

    def release(self, module: nn.Module) -> None:
        """Called when the hook is taken off."""

    def steer(self, x: Tensor) -> Tensor:
        """The steered tensor, may be ``x`` itself; called if ``reads_input`` or ``reads_output``."""
        raise TypeError(f"{type(self).__name__} does not steer a tensor")

    def ran(self, device: torch.device) -> StrengthTable:
        """Counts a call, and gives the table on ``device``."""
        if torch.compiler.is_compiling():
            self.traced = True  # a count would be a guard, and so a recompilation at every call
        else:
            assert self.calls is not None
            self.calls += 1
        if device != self.table.device:
            self.table.to(device)
        return self.table


def _contains(hook: ModelHook, ours: ModelHook) -> bool:
    return hook is ours or (isinstance(hook, SequentialHook) and any(_contains(h, ours) for h in hook.hooks))


def _without(hook: ModelHook, ours: ModelHook) -> ModelHook | None:
    """``hook`` with ``ours`` taken out of it, however deep accelerate has chained it; None if nothing is left."""
    if hook is ours:
        return None
    if not isinstance(hook, SequentialHook):
        return hook
    rest = [kept for kept in (_without(inner, ours) for inner in hook.hooks) if kept is not None]
    return SequentialHook(*rest) if len(rest) > 1 else rest[0] if rest else None


class TensorPath(HookPath):
    """A hook that steers the module's input or output and leaves its computation alone."""

    def __init__(self, site: Site, table: StrengthTable, module: nn.Module):
        super().__init__(site, table, module)
        self.reads_input, self.reads_output = site.side == "input", site.side == "output"


def dense_is_cheaper(x: Tensor, table: StrengthTable) -> bool:
    """Whether one dense in-place operation costs less than the sparse kernel; it gives the same float32 numbers.

    On a CPU only (bench/test_kernels.py compares the forms): the sparse form there is four operations, some 10 us a
    call, and 60 times the dense one's time an element. So dense for few elements, and for many columns.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    # A compiler fuses the dense form with what is around it, and a guard on the size would make it compile twice.
    return torch.compiler.is_compiling() or x.numel() <= 16384 or 64 * table.index.numel() >= table.width


class Columns(TensorPath):
    """The module's own computation, then the sparse in-place kernel on the selected columns."""

    name = "columns"

    def steer(self, x: Tensor) -> Tensor:
        table = self.ran(x.device)
        if x.requires_grad and torch.is_grad_enabled():
            steered = reference.steered(
                x.to(reference.compute_dtype(x.dtype)), table.dense_gamma[0], table.dense_shift[0], table.magnitude
            )
            return steered.to(x.dtype)
        if dense_is_cheaper(x, table):
            if table.operation == "shift":
                return x.add_(table.dense_shift)
            return x.addcmul_(x.abs() if table.magnitude else x, table.dense_gamma)
        if not x.is_contiguous():
            x = x.contiguous()
        rows = x.view(-1, x.shape[-1])
        _steer_columns(rows, table.index, table.gamma, table.shift, table.magnitude, None)
        return x


class Dense(TensorPath):
    """The public code's arithmetic: multiply, add and copy back over the whole block. The baseline; never automatic."""

    name = "dense"

    def steer(self, x: Tensor) -> Tensor:
        table = self.ran(x.device)
        if table.operation == "shift":
            steered = x + table.dense_shift[0].to(x.dtype)
        else:
            steered = x + (x.abs() if table.magnitude else x) * table.dense_gamma[0].to(x.dtype)
        if x.requires_grad and torch.is_grad_enabled():
            return steered
        return x.copy_(steered)


class Fused(HookPath):
    """Our projection kernel in place of the linear layer's forward, with the steering inside it."""

    name = "fused"

    def bind(self, module: nn.Module) -> None:
        self._forward = module._old_forward
        module._old_forward = partial(self.forward, module)  # type: ignore[assignment]

    def release(self, module: nn.Module) -> None:
        module._old_forward = self._forward

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        table = self.ran(x.device)
        rows = x.reshape(-1, x.shape[-1])
        linear = cast(nn.Linear, module)
        if x.dtype != linear.weight.dtype:
            raise SteeringError(
                f"mode 'fused' at {self.site.path}: found {x.dtype} activations and a {linear.weight.dtype} weight "
                "(autocast?), expected one dtype; use mode='columns'"
            )
        # The definition is differentiable, the kernel is not.
        wanted = (x, linear.weight, linear.bias)
        differentiate = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in wanted)
        operation = reference.steered_linear if differentiate else _steered_linear
        y = operation(
            rows,
            linear.weight,
            linear.bias,
            table.dense_gamma,
            table.dense_shift,
            self.site.side == "input",
            table.magnitude,
            None,
        )
        return y.view(*x.shape[:-1], y.shape[-1])


def why_not_fused(module: nn.Module | None) -> str | None:
    """The reason why ``module`` cannot be replaced by the fused projection, or None if it can."""
    if module is None:
        return "no linear layer makes this tensor"
    if type(module) is not nn.Linear:
        return f"{type(module).__name__} is not a plain linear layer"
    if module.weight.dtype not in FLOATING:
        return f"the weight is {module.weight.dtype}"
    if module.weight.dtype == torch.float64 and module.weight.device.type == "cuda":
        return "the kernel has no float64 on a GPU"
    return None
