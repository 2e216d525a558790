"""The ways in which a site can be steered while it runs: fused, columns, dense.

Each puts its strength tables on one module and takes them off again, leaving no trace, as an accelerate hook, so that
it composes with device maps and offload. fold.py has the way that runs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from austeer_kernels import reference

from .capture import first_tensor
from .errors import SteeringError
from .hooks import Attachment, Hook, is_hooked
from .path import Path
from .routing import NOBODY, Routing, capturing
from .selfcheck import check_linear, checked_tensor
from .sites import Site
from .strengths import StrengthTable

# The checked functions of austeer_kernels check what is true of every call here; naming the overload saves a search.
_steer_columns = torch.ops.austeer.steer_columns_.default
_steered_linear = torch.ops.austeer.steered_linear.default

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class _Hook(Hook):
    """Calls back into its path; accelerate calls it around the module's forward."""

    def __init__(self, path: HookPath):
        super().__init__()
        self.path = path

    def bind(self, module: nn.Module) -> None:
        self.path.bind(module)

    def release(self, module: nn.Module) -> None:
        self.path.release(module)

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
        if type(output) is Tensor:
            return path.steer(output)
        if isinstance(output, (tuple, list)):
            steered = [path.steer(first_tensor(output)), *output[1:]]
            return steered if isinstance(output, list) else tuple(steered)
        return path.steer(output)


def expect_free(path: Path) -> None:
    """
    Raises:
        SteeringError: a hook of some steering is on the path's module.
    """
    if is_hooked(path.module, _Hook):
        raise SteeringError(
            f"{path.site.path}: found a module that is steered already (another model shares it, or the model was "
            "copied while it was steered), expected one that is not; copy before steering"
        )


class HookPath(Path):
    """A path that is an accelerate hook on ``module``.

    Args:
        tables: one, or two where plans with and without magnitude meet.
        routing: which tokens are steered; None for all of them.
        check: whether the first call is compared with the formula.
    """

    reads_input = reads_output = False

    def __init__(
        self,
        site: Site,
        tables: Sequence[StrengthTable],
        module: nn.Module,
        routing: Routing | None = None,
        check: bool = False,
    ):
        super().__init__(site, tables[0], module)
        self.tables = tuple(tables)
        self.routing = routing
        self._check = check
        self._elements = 0
        self._attachment = Attachment(module, _Hook(self))

    @property
    def tokens(self) -> int | None:
        return self._elements // self.table.width if self.routing is None else self.routing.tokens

    def attach(self) -> None:
        self._attachment.attach()

    def detach(self) -> None:
        self._attachment.detach()

    def bind(self, module: nn.Module) -> None:
        """Called when the hook is put on the module."""

    def release(self, module: nn.Module) -> None:
        """Called when the hook is taken off."""

    def steer(self, x: Tensor) -> Tensor:
        """The steered tensor, may be ``x`` itself; called if ``reads_input`` or ``reads_output``."""
        raise TypeError(f"{type(self).__name__} does not steer a tensor")

    def begin(self, x: Tensor):
        """Counts a call, follows ``x`` to its device, and gives each token's row of the tables (see ``rows_for``)."""
        if torch.compiler.is_compiling():
            self.traced = True  # a count would be a guard, and so a recompilation at every call
        else:
            self.calls += 1  # type: ignore[operator]
            if self.routing is None:
                self._elements += x.numel()
        if x.device != self.table.device:
            for table in self.tables:
                table.to(x.device)
        return None if self.routing is None else self.routing.rows_for(x)

    def checks_now(self, x: Tensor) -> bool:
        """Whether this call is to be compared with the formula: the first outside compiled and captured graphs."""
        if not self._check or torch.compiler.is_compiling() or capturing(x.device):
            return False
        self._check = False
        return True


class TensorPath(HookPath):
    """A hook that steers the module's input or output and leaves its computation alone."""

    def __init__(self, site: Site, *args, **kwargs):
        super().__init__(site, *args, **kwargs)
        self.reads_input, self.reads_output = site.side == "input", site.side == "output"

    def steer(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.table.width:
            raise SteeringError(
                f"site {self.site.name!r} of layer {self.site.layer} ({self.site.path}): found a tensor of width "
                f"{x.shape[-1]}, expected {self.table.width}. A model split over processes is steered if Transformers "
                "split it (DistributedConfig(tp_plan='auto'))"
            )
        rows = self.begin(x)
        if rows is NOBODY:
            return x
        if self._check and self.checks_now(x):
            check = checked_tensor(self, x, rows)
            return check(self.apply(x, rows))
        return self.apply(x, rows)

    def apply(self, x: Tensor, rows: Tensor | None) -> Tensor:
        """Steers ``x`` [..., width], in place where nothing is differentiated.

        Args:
            rows: int32 [tokens], each token's row of the tables, -1 for none; None: the first row for all.
        """
        raise TypeError(f"{type(self).__name__} is abstract")


#: Up to so many elements one dense operation on a CPU costs less than the sparse kernel's four.
FEW_ELEMENTS = 16384


def dense_is_cheaper(x: Tensor, table: StrengthTable) -> bool:
    """Whether one dense in-place operation costs less than the sparse kernel; it computes in float32, too.

    On a CPU only (bench/test_kernels.py compares the forms): the sparse form there is four operations, some 10 us a
    call, and 60 times the dense one's time an element. So dense for few elements, and for many columns.
    """
    if x.device.type != "cpu" or x.dtype == torch.float64 or table.dense_gamma is None:
        return False
    if x.dtype != torch.float32 and table.scales and table.shifts:
        return False  # two operations would round twice
    # A compiler fuses the dense form with what is around it, and a guard on the size would make it compile twice.
    return torch.compiler.is_compiling() or x.numel() <= FEW_ELEMENTS or 64 * table.index.numel() >= table.width


class Columns(TensorPath):
    """The module's own computation, then the sparse in-place kernel on the selected columns."""

    name = "columns"

    _simple = False

    def steer(self, x: Tensor) -> Tensor:
        # Decoding on a CPU: the layer's weights have just swept the caches, so every line of Python costs microseconds.
        # The general way takes about 90 us a site there, twice as long as this.
        if is_compiling():  # what follows remembers and counts, and each change would compile again
            return super().steer(x)
        table = self.table
        if self._simple and (elements := x.numel()) <= FEW_ELEMENTS and not x.requires_grad and x.is_contiguous():
            try:
                if table.scales:
                    x.addcmul_(x, table.dense_gamma)  # type: ignore[arg-type]
                else:
                    x.add_(table.dense_shift)  # type: ignore[arg-type]
            except RuntimeError:  # another device or width, and x is as it was; the general way sees to it
                pass
            else:
                self.calls += 1  # type: ignore[operator]
                self._elements += elements
                return x
        steered = super().steer(x)
        self._simple = self._is_simple(x)
        return steered

    def _is_simple(self, x: Tensor) -> bool:
        """Whether one operation with a dense table is all that calls like the last one take."""
        table = self.table
        one = self.routing is None and len(self.tables) == 1 and not table.magnitude and table.scales != table.shifts
        return one and not self._check and dense_is_cheaper(x, table)

    def apply(self, x: Tensor, rows: Tensor | None) -> Tensor:
        for table in self.tables:
            x = steer_columns(x, table, rows, self.routing)
        return x


def steer_columns(x: Tensor, table: StrengthTable, rows: Tensor | None, routing: Routing | None) -> Tensor:
    """``x`` [..., width] with the table's columns steered; in place unless ``x`` is differentiated.

    Args:
        rows: int32 [tokens] from ``routing``, or None for the first row of the table at every token.
    """
    if x.requires_grad and torch.is_grad_enabled():
        flat = x.reshape(-1, x.shape[-1])
        gamma, shift = table.gamma.clone(), table.shift.clone()  # alpha may change before the backward pass
        new = reference.steered_columns(flat.index_select(1, table.index), gamma, shift, table.magnitude, rows)
        return flat.index_copy(1, table.index, new).view(x.shape)
    if not x.is_contiguous():
        x = x.contiguous()
    if dense_is_cheaper(x, table):
        y = x if rows is None else x.view(-1, x.shape[-1])
        gamma, shift = cast(Tensor, table.dense_gamma), cast(Tensor, table.dense_shift)
        if rows is not None:
            gamma, shift = table.for_rows(*cast(Routing, routing).table_rows(rows))
        if table.scales:
            y.addcmul_(y.abs() if table.magnitude else y, gamma)
        if table.shifts:
            y.add_(shift)
        return x
    _steer_columns(x.view(-1, x.shape[-1]), table.index, table.gamma, table.shift, table.magnitude, rows)
    return x


class Dense(TensorPath):
    """The public code's arithmetic: multiply, add and copy back over the whole block. The baseline; never automatic."""

    name = "dense"

    def apply(self, x: Tensor, rows: Tensor | None) -> Tensor:
        steered, differentiate = x, x.requires_grad and torch.is_grad_enabled()
        for table in self.tables:
            gamma, shift = cast(Tensor, table.dense_gamma), cast(Tensor, table.dense_shift)
            if rows is not None:
                active = (rows >= 0)[:, None]
                gamma, shift = ((t[rows.clamp(min=0)] * active).view(x.shape) for t in (gamma, shift))
            else:
                gamma, shift = (t[0].clone() if differentiate else t[0] for t in (gamma, shift))
            if table.scales:
                steered = steered + (steered.abs() if table.magnitude else steered) * gamma.to(x.dtype)
            if table.shifts:
                steered = steered + shift.to(x.dtype)
        return steered if differentiate else x.copy_(steered)


class Fused(HookPath):
    """Our projection kernel in place of the linear layer's forward, with the steering inside it.

    Args:
        limit: up to how many tokens the kernel is used, its own limit at most; beyond, the model's own product and the
            sparse kernel.
    """

    name = "fused"

    def __init__(self, *args, limit: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.limit = limit

    def bind(self, module: nn.Module) -> None:
        self._forward = cast(Callable[[Tensor], Tensor], module._old_forward)
        self._ours = partial(self.forward, module)
        module._old_forward = self._ours  # type: ignore[assignment]

    def release(self, module: nn.Module) -> None:
        if module._old_forward is self._ours:  # someone may have put another one there
            module._old_forward = self._forward  # type: ignore[assignment]

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        rows = self.begin(x)
        if rows is NOBODY:
            return self._forward(x)
        linear, table, prologue = cast(nn.Linear, module), self.table, self.site.side == "input"
        if x.numel() > self.limit * x.shape[-1]:
            if prologue:
                return self._forward(steer_columns(x, table, rows, self.routing))
            return steer_columns(self._forward(x), table, rows, self.routing)
        if x.dtype != linear.weight.dtype:
            raise SteeringError(
                f"mode 'fused' at {self.site.path}: found {x.dtype} activations and a {linear.weight.dtype} weight "
                "(autocast?), expected one dtype; use mode='columns'"
            )
        # The definition is differentiable, the kernel is not.
        wanted = (x, linear.weight, linear.bias)
        differentiate = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in wanted)
        operation = reference.steered_linear if differentiate else _steered_linear
        gamma, shift = cast(Tensor, table.dense_gamma), cast(Tensor, table.dense_shift)
        if differentiate:
            gamma, shift = gamma.clone(), shift.clone()  # alpha may change before the backward pass
        tokens = x.reshape(-1, x.shape[-1])
        y = operation(tokens, linear.weight, linear.bias, gamma, shift, prologue, table.magnitude, rows)
        if self._check and self.checks_now(x):
            check_linear(self, tokens, linear, rows, y)
        return y.view(*x.shape[:-1], y.shape[-1])


def why_not_fused(module: nn.Module | None, groups: Sequence = ()) -> str | None:
    """The reason why ``module`` cannot be replaced by the fused projection, or None if it can.

    Args:
        groups: the AUs at the site; see ``choose``.
    """
    if module is None:
        return "no linear layer makes this tensor"
    if type(module) is not nn.Linear:
        return f"{type(module).__name__} is not a plain linear layer"
    if type(module.weight) is not nn.Parameter:
        return f"the weight is a {type(module.weight).__name__}"
    if module.weight.dtype not in FLOATING:
        return f"the weight is {module.weight.dtype}"
    if module.weight.dtype == torch.float64 and module.weight.device.type == "cuda":
        return "the kernel has no float64 on a GPU"
    if len(groups) > 1:
        return "plans with and without magnitude (push) meet here"
    return None
