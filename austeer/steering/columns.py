"""The path that steers the columns of the AUs, after the module's own computation or before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling, is_dynamo_compiling

from austeer_kernels import launch, reference

from .bias import Bias
from .forms import Form, form_of, most_elements, steered
from .routing import NOBODY, WHOLE, capturable, capturing
from .run_path import RunPath
from .selfcheck import checked_tensor
from .switch import SwitchedBias
from .tables import Table

#: What a form of :mod:`austeer.steering.forms` takes besides the tensor.
Operands = tuple[Tensor | None, ...]


@dataclass(slots=True)
class _Short:
    """The one operation that is all there is to do, for calls like one that went the general way.

    Attributes:
        form, operands: of the first table; more: both of each further one, if there are any.
        key: of the routing. dtype: of the tensor. most: its elements. on_gpu: whether a graph may be captured.
    """

    form: Form
    operands: Operands
    more: tuple[tuple[Form, Operands], ...]
    key: object
    dtype: torch.dtype
    most: float
    on_gpu: bool


class Columns(RunPath):
    """The AUs' columns of the module's input or output, by the form that is cheapest where it runs.

    In eager mode one PyTorch operation for few tokens and the sparse kernel for many, under CUDA graphs the sparse
    kernel; where it is compiled an expression that the compiler fuses with what is around it.

    Args:
        edit: a bias that does the same for every token; it is on in forward passes of which every token is steered.
    """

    name = "columns"

    def __init__(self, *args, edit: Bias | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.edit: Bias | None = edit
        self._bias: SwitchedBias | None = None
        self._loads = False
        if edit is not None:
            self.name = edit.name
        self._short: _Short | None = None
        # Where graphs can be captured: sizes (see size_of) that went the general way, and for which the kernel was run.
        self._seen: set[tuple[int, torch.dtype]] = set()
        self._loaded: set[tuple[int, torch.dtype]] = set()
        self._check_kernel = self._check

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return (self.module,) if self.edit is None else (self.module, self.edit.module)

    def edited(self) -> list[tuple[nn.Module, list[str]]]:
        # Another bias takes the place of the module's own, which stays as it is.
        return [] if self.edit is None else [(self.edit.module, [])]

    def attach(self) -> None:
        super().attach()
        if self.edit is not None:
            assert self.routing is not None
            self._bias = self.routing.switch.add(self.edit)
            self._loads = capturable(self.edit.like.device)  # a tensor takes as long to ask as an operation

    def refresh(self) -> None:
        if self._bias is not None:
            self._bias.stale = True

    def detach(self) -> None:
        if self.edit is not None and self.routing is not None:
            self.routing.switch.remove(self.edit)
        super().detach()

    def steer(self, x: Tensor) -> Tensor:
        """The steered tensor, may be ``x`` itself.

        In eager mode the general way finds out, once, that one operation on the whole of ``x`` is all there is to do;
        the short way then does it for calls like that one. Decoding waits for the host: the general way takes some
        90 us a site there, with the caches swept by the layer's weights.
        """
        bias = self._bias
        if bias is not None and bias.on:
            return self._counted(x)
        if is_dynamo_compiling():  # what follows remembers and counts, and each change would compile again
            return super().steer(x)
        short, routing = self._short, self.routing
        if routing is not None:
            if routing.key is NOBODY:
                self.calls += 1  # type: ignore[operator]
                return x
            if short is not None and routing.key != short.key:
                short = None
        if short is None or x.dtype is not short.dtype or x.requires_grad or self.module.training:
            return super().steer(x)
        if not x.is_contiguous():
            return super().steer(x)
        if x.__class__ is not Tensor:  # torch.export traces with a fake one, whose size is a symbol
            return super().steer(x)
        elements = x.numel()
        if elements > short.most or (short.on_gpu and ((elements, x.dtype) not in self._seen or capturing(x.device))):
            return super().steer(x)
        try:
            short.form(x, *short.operands)
        except RuntimeError:  # another device or shape, and x is as it was; the general way sees to it
            self._short = None
            return super().steer(x)
        for form, operands in short.more:  # what this raises is raised: x is half steered
            form(x, *operands)
        self.calls += 1  # type: ignore[operator]
        self._elements += elements
        return x

    @property
    def in_bias(self) -> bool:
        """Whether a bias steers now."""
        return self._bias is not None and self._bias.on

    def _counted(self, x: Tensor) -> Tensor:
        """``x``, which a bias has steered or will."""
        if is_compiling():
            self.traced = True
        elif self._loads and size_of(x) not in self._seen and not capturing(x.device):
            self.begin(x)
            if x.dtype != torch.float64:  # which the kernel does not steer
                self.load(x.contiguous())
        else:
            self.calls += 1  # type: ignore[operator]
        return x

    def apply(self, x: Tensor, rows: Tensor | None) -> Tensor:
        if x.dtype == torch.float64 or (x.requires_grad and torch.is_grad_enabled()):  # the others compute in float32
            return differentiable(x, self.tables, rows)
        if is_compiling():
            return compiled(x, self.tables, rows)
        x = x.contiguous()
        if capturing(x.device):
            if size_of(x) in self._loaded:
                return sparse(x, self.tables, rows)
            return whole(x, forms_of(x, self.tables, rows))
        if capturable(x.device):
            self.load(x)
        most = most_elements(x.device.type, max(table.columns for table in self.tables), self.table.width)
        key = WHOLE if self.routing is None else self.routing.key
        if key is None or x.numel() > most:
            return sparse(x, self.tables, rows)
        forms = forms_of(x, self.tables, rows)
        self._short = _Short(*forms[0], tuple(forms[1:]), key, x.dtype, most, capturable(x.device))
        return whole(x, forms)

    def load(self, x: Tensor) -> None:
        """Runs the sparse kernel on a copy of ``x``, once for its size, if a graph of decoding may be captured.

        A kernel's code is loaded as it first runs, which a driver refuses during a capture: there it is only taken
        where it was loaded before.
        """
        if size_of(x) in self._seen:
            return
        self._seen.add(size_of(x))
        tokens = x.numel() // self.table.width
        if tokens <= launch.MOST_TOKENS or x.dim() == 2 or x.shape[-2] == 1:
            rows = self._rows_of_capture(tokens, x.device)
            result = sparse(x.clone(), self.tables, rows)
            if self._check_kernel:  # what it makes in a captured graph cannot be looked at
                self._check_kernel = False
                checked_tensor(self, x, rows)(result)
            self._loaded.add(size_of(x))

    def _rows_of_capture(self, tokens: int, device: torch.device) -> Tensor | None:
        """Rows as a captured pass has them: where there is a routing, on the device, whatever they say."""
        return None if self.routing is None else torch.zeros(tokens, dtype=torch.int32, device=device)


def size_of(x: Tensor) -> tuple[int, torch.dtype]:
    """What a kernel's code depends on: each dtype has its own, and each number of tokens its settings."""
    return x.numel(), x.dtype


def forms_of(x: Tensor, tables: Sequence[Table], rows: Tensor | None) -> list[tuple[Form, Operands]]:
    """What steers ``x`` by each table, and what it takes for that."""
    return [(form_of(table), table.for_form(x, rows)) for table in tables]


def whole(x: Tensor, forms: Sequence[tuple[Form, Operands]]) -> Tensor:
    """``x``, contiguous, steered in place by one operation a table."""
    for form, operands in forms:
        form(x, *operands)
    return x


def differentiable(x: Tensor, tables: Sequence[Table], rows: Tensor | None) -> Tensor:
    """``x`` steered out of place. The strengths are copied: alpha may change before the backward pass."""
    flat = x.reshape(-1, x.shape[-1])
    for table in tables:
        operands = table.spread(None if rows is None else rows.long(), reference.compute_dtype(x.dtype))
        flat = steered(flat, table, operands)
    return flat.view(x.shape)


def compiled(x: Tensor, tables: Sequence[Table], rows: Tensor | None) -> Tensor:
    """``x`` steered where it is compiled: by an expression that fuses, but for rows of plans."""
    if rows is not None:
        return sparse(x.contiguous(), tables, rows)
    for table in tables:
        assert table.operands is not None  # several plans have rows
        x = steered(x, table, table.operands)
    return x


def sparse(x: Tensor, tables: Sequence[Table], rows: Tensor | None) -> Tensor:
    """``x``, contiguous, steered in place by the sparse kernel, or, where a direction is removed, sparsely."""
    flat = x.view(-1, x.shape[-1])
    for table in tables:
        table.steer_(flat, rows)
    return x
