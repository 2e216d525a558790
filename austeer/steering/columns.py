"""The path that steers the columns of the AUs, after the module's own computation or before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.compiler import is_compiling

from austeer_kernels import reference

from .forms import form_of, most_elements, steered
from .routing import WHOLE, capturing
from .run_path import RunPath
from .tables import StrengthTable

# The checked functions of austeer_kernels check what is true of every call here; naming the overload saves a search.
steer_columns_op = torch.ops.austeer.steer_columns_.default


class Columns(RunPath):
    """The AUs' columns of the module's input or output, by the form that is cheapest where it runs.

    In eager mode one PyTorch operation for few tokens and the sparse kernel for many, under CUDA graphs the sparse
    kernel; where it is compiled an expression that the compiler fuses with what is around it.
    """

    name = "columns"

    def apply(self, x: Tensor, rows: Tensor | None) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            return differentiable(x, self.tables, rows)
        if is_compiling():
            return compiled(x, self.tables, rows)
        x = x.contiguous()
        operands = self._operands(x, rows)
        if operands is None:
            return sparse(x, self.tables, rows)
        for table, given in zip(self.tables, operands):
            form_of(table)(x, *given)
        return x

    def _operands(self, x: Tensor, rows: Tensor | None) -> Sequence[tuple[Tensor, ...]] | None:
        """What one dense operation takes, and from now on the short way; None where the sparse kernel is the choice."""
        columns = max(table.columns for table in self.tables)
        if x.dtype == torch.float64 or x.numel() > most_elements(x.device.type, columns, self.table.width):
            return None
        key = WHOLE if self.routing is None else self.routing.key
        if key is None or capturing(x.device):
            return None
        if rows is None:
            operands = [table.operands or () for table in self.tables]
        else:
            rows = rows.long()
            operands = [
                tuple(t.view(x.shape) if t.numel() == x.numel() else t for t in table.spread(rows))
                for table in self.tables
            ]
        self.shorten(x, operands, key)
        return operands


def differentiable(x: Tensor, tables: Sequence[StrengthTable], rows: Tensor | None) -> Tensor:
    """``x`` steered out of place. The strengths are copied: alpha may change before the backward pass."""
    flat = x.reshape(-1, x.shape[-1])
    for table in tables:
        operands = table.spread(None if rows is None else rows.long(), reference.compute_dtype(x.dtype))
        flat = steered(flat, table, operands)
    return flat.view(x.shape)


def compiled(x: Tensor, tables: Sequence[StrengthTable], rows: Tensor | None) -> Tensor:
    """``x`` steered where it is compiled: by an expression that fuses, but for rows of plans and float64."""
    if rows is not None or x.dtype == torch.float64:
        return sparse(x.contiguous(), tables, rows)
    for table in tables:
        assert table.operands is not None  # several plans have rows
        x = steered(x, table, table.operands)
    return x


def sparse(x: Tensor, tables: Sequence[StrengthTable], rows: Tensor | None) -> Tensor:
    """``x``, contiguous, steered in place by the sparse kernel."""
    flat = x.view(-1, x.shape[-1])
    for table in tables:
        steer_columns_op(flat, table.index, table.gamma, table.shift, table.magnitude, rows)
    return x
