"""The fold path: scaling, or a direction's removal, written into the weights; it costs nothing at run time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.hooks import RemovableHandle

from austeer_kernels import reference

from ..errors import SteeringError
from ..models.linear import WeightNames, weights_of
from ..models.sites import Site
from ..plans.fit import why_no_edit
from .editable import is_offloaded, warn_of_gradients, why_frozen, why_in_training, why_not_between, why_not_parameter
from .path import Path
from .sharing import Sharing
from .tables import DirectionTable, StrengthTable, Table


class Scaling:
    """By 1 + gamma, entry by entry."""

    def __init__(self, gamma: Tensor, wide: torch.dtype, device: torch.device):
        self.factor = (1 + gamma.to(wide)).to(device)

    def begin(self, before: Tensor) -> None:
        """Takes up what it depends on of ``before`` [..., AUs], which it is about to change."""

    def of(self, before: Tensor) -> Tensor:
        """The same each time, bit for bit, on whatever number of threads: what steering wrote is told by it."""
        return before.to(self.factor.dtype) * self.factor

    def of_gradient(self, gradient: Tensor) -> Tensor:
        return gradient * self.factor.to(gradient.device)


class Ablation:
    """Less alpha d (d . x) over the AUs. The sums d . x are kept: made anew they could be rounded otherwise."""

    def __init__(self, direction: Tensor, strength: Tensor, wide: torch.dtype, device: torch.device):
        self.direction = direction.to(device, wide)
        self.removed = self.direction * strength.to(device, wide)
        self.along = self.direction  # of what is changed: see begin

    def begin(self, before: Tensor) -> None:
        self.along = (before * self.direction).sum(-1, keepdim=True)

    def of(self, before: Tensor) -> Tensor:
        return torch.where(self.removed != 0, before - self.along * self.removed, before)

    def of_gradient(self, gradient: Tensor) -> Tensor:
        direction, removed = self.direction.to(gradient.device), self.removed.to(gradient.device)
        return gradient - (gradient * direction).sum(-1, keepdim=True) * removed


def change_of(table: Table, wide: torch.dtype, device: torch.device) -> Scaling | Ablation:
    """What a table's one plan does to weights, in ``wide``, on ``device``."""
    if isinstance(table, DirectionTable):
        return Ablation(table.direction[0], table.strength[0], wide, device)
    assert isinstance(table, StrengthTable)
    return Scaling(table.gamma[0], wide, device)


class Edit:
    """Rows or columns of one parameter, changed in place, and the way back.

    Args:
        name: of the module's parameter. dim: the dimension that the table's AUs are counted in.
        table: of one plan. Its AUs are scaled by 1 + gamma, or a direction is removed from them; rounded once.
    """

    def __init__(self, module: nn.Module, name: str, dim: int, table: Table):
        self.module, self.name, self.dim, self.index = module, name, dim, table.index[0]
        index = self.index
        p = module._parameters[name]
        assert p is not None  # why_not_fold refuses it
        # Should the module get another tensor, this one may be someone else's, too.
        self._storage = StorageWeakRef(p.untyped_storage())
        self._place = p.dtype, p.storage_offset(), p.size(), p.stride()
        wide = reference.compute_dtype(p.dtype)
        self._before = p.index_select(dim, index.to(p.device))
        self._change = change_of(table, wide, p.device)
        self._change.begin(self._before.movedim(dim, -1))
        p.index_copy_(dim, index.to(p.device), self._after())
        self._hook: RemovableHandle | None = None
        self._wanted, self._differentiated = p.requires_grad, False
        if p.requires_grad and p.is_leaf:
            self._hook = p.register_hook(self._gradient)

    def _gradient(self, gradient: Tensor) -> Tensor:
        """The gradient of the parameter, from that of the scaled one."""
        self._differentiated = True
        index = self.index.to(gradient.device)
        some = self._change.of_gradient(gradient.index_select(self.dim, index).movedim(self.dim, -1))
        return gradient.index_copy(self.dim, index, some.movedim(-1, self.dim).to(gradient.dtype))

    def _after(self) -> Tensor:
        """What was changed, rounded once; made anew on leaving, as it would double what is held."""
        changed = self._change.of(self._before.movedim(self.dim, -1))  # [..., AUs]
        return changed.movedim(-1, self.dim).to(self._before.dtype)

    def undo(self) -> bool:
        """Restores what was changed, wherever it is by now; False if some of it was changed since, which stays."""
        p, edited = self.module._parameters.get(self.name), self._edited()
        if self._hook is not None:
            self._hook.remove()
        if p is not None:
            warn_of_gradients(p, f"{type(self.module).__name__}.{self.name}", self._wanted, self._differentiated)
        tensors: list[Tensor] = []
        if p is not None and p.device.type != "meta":  # otherwise it was pruned, say, or offloaded
            tensors.append(p)
        if edited is not None and not any(t.data_ptr() == edited.data_ptr() for t in tensors):  # moved or cast
            tensors.append(edited)
        undone = [self._undo_in(t) for t in tensors]
        return bool(undone) and all(undone)

    def _edited(self) -> Tensor | None:
        """The memory that was edited, if it is in use still."""
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        if storage is None:
            return None
        dtype, *place = self._place
        return torch.empty(0, dtype=dtype, device=storage.device).set_(storage, *place)

    def _undo_in(self, t: Tensor) -> bool:
        if type(t) not in (Tensor, nn.Parameter) or t.shape != self._place[2]:  # quantised or split by now
            return False
        index, before, after = self.index.to(t.device), self._before.to(t), self._after().to(t)
        now = t.index_select(self.dim, index)
        ours = (now == after) | (now.isnan() & after.isnan())
        t.index_copy_(self.dim, index, torch.where(ours, before, now))
        return bool((ours | (now == before)).all())  # the second: its checkpoint was loaded once more


class Fold(Path):
    """Changes rows (output side) or columns (input side) of the weights in place; no run-time cost.

    y = W x + b, scaled at the output:  W[I] *= 1 + gamma;  b[I] *= 1 + gamma
    scaled at the input:                W[:, I] *= 1 + gamma
    less a direction d at the output:   W[I] -= alpha d (d . W[I]);  b[I] -= alpha d (d . b[I])
    less a direction d at the input:    W[:, I] -= alpha (W[:, I] d) d

    A mixture of experts is y = sum_e r_e (W_e x_e + b_e), r_e the router's or a gate's: changed at the output if every
    W_e and b_e is.
    """

    name = "fold"

    def __init__(self, site: Site, table: Table, parts: Sequence[nn.Module]):
        super().__init__(site, table, parts[0])
        self.calls = None
        self.edit = self
        self.parts = tuple(parts)
        self._names = [weights_of(part) for part in parts]  # now: a module's class may be another on leaving
        self._edits: list[Edit] = []

    def edited(self) -> list[tuple[nn.Module, list[str]]]:
        return [(part, [name for name, _ in tensors]) for part, tensors in self._tensors()]

    @torch.no_grad()
    def attach(self) -> None:
        for part, tensors in self._tensors():
            for name, dim in tensors:
                self._edits.append(Edit(part, name, dim, self.table))
        torch.clear_autocast_cache()  # a copy of the weight as it was may be in it

    @torch.no_grad()
    def detach(self) -> None:
        """Raises SteeringError where steered weights were changed (trained, say), and so are none to restore."""
        edits, self._edits = self._edits, []
        changed = [edit.name for edit in reversed(edits) if not edit.undo()]
        torch.clear_autocast_cache()
        if changed:
            raise SteeringError(
                f"{changed[0]}: found other values than those that steering wrote (they were trained, loaded or "
                "replaced inside the block), expected them to be left alone; what was changed stays as it is. Change "
                "the model before steering it, or use mode='columns'"
            )

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return self.parts

    def _tensors(self) -> Iterator[tuple[nn.Module, list[tuple[str, int]]]]:
        """What is changed of each part: names of parameters, and their dimensions that count the AUs."""
        for part, weights in zip(self.parts, self._names):
            assert isinstance(weights, WeightNames)  # why_not_fold refuses all else
            tensors = [(weights.weight, getattr(weights, self.site.side))]
            if weights.bias and part._parameters[weights.bias] is not None and self.site.side == "output":
                tensors.append((weights.bias, -1))
            yield part, tensors


def why_not_fold(model: nn.Module, site: Site, operation: str, sharing: Sharing) -> str | None:
    """The reason why steering cannot be folded into the weights at a site, or None if it is exact and possible.

    Args:
        sharing: of the model.
    """
    if operation == "shift":
        return "shift changes no weight"
    if reason := why_no_edit(model, site, operation) or why_frozen() or why_in_training(model, site):
        return reason
    for path in site.parts:
        reason = _why_not_part(model.get_submodule(path), site, sharing) or why_not_between(model, site, path)
        if reason is not None:
            return reason if len(site.parts) == 1 else f"{path}: {reason}"
    return None


def _why_not_part(module: nn.Module, site: Site, sharing: Sharing) -> str | None:
    weights = weights_of(module)
    assert isinstance(weights, WeightNames)  # why_no_edit refuses all else
    if is_offloaded(module):
        return "the weight is offloaded"
    for name in filter(None, (weights.weight, weights.bias)):
        if reason := why_not_parameter(module, name, sharing):
            return reason
    weight, dim = module._parameters.get(weights.weight), getattr(weights, site.side)
    if weight is None or weight.shape[dim : dim + 1] != (site.width,):  # sharded, say
        return f"the weight is {tuple(weight.shape) if weight is not None else None}, for {site.width} AUs"
    return None
