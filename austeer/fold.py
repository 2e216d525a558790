"""The fold path: steering written into the weights; it costs nothing at run time."""

from __future__ import annotations

from collections import Counter
from typing import cast

import torch
from torch import Tensor, nn

from austeer_kernels import reference

from .paths import FLOATING, Path
from .sites import Site
from .strengths import StrengthTable


class Fold(Path):
    """Scales rows (output side) or columns (input side) of the projection's weight in place; no run-time cost.

    y = W x + b, steered at the output:  W[I] *= 1 + gamma;  b[I] = b[I] * (1 + gamma) + shift
    steered at the input:                b += W[:, I] @ shift;  W[:, I] *= 1 + gamma
    """

    name = "fold"

    def __init__(self, site: Site, table: StrengthTable, module: nn.Module):
        super().__init__(site, table, module)
        self.calls = None
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None

    @property
    def _linear(self) -> nn.Linear:
        return cast(nn.Linear, self.module)

    def _slice(self, device: torch.device) -> tuple:
        index = self.table.index.to(device)
        return (index,) if self.site.side == "output" else (slice(None), index)

    @torch.no_grad()
    def attach(self) -> None:
        weight, bias, table = self._linear.weight, self._linear.bias, self.table
        if weight.device != table.device:
            table.to(weight.device)
        place, wide = self._slice(weight.device), reference.compute_dtype(weight.dtype)
        self._weight = weight[place].clone()
        self._bias = None if bias is None else bias.clone()
        saved, factor, shift = self._weight.to(wide), 1 + table.gamma[0].to(wide), table.shift[0].to(wide)
        if self.site.side == "output":
            weight[place] = (saved * factor[:, None]).to(weight.dtype)
            if self._bias is not None:
                bias[table.index] = (self._bias[table.index].to(wide) * factor + shift).to(bias.dtype)
        else:
            weight[place] = (saved * factor).to(weight.dtype)
            if self._bias is not None and table.operation == "shift":
                bias.copy_(self._bias.to(wide) + saved @ shift)

    @torch.no_grad()
    def detach(self) -> None:
        linear = self._linear
        if self._weight is not None:
            # The model may have been moved or cast in the meantime; so are the saved values.
            linear.weight[self._slice(linear.weight.device)] = self._weight.to(linear.weight)
        if self._bias is not None:
            linear.bias.copy_(self._bias)
        self._weight = self._bias = None


def why_not_fold(module: nn.Module | None, operation: str, storages: Counter) -> str | None:
    """The reason why steering cannot be folded into ``module``'s weight, or None if it can.

    Args:
        storages: how many parameters of the model lie in each storage, from :func:`shared_storages`.
    """
    if module is None:
        return "no linear layer makes this tensor"
    if type(module) is not nn.Linear:
        return f"{type(module).__name__} is not a plain linear layer"
    if operation == "push":
        return "push is not linear"
    if operation == "shift" and module.bias is None:
        return "shift needs a bias and the layer has none"
    for name in ("weight", "bias"):
        p = module._parameters.get(name)
        if p is None:
            if getattr(module, name) is not None:
                return f"the {name} is made anew at each forward pass (pruning, weight normalisation ...)"
            continue
        if p.device.type == "meta":
            return f"the {name} is offloaded"
        if p.dtype not in FLOATING:
            return f"the {name} is {p.dtype}"
        if type(p) is not nn.Parameter:
            return f"the {name} is a {type(p).__name__}"
        if storages[p.untyped_storage().data_ptr()] > 1:
            return f"the {name} is shared with another module"
    if getattr(getattr(module, "_hf_hook", None), "offload", False):
        return "the weight is offloaded"
    return None


def shared_storages(model: nn.Module) -> Counter:
    """How many parameters (tied ones counted each time) lie in each storage."""
    return Counter(
        p.untyped_storage().data_ptr()
        for _, p in model.named_parameters(remove_duplicate=False)
        if p.device.type != "meta"
    )
