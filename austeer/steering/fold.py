"""The fold path: scaling written into the weights; it costs nothing at run time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from austeer_kernels import reference

from ..errors import SteeringError
from ..models.linear import WeightNames, weights_of
from ..models.sites import Site
from ..plans.fit import why_no_edit
from .editable import is_offloaded, why_frozen, why_in_training, why_not_between, why_not_parameter
from .path import Path
from .tables import StrengthTable


@dataclass
class _Saved:
    """What was scaled of one part, as it was.

    Attributes:
        weight: the AUs' rows or columns. bias: the whole of it.
        factor: of each AU; None until it is scaled. version: autograd's, of the scaled weight; None where it has none.
    """

    weight: Tensor
    bias: Tensor | None
    factor: Tensor | None = None
    version: int | None = None

    def scaled(self, dim: int) -> Tensor:
        """The rows or columns times the factor, rounded once."""
        assert self.factor is not None
        wide = self.weight.to(self.factor.dtype).movedim(dim, -1)  # [..., AUs]
        return (wide * self.factor).movedim(-1, dim).to(self.weight.dtype)


def _version(weight: Tensor) -> int | None:
    return None if weight.is_inference() else weight._version


class Fold(Path):
    """Scales rows (output side) or columns (input side) of the weights in place; no run-time cost.

    y = W x + b, scaled at the output:  W[I] *= 1 + gamma;  b[I] *= 1 + gamma
    scaled at the input:                W[:, I] *= 1 + gamma

    A mixture of experts is y = sum_e r_e (W_e x_e + b_e), r_e the router's or a gate's: scaled at the output if every
    W_e and b_e is.
    """

    name = "fold"

    def __init__(self, site: Site, table: StrengthTable, parts: Sequence[nn.Module]):
        super().__init__(site, table, parts[0])
        self.calls = None
        self.parts = tuple(parts)
        self._names = [weights_of(part) for part in parts]  # now: a module's class may be another on leaving
        self._saved: list[_Saved] = []
        self._hooks: list[RemovableHandle] = []

    @torch.no_grad()
    def attach(self) -> None:
        for weight, bias, dim in self._weights():
            index = self.table.index[0].to(weight.device)
            saved = weight.index_select(dim, index)
            kept = _Saved(saved, None if bias is None else bias.clone())
            self._saved.append(kept)
            wide = reference.compute_dtype(weight.dtype)
            factor = (1 + self.table.gamma[0].to(wide)).to(weight.device)
            kept.factor = factor
            weight.index_copy_(dim, index, kept.scaled(dim))
            kept.version = _version(weight)
            if bias is not None:
                bias.index_copy_(-1, index, (bias.index_select(-1, index).to(wide) * factor).to(bias.dtype))
            for tensor, along in ((weight, dim), (bias, -1)):
                if tensor is not None and tensor.requires_grad and tensor.is_leaf:
                    self._hooks.append(tensor.register_hook(partial(_scaled, dim=along, index=index, factor=factor)))
        torch.clear_autocast_cache()  # a copy of the weight as it was may be in it

    @torch.no_grad()
    def detach(self) -> None:
        """Raises SteeringError, once all is restored, where something else has written to what was scaled."""
        changed = False
        # After an attach that was broken off there are fewer saved values than parts; the rest was not touched.
        for (weight, bias, dim), kept in zip(self._weights(), self._saved):
            index = self.table.index[0].to(weight.device)
            if kept.factor is not None and (kept.version is None or kept.version != _version(weight)):
                changed |= not torch.equal(weight.index_select(dim, index), kept.scaled(dim).to(weight))
            # The model may have been moved or cast in the meantime; so are the saved values.
            weight.index_copy_(dim, index, kept.weight.to(weight))
            if bias is not None and kept.bias is not None:
                bias.copy_(kept.bias)
        self._saved = []
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        torch.clear_autocast_cache()
        if changed:
            raise SteeringError(
                "found weights that were changed inside the block (a training step, a checkpoint), expected them to be "
                "left alone; what was steered of them is what it was before. Put the model into training mode before "
                "the block, or use mode='columns'"
            )

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return self.parts

    def _weights(self) -> Iterator[tuple[Tensor, Tensor | None, int]]:
        """Weight, the bias that is scaled with it, and the weight's dimension that counts the AUs, of each part."""
        for part, weights in zip(self.parts, self._names):
            assert isinstance(weights, WeightNames)  # why_not_fold refuses all else
            bias = getattr(part, weights.bias) if weights.bias and self.site.side == "output" else None
            yield getattr(part, weights.weight), bias, getattr(weights, self.site.side)


def _scaled(gradient: Tensor, dim: int, index: Tensor, factor: Tensor) -> Tensor:
    """The gradient of a weight, from that of the scaled one."""
    index, factor = index.to(gradient.device), factor.to(gradient.device)
    some = gradient.index_select(dim, index).movedim(dim, -1) * factor
    return gradient.index_copy(dim, index, some.movedim(-1, dim).to(gradient.dtype))


def why_not_fold(model: nn.Module, site: Site, operation: str, storages: Counter) -> str | None:
    """The reason why steering cannot be folded into the weights at a site, or None if it is exact and possible.

    Args:
        storages: how many parameters of the model lie in each storage, from ``shared_storages``.
    """
    if operation == "shift":
        return "shift scales no weight"
    if reason := why_no_edit(model, site, operation) or why_frozen() or why_in_training(model, site):
        return reason
    for path in site.parts:
        reason = _why_not_part(model.get_submodule(path), site, storages) or why_not_between(model, site, path)
        if reason is not None:
            return reason if len(site.parts) == 1 else f"{path}: {reason}"
    return None


def _why_not_part(module: nn.Module, site: Site, storages: Counter) -> str | None:
    weights = weights_of(module)
    assert isinstance(weights, WeightNames)  # why_no_edit refuses all else
    if is_offloaded(module):
        return "the weight is offloaded"
    for name in filter(None, (weights.weight, weights.bias)):
        if reason := why_not_parameter(module, name, storages):
            return reason
    weight, dim = module._parameters[weights.weight], getattr(weights, site.side)
    if weight is None or weight.shape[dim] != site.width:  # sharded, say
        return f"the weight is {tuple(weight.shape) if weight is not None else None}, for {site.width} AUs"
    return None
