"""The path that runs our projection kernel in place of a linear layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from austeer_kernels import reference

from ..errors import SteeringError
from ..models.linear import FLOATING
from .columns import Columns, size_of
from .routing import NOBODY, capturable, capturing
from .run_path import observable
from .selfcheck import check_linear
from .tables import StrengthTable

steered_linear_op = torch.ops.austeer.steered_linear.default


class Fused(Columns):
    """Our projection kernel in place of the linear layer's forward, with the steering inside it.

    Args:
        limit: up to how many tokens the kernel is used, its own limit at most; beyond, as in columns.
        always: also outside captured CUDA graphs, where a launch costs more than it saves.
    """

    name = "fused"

    def __init__(self, *args, limit: int, always: bool, **kwargs):
        super().__init__(*args, **kwargs)
        self.limit, self.always = limit, always
        self._check_product = self._check
        self._products: set[tuple[int, torch.dtype]] = set()  # sizes for which the kernel was run

    def detach(self) -> None:
        try:
            super().detach()
        except SteeringError:
            self.limit = -1
            raise

    # A linear layer's forward calls its argument ``input``.

    def at_input(self, input: Tensor) -> Tensor:
        if self._in_kernel(input):
            return self._product(input)
        return self._inner(self.steer(input))

    def at_output(self, input: Tensor) -> Tensor:
        if self._in_kernel(input):
            return self._product(input)
        return self.steer(self._inner(input))

    def _in_kernel(self, x: Tensor) -> bool:
        """Whether the kernel is what this call takes."""
        if x.numel() > self.limit * x.shape[-1]:
            return False
        if is_compiling():
            return self.always
        if capturing(x.device):
            return self.has_loaded(x) and not self.in_bias
        if capturable(x.device) and not self.has_loaded(x):
            self._load_product(x)
        return self.always

    def has_loaded(self, x: Tensor) -> bool:
        """Whether the kernel was run for as many tokens of this dtype."""
        return size_of(x) in self._products

    def _load_product(self, x: Tensor) -> None:
        """Runs the kernel as a captured graph would, once for a number of tokens; see ``load``."""
        weight = cast(nn.Linear, self.module).weight
        if (x.dtype, x.device) == (weight.dtype, weight.device) == (x.dtype, self.table.device):
            tokens = x.detach().reshape(-1, x.shape[-1])
            rows = self._rows_of_capture(len(tokens), x.device)
            with torch.no_grad():
                self._check_once(tokens, rows, self._kernel(tokens, rows))
            self._products.add(size_of(x))

    def _kernel(self, tokens: Tensor, rows: Tensor | None) -> Tensor:
        linear, table = cast(nn.Linear, self.module), cast(StrengthTable, self.table)
        gamma, shift = cast(Tensor, table.dense_gamma), cast(Tensor, table.dense_shift)
        # The definition is differentiable, the kernel is not.
        wanted = (tokens, linear.weight, linear.bias)
        differentiate = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in wanted)
        operation = reference.steered_linear if differentiate else steered_linear_op
        if differentiate:
            gamma, shift = gamma.clone(), shift.clone()  # alpha may change before the backward pass
        at_input = self.site.side == "input"
        return operation(tokens, linear.weight, linear.bias, gamma, shift, at_input, table.magnitude, rows)

    def _check_once(self, tokens: Tensor, rows: Tensor | None, y: Tensor) -> None:
        """Compares what the kernel made with the formula; what it makes in a captured graph cannot be looked at."""
        if observable(tokens) and self._check_product:  # in this order, see checks_now
            self._check_product = False
            check_linear(self, tokens, cast(nn.Linear, self.module), rows, y)

    def _product(self, x: Tensor) -> Tensor:
        """The linear layer's output, steered."""
        rows = self.begin(x)
        if rows is NOBODY:
            return self._inner(x)
        linear = cast(nn.Linear, self.module)
        if x.dtype != linear.weight.dtype:
            raise SteeringError(
                f"mode 'fused' at {self.site.path}: found {x.dtype} activations and a {linear.weight.dtype} weight "
                "(autocast?), expected one dtype; use mode='columns'"
            )
        tokens = x.reshape(-1, x.shape[-1])
        y = self._kernel(tokens, rows)
        self._check_once(tokens, rows, y)
        return y.view(*x.shape[:-1], y.shape[-1])


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
    if any(group[0].form == "direction" for group in groups):
        return "ablate takes a sum over the AUs, which the kernel does not make"
    if len(groups) > 1:
        return "plans with and without magnitude (push) meet here"
    return None
