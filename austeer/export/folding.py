"""Steering written into a weight and its bias; see :mod:`austeer.export.edits` for the formulas."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.linear import bias_of_shift
from .edits import Edit, ExportError, Strengths


def folded_weight(edit: Edit, weight: Tensor) -> Tensor:
    """A steered layer's weight: computed in float64 where it changes, rounded once.

    Args:
        weight: as it is stored: [out, in] or [in, out], with or without experts in front.
    """
    dims = _dims(edit)
    result = weight.clone()
    for side, dim in dims.items():
        strengths: Strengths | None = getattr(edit, side)
        if strengths is None or not len(index := strengths.changed):
            continue
        # An entry in a changed row and a changed column is made twice, from the same original.
        slice_ = strengths.at(index).linear(weight.index_select(dim, index).double(), dim)
        other = "output" if side == "input" else "input"
        if (beside := getattr(edit, other)) is not None:
            slice_ = beside.linear(slice_, dims[other])
        result.index_copy_(dim, index, rounded(slice_, weight.dtype, edit.path))
    return result


def folded_bias(edit: Edit, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A steered layer's bias, in ``dtype``: computed in float64, rounded once.

    Args:
        weight, bias: as in :func:`steered_bias`. dtype: the result's.
    """
    return rounded(steered_bias(edit, weight, bias), dtype, edit.path)


def steered_bias(edit: Edit, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same before it is rounded, float64: M (b + W s) + t, with shifts s of the inputs and t of the outputs.

    M is what else is done to the outputs: 1 + gamma, and less directions.

    Args:
        weight: the original one. bias: None if it has none.
    """
    dims = _dims(edit)
    width = weight.shape[dims["output"]]
    result = torch.zeros(width, dtype=torch.float64, device="cpu") if bias is None else bias.double()
    if edit.input is not None and edit.input.shifts:
        result = result + bias_of_shift(edit.input.index, edit.input.shift, width, weight, dims["input"])
    if edit.output is not None:
        result = edit.output.linear(result, -1)
        if edit.output.shifts:
            result += bias_of_shift(edit.output.index, edit.output.shift, width)
    return result


def rounded(values: Tensor, dtype: torch.dtype, path: str) -> Tensor:
    """Values in ``dtype``; raises ExportError, with the place in the model, where one is no finite number of it."""
    if not values.isfinite().all():
        raise ExportError(
            f"{path}: found NaN or infinity, expected finite numbers; copy the model anew, or take a smaller alpha"
        )
    found = values.to(dtype)
    if not found.isfinite().all():
        raise ExportError(
            f"{path}: found a value of {float(values.abs().max()):.3g}, which is no finite {dtype} number; take a "
            "smaller alpha, or bfloat16 or float32"
        )
    return found


def _dims(edit: Edit) -> dict[str, int]:
    """Which dimension of the weight counts what, from the last one: with and without experts in front."""
    count = 3 if edit.experts else 2
    return {"input": edit.weights.input - count, "output": edit.weights.output - count}
