"""Steering written into a weight and its bias; see :mod:`austeer.export.edits` for the formulas."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.linear import bias_of_shift
from .edits import Edit, ExportError


def folded_weight(edit: Edit, weight: Tensor) -> Tensor:
    """A steered layer's weight: computed in float64 where it changes, rounded once.

    Args:
        weight: as it is stored: [out, in] or [in, out], with or without experts in front.
    """
    dims = _dims(edit)
    factors = {}
    for side, dim in dims.items():
        strengths = getattr(edit, side)
        factor = torch.ones(weight.shape[dim], dtype=torch.float64, device="cpu")
        if strengths is not None:
            factor[strengths.index] += strengths.gamma
        factors[side] = factor
    result = weight.clone()
    for side, dim in dims.items():
        index = (factors[side] != 1).nonzero()[:, 0]
        if not len(index):
            continue
        other = "output" if side == "input" else "input"
        # An entry in a scaled row and a scaled column is made twice, from the same original.
        slice_ = weight.index_select(dim, index).double().movedim(dim, -1) * factors[side][index]  # [..., other, AUs]
        slice_ *= factors[other][:, None]
        result.index_copy_(dim, index, rounded(slice_.movedim(-1, dim), weight.dtype, edit.path))
    return result


def folded_bias(edit: Edit, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A steered layer's bias, in ``dtype``: computed in float64, rounded once.

    Args:
        weight, bias: as in :func:`steered_bias`. dtype: the result's.
    """
    return rounded(steered_bias(edit, weight, bias), dtype, edit.path)


def steered_bias(edit: Edit, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same before it is rounded, float64: (1 + gamma) (b + W s) + t, with shifts s of the inputs, t of the outputs.

    Args:
        weight: the original one. bias: None if it has none.
    """
    dims = _dims(edit)
    width = weight.shape[dims["output"]]
    result = torch.zeros(width, dtype=torch.float64, device="cpu") if bias is None else bias.double()
    if edit.input is not None and edit.input.shifts:
        result = result + bias_of_shift(edit.input.index, edit.input.shift, width, weight, dims["input"])
    if edit.output is not None:
        result = result.clone()
        result[..., edit.output.index] *= 1 + edit.output.gamma
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
