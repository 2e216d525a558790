"""The bias path: a shift written into the bias of a linear layer, where the product's own epilogue adds it.

    y = W x + b, shifted by s at the output:  b + s
    shifted by s at the input:                b + W s
    shifted by s after y, times c, was added to a residual stream:  b + s / c

A layer without a bias gets one for the time: a buffer that is in no state dict and that an offloading hook leaves
alone. It is kept from block to block, so that compiled and captured graphs find it where it was. A bias that a layer
has is changed in place. Several contributions in one layer add up, and are rounded once.
"""

from __future__ import annotations

import warnings
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from austeer_kernels import reference

from ..errors import SteeringError, SteeringWarning
from ..models.hooks import hooks_on
from ..models.linear import FLOATING, WeightNames, bias_of_shift, bias_owner, sizes, weights_of
from ..models.projection import why_not_own_code
from ..models.sites import Site
from ..models.structure import floating_dtype, input_device
from ..plans.fit import why_no_edit
from .editable import is_offloaded, warn_of_gradients, why_frozen, why_in_training, why_not_between, why_not_parameter
from .path import Path
from .sharing import Sharing, is_marked
from .tables import StrengthTable


class Slot:
    """The bias of one module: what it was, and what is added to it. It does not keep the module alive.

    Attributes:
        parts: what each path adds, [out], in the dtype that the sum is made in.
    """

    def __init__(self) -> None:
        self.parts: dict[int, Tensor] = {}
        self._made: Tensor | None = None  # ours, of a module that has none
        self._saved: Tensor | None = None  # of a module that has one: its values
        self._order: list[str] = []
        self._written: tuple[Tensor, Tensor] | None = None  # the tensor, and its values after our last edit

    def write(self, module: nn.Module, like: Tensor) -> None:
        """Sets the module's bias to what it was and the sum of the parts, in place.

        Args:
            like: from :meth:`kept`; it becomes the bias of a module that has none.
        """
        if self._written is None:
            self._begin(module, like)
        bias = self._follow(module)
        total = sum(part.to(bias.device) for part in self.parts.values())
        if self._saved is not None:
            total = self._saved.to(bias.device, reference.compute_dtype(bias.dtype)) + total
        bias.copy_(total)  # type: ignore[arg-type]
        self._remember(bias)

    def kept(self, like: Tensor) -> Tensor:
        """The bias that was made for the module before, if it is one such as ``like``; otherwise that."""
        made = self._made
        if made is None or (made.shape, made.dtype, made.device) != (like.shape, like.dtype, like.device):
            return like
        return made

    def restore(self, module: nn.Module) -> None:
        """Gives the module back the bias it had, or none.

        Raises:
            SteeringError: the bias is another one by now, which stays; or one of ours was changed, which is lost.
        """
        if self._written is None:
            return
        ours, problem = self._written[0], None
        try:
            bias = self._follow(module)
        except SteeringError as error:
            problem = error
        saved, self._saved, self._written = self._saved, None, None
        if saved is None:
            if problem is None or module._buffers.get("bias") is None or module._buffers["bias"] is ours:
                self._take_back(module)
        elif problem is None:
            bias.copy_(saved)
            torch.clear_autocast_cache()
        if problem is not None:
            raise problem

    def _begin(self, module: nn.Module, like: Tensor) -> None:
        bias: Tensor | None = module._parameters.get("bias")
        if bias is None:
            self._made = bias = like
            # A parameter would be offloaded and be in the state dict, and one that is None hides a buffer of its name.
            self._order = list(module._parameters)
            module._parameters.pop("bias", None)
            module._buffers["bias"] = like
            module._non_persistent_buffers_set.add("bias")
        else:
            self._saved = bias.detach().clone()
        self._remember(bias)

    def _take_back(self, module: nn.Module) -> None:
        """Removes a bias of ours; a module to which someone gave another one by now keeps that."""
        module._buffers.pop("bias", None)
        module._non_persistent_buffers_set.discard("bias")
        if "bias" in module._parameters:
            return
        module._parameters["bias"] = None
        for name in self._order:  # as they were
            if name in module._parameters:  # pruning has renamed the weight, say
                module._parameters[name] = module._parameters.pop(name)

    def _follow(self, module: nn.Module) -> Tensor:
        """The module's bias, with what was done to it since our last edit taken into account.

        Values are compared, as a change of ``bias.data`` shows in nothing else.

        Raises:
            SteeringError: the bias is another one, or a bias of ours was changed.
        """
        assert self._written is not None
        before, values = self._written
        bias = (module._buffers if self._saved is None else module._parameters).get("bias")
        if bias is not None and bias.shape == values.shape and bias.device.type != "meta":
            moved = values.to(bias.device, bias.dtype)  # the model may have been moved or cast
            if torch.equal(bias, moved):
                return bias
            same = (bias == moved) | (bias.isnan() & moved.isnan())
            if bool(same.all()):
                return bias
            if bias is before and self._saved is not None:
                wide = reference.compute_dtype(bias.dtype)
                saved = self._saved.to(bias.device, wide)
                if not torch.equal(bias, saved.to(bias.dtype)):  # else its checkpoint was loaded once more
                    # A training step: it stays.
                    self._saved = torch.where(same, saved, saved + (bias.to(wide) - moved.to(wide))).to(bias.dtype)
                return bias
        raise SteeringError(
            f"{type(module).__name__}: found another bias than the one that steering wrote (it was set or changed "
            "inside the block), expected it to be left alone; change the model before steering it, or use "
            "mode='columns'"
        )

    def _remember(self, bias: Tensor) -> None:
        torch.clear_autocast_cache()  # a copy of the bias as it was may be in it
        self._written = bias, bias.detach().clone()


#: Kept from block to block, for the address of what was made.
_slots: WeakKeyDictionary[nn.Module, Slot] = WeakKeyDictionary()


class Bias(Path):
    """A shift in the bias of a linear layer; no run-time cost.

    Args:
        module: the linear layer, inside an adapter's wrapper.
        like: of the bias that it would have, see :func:`bias_like`.
    """

    name = "bias"

    def __init__(self, site: Site, table: StrengthTable, module: nn.Module, like: Tensor):
        super().__init__(site, table, module)
        self.calls = None
        self.edit = self
        self.like = like
        self._hook: RemovableHandle | None = None
        self._warned = False
        self._unit: tuple[tuple, Tensor] | None = None  # k and the weight's state, and what alpha = 1 adds

    def edited(self) -> list[tuple[nn.Module, list[str]]]:
        return [(self.module, ["bias"])]

    def attach(self) -> None:
        self.refresh()
        weight = self.module._parameters.get("weight")
        if self.site.side == "input" and weight is not None and weight.requires_grad:
            self._hook = weight.register_hook(self._warn)

    @torch.no_grad()
    def refresh(self) -> None:
        """Writes the strengths that the table has now."""
        slot = _slots.setdefault(self.module, Slot())
        self.like = slot.kept(self.like)
        slot.parts[id(self)] = self.added()
        slot.write(self.module, self.like)

    @torch.no_grad()
    def detach(self) -> None:
        slot = _slots.get(self.module)
        if slot is None or slot.parts.pop(id(self), None) is None:
            return
        weight = self.module._parameters.get("weight")
        if self.site.side == "input" and weight is not None:
            wanted = self._hook is not None
            if self._hook is not None:
                self._hook.remove()
                self._hook = None
            warn_of_gradients(weight, f"{self.site.bias}.weight", wanted, self._warned)
            if self._changed(weight):
                warnings.warn(
                    f"{self.site.bias}.weight: found a weight that was changed inside the block, whose product with "
                    "the shift is in the bias as it was before; change the model before steering it",
                    SteeringWarning,
                    stacklevel=2,
                )
        if not slot.parts:  # the last of what is on the module
            slot.restore(self.module)

    def _changed(self, weight: Tensor) -> bool:
        """Whether the values of the weight, where it was, are others than those of the product."""
        if self._unit is None or weight.device.type == "meta":
            return False
        (_, address, version), now = self._unit[0], state_of(weight)
        return address == now[0] and version != now[1]

    def _warn(self, gradient: Tensor) -> None:
        """Called with the gradient of a weight that reads the site."""
        self._warned = True
        warnings.warn(
            f"{self.site.bias}.weight: its gradient lacks the part of the shift, which is in the bias; for "
            "gradients of weights use mode='columns'",
            SteeringWarning,
            stacklevel=2,
        )

    @torch.no_grad()
    def added(self) -> Tensor:
        """What it adds to the layer's output, [out], in the dtype that the sum is made in."""
        entry, wide = self.table.entries[0], reference.compute_dtype(self.like.dtype)
        if self.like.device.type == "cpu":
            wide = torch.float64
        alpha, k = self.table.given[entry.plan]
        if self.site.side == "output":
            shift = entry.strengths(alpha, k)[1].to(self.like.device, wide) / self.site.bias_factor
            return bias_of_shift(entry.index, shift, len(self.like))
        if self.like.dtype == torch.float64:  # in which alpha * delta, a float32 product, differs from an exact one
            return self._product(entry.index, entry.strengths(alpha, k)[1], wide)
        weight = self.module._parameters["weight"]
        assert weight is not None  # why_not_bias refuses it
        if weight.device.type == "meta" and self._unit is not None:  # it was offloaded in the meantime
            state = k, *self._unit[0][1:]
        else:
            state = k, *state_of(weight)
        if self._unit is None or self._unit[0] != state:
            self._unit = state, self._product(entry.index, entry.strengths(1.0, k)[1], wide)
        unit = self._unit[1]
        return alpha * unit if alpha else torch.zeros_like(unit)  # 0 * inf is NaN

    def _product(self, index: Tensor, shift: Tensor, wide: torch.dtype) -> Tensor:
        """W[:, index] @ shift"""
        weights = weights_of(self.module)
        assert isinstance(weights, WeightNames)  # why_not_bias refuses all else
        weight = self.module._parameters[weights.weight]
        assert weight is not None
        return bias_of_shift(index, shift.to(wide), len(self.like), weight, weights.input)


def state_of(weight: Tensor) -> tuple[int, int]:
    """What is another where the values of a parameter may be, but for a change of what is in ``.data``."""
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version


def bias_like(model: nn.Module, module: nn.Module, outputs: int) -> Tensor:
    """The bias that a linear layer has, or one for it, of its size, in its dtype, where it runs."""
    bias, weight = module._parameters.get("bias"), module._parameters.get("weight")
    if bias is not None:
        return bias.detach()
    device = input_device(model) if weight is None else weight.device
    if device.type == "meta":  # it is loaded to where it runs
        found = (getattr(hook, "execution_device", None) for hook in hooks_on(module))
        device = torch.device(next((place for place in found if place is not None), input_device(model)))
    # A quantised weight's is that of what it is packed in.
    plain = type(weight) is nn.Parameter and weight.dtype in FLOATING
    dtype = weight.dtype if plain else floating_dtype(model)  # type: ignore[union-attr]
    with torch.inference_mode(False):  # an inference tensor could not be written outside of that mode
        return torch.zeros(outputs, dtype=dtype, device=device)


def why_not_bias(model: nn.Module, site: Site, operation: str, sharing: Sharing) -> str | None:
    """The reason why steering at a site cannot be written into a bias, or None if it is exact and possible.

    Args:
        sharing: of the model.
    """
    if operation != "shift":
        return f"{operation} is no addition"
    if reason := why_no_edit(model, site, operation) or why_frozen() or why_in_training(model, site):
        return reason
    module = model.get_submodule(str(site.bias))
    owner = bias_owner(module, site.side)
    assert isinstance(owner, nn.Module)  # why_no_edit refuses all else
    if is_marked(owner):
        return "it is steered already (another model shares it, or the model was copied while it was steered)"
    path = str(site.bias) if owner is module else f"{site.bias}.base_layer"
    if reason := why_not_parameter(owner, "bias", sharing) or why_not_between(model, site, path):
        return reason
    bias, outputs = owner._parameters.get("bias"), sizes(owner)
    if bias is not None and outputs is not None and bias.shape != outputs[1:]:  # sharded, say
        return f"the bias is {tuple(bias.shape)}, for {outputs[1]} outputs"
    if sharing.places(owner) > 1:
        return "the layer that has the bias is in several places of the model"
    if site.side == "input":
        return why_not_weight(owner, site) or why_not_own_code(model, site, str(site.bias))
    if site.projection:
        return None
    if any(module.training for module in model.get_submodule(site.path).modules()):
        return "dropout may follow the projection in training"
    return why_not_own_code(model, site, str(site.bias))


def why_not_weight(module: nn.Module, site: Site) -> str | None:
    """Why W s cannot be had, or would not be all that the shift of an input does."""
    weight, names = module._parameters.get("weight"), weights_of(module)
    assert isinstance(names, WeightNames)
    if weight is None:
        return "the weight is made anew at each forward pass (pruning, weight normalisation ...)"
    if weight.device.type == "meta" or is_offloaded(module):
        return "the weight is offloaded"
    if not weight.is_floating_point():
        return f"the weight is {weight.dtype}"
    if weight.dim() != 2 or weight.shape[names.input] != site.width:  # sharded, say
        return f"the weight is {tuple(weight.shape)}, for {site.width} AUs"
    return None
