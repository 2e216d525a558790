"""The path that runs the sparse kernel on the steered columns after the module's own computation."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.compiler import is_compiling

from austeer_kernels import reference

from .hook_path import TensorPath
from .routing import Routing
from .tables import StrengthTable

# The checked functions of austeer_kernels check what is true of every call here; naming the overload saves a search.
steer_columns_op = torch.ops.austeer.steer_columns_.default


#: Up to so many elements one dense operation on a CPU costs less than the sparse kernel's four.
FEW_ELEMENTS = 16384


def dense_costs_less(elements: int, columns: int, width: int) -> bool:
    """Whether on a CPU one dense operation costs less than the sparse form, for so many of ``width`` columns."""
    return elements <= FEW_ELEMENTS or 64 * columns >= width


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
    return torch.compiler.is_compiling() or dense_costs_less(x.numel(), table.index.numel(), table.width)


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
    index = table.index.expand(table.gamma.shape)
    steer_columns_op(x.view(-1, x.shape[-1]), index, table.gamma, table.shift, table.magnitude, rows)
    return x
