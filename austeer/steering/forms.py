"""The steering of a whole tensor as one PyTorch operation: what costs the least host time.

A layer's weights sweep the caches, so between two sites a line of Python and a launch cost more than all that an
operation does with the few tokens of decoding. The operands are a :class:`Table`'s: float32, neutral (factor 1,
addend 0) where nothing is steered, of the tensor's width or of its whole shape. Each form computes in float32 and
rounds once; an infinity or NaN in an unsteered column stays what it is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from austeer_kernels import reference

from .tables import Table

#: Called with the tensor, which it changes in place, and the operands.
Form = Callable[..., Tensor]


def scale_and_shift_(x: Tensor, factor: Tensor, addend: Tensor) -> Tensor:
    """x <- x * factor + addend"""
    return torch.addcmul(addend, x, factor, out=x)


def push_(x: Tensor, gamma: Tensor, one: Tensor) -> Tensor:
    """x <- x * (1 + gamma * sign(x)), which is x + gamma * |x|; that would make NaN of 0 * inf."""
    return x.mul_(torch.addcmul(one, x.sgn(), gamma))


def ablate_(x: Tensor, index: Tensor, direction: Tensor, strength: Tensor, rows: Tensor | None) -> Tensor:
    """x <- x - strength * d (d . x), of the columns that d has: a sum over the whole width would read the others."""
    reference.ablate_columns_(x.view(-1, x.shape[-1]), index, direction, strength, rows)
    return x


def form_of(table: Table) -> Form:
    """The operation, in place, that takes what ``table.for_form`` gives."""
    if table.ablates:
        return ablate_
    if table.magnitude:
        return push_
    if table.scales and table.shifts:
        return scale_and_shift_
    return Tensor.mul_ if table.scales else Tensor.add_  # by the factor, of the addend


def steered(x: Tensor, table: Table, operands: tuple[Tensor, ...]) -> Tensor:
    """The same out of place and differentiable, in the operands' dtype, rounded once; compilers fuse it."""
    if table.ablates:
        return reference.ablated(x, *operands)
    wide = x.to(operands[0].dtype)
    if table.magnitude:
        wide = wide * (1 + operands[0] * wide.sign())
    elif table.scales:
        wide = wide * operands[0]
    return (wide + operands[-1] if table.shifts else wide).to(x.dtype)


#: Up to so many elements one dense operation costs less than a sparse kernel ...
FEW_ELEMENTS = {"cpu": 2**14, "cuda": 2**21}
#: ... and so it does for any number where this many times the columns are at least the width.
MANY_COLUMNS = {"cpu": 64, "cuda": 10}
# A CPU's were measured (bench/test_kernels.py compares the forms). A GPU's are estimates until one was asked: at 4096
# tokens of a width of 4096 the sparse kernel saved 60 to 270 us of an H200's time, and cost its host 180 us.


def most_elements(device: str, columns: int, width: int) -> float:
    """Up to how many elements of a tensor one dense operation costs less than the sparse kernel, for so many columns.

    On other devices than a CPU and CUDA's there is no sparse kernel.
    """
    if device not in FEW_ELEMENTS or MANY_COLUMNS[device] * columns >= width:
        return float("inf")
    return FEW_ELEMENTS[device]
