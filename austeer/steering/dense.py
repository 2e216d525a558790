"""The path that runs the public code's arithmetic: the baseline."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from .run_path import RunPath
from .tables import DirectionTable, StrengthTable


class Dense(RunPath):
    """The public code's arithmetic: multiply, add and copy back over the whole block. The baseline; never automatic."""

    name = "dense"

    def apply(self, x: Tensor, rows: Tensor | None) -> Tensor:
        steered, differentiate = x, x.requires_grad and torch.is_grad_enabled()
        for table in self.tables:
            if isinstance(table, DirectionTable):
                steered = _ablated(steered, table, rows)
                continue
            assert isinstance(table, StrengthTable)
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


def _ablated(x: Tensor, table: DirectionTable, rows: Tensor | None) -> Tensor:
    """The same arithmetic for a direction: each step in the dtype of ``x``."""
    if rows is None:
        direction, strength = cast(tuple[Tensor, ...], table.operands)
        d, strength = direction.to(x.dtype, copy=True), strength.to(x.dtype)  # alpha may change before a backward pass
    else:
        d, strength = table.spread(rows.long(), x.dtype)
        d, strength = d.view(x.shape), strength.view(*x.shape[:-1], 1)
    return x - (x * d).sum(-1, keepdim=True) * (strength * d)
