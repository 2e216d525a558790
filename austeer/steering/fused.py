"""The path that runs our projection kernel in place of a linear layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from austeer_kernels import reference

from ..errors import SteeringError
from ..models.linear import FLOATING
from .columns import steer_columns
from .hook_path import HookPath, observable
from .routing import NOBODY
from .selfcheck import check_linear, checked_tensor

steered_linear_op = torch.ops.austeer.steered_linear.default


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
        self._check_columns = self._check

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
            return self._forward(self._columns(x, rows)) if prologue else self._columns(self._forward(x), rows)
        if x.dtype != linear.weight.dtype:
            raise SteeringError(
                f"mode 'fused' at {self.site.path}: found {x.dtype} activations and a {linear.weight.dtype} weight "
                "(autocast?), expected one dtype; use mode='columns'"
            )
        # The definition is differentiable, the kernel is not.
        wanted = (x, linear.weight, linear.bias)
        differentiate = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in wanted)
        operation = reference.steered_linear if differentiate else steered_linear_op
        gamma, shift = cast(Tensor, table.dense_gamma), cast(Tensor, table.dense_shift)
        if differentiate:
            gamma, shift = gamma.clone(), shift.clone()  # alpha may change before the backward pass
        tokens = x.reshape(-1, x.shape[-1])
        y = operation(tokens, linear.weight, linear.bias, gamma, shift, prologue, table.magnitude, rows)
        if self._check and self.checks_now(x):
            check_linear(self, tokens, linear, rows, y)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _columns(self, x: Tensor, rows: Tensor | None) -> Tensor:
        """The sparse kernel, whose first call is compared with the formula, too."""
        if not self._check_columns or not observable(x):
            return steer_columns(x, self.table, rows, self.routing)
        self._check_columns = False
        return checked_tensor(self, x, rows)(steer_columns(x, self.table, rows, self.routing))


def why_not_fused(module: nn.Module | None, groups: Sequence = ()) -> str | None:
    """The reason why ``module`` cannot be replaced by the fused projection, or None if it can; see ``choose``."""
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
