"""Steering without this library: the formula, the public code's arithmetic, and the hooks that PyTorch users write."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from austeer import Plan
from austeer.errors import PlanError
from austeer.models.sites import Site, find_sites
from austeer.models.structure import input_device
from austeer.plans.table import BY_UNIT

from .steered import Steered, Way


@dataclass(frozen=True)
class Strength:
    """What a plan does at one layer's site.

    Attributes:
        index: the AUs, int64 [count]. value: alpha * beta, or alpha * delta of the operation "shift"; float32 [count].
    """

    site: Site
    operation: str
    index: Tensor
    value: Tensor

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The value of every AU of the layer, 0 where the plan has none: [width]."""
        vector = torch.zeros(self.site.width, dtype=torch.float64, device=self.value.device)
        return vector.index_copy_(0, self.index, self.value.double()).to(dtype)

    def formula(self, x: Tensor) -> Tensor:
        """The definition: x + value * x ("scale"), x + value * |x| ("push"), x + value ("shift"), in x's dtype."""
        value = self.dense(x.dtype)
        return (
            x + {"scale": lambda: value * x, "push": lambda: value * x.abs(), "shift": lambda: value}[self.operation]()
        )


def strengths(model: nn.Module, plan: Plan, alpha: float) -> Iterator[Strength]:
    """One for every layer of the plan's site, also for those that have no AU.

    Raises:
        PlanError: an operation on a layer's AUs together.
    """
    device, operation = input_device(model), plan.operation
    if operation not in BY_UNIT:
        raise PlanError(
            f"operation: found {operation!r}, expected one of {', '.join(BY_UNIT)}: what it is compared with works on "
            "each AU by itself"
        )
    for site in find_sites(model, plan.sites)[plan.sites[0]]:
        rows = plan.layer == site.layer
        values = plan.delta if operation == "shift" else plan.beta
        yield Strength(site, operation, plan.index[rows].long().to(device), (alpha * values[rows]).to(device))


def hook(model: nn.Module, site: Site, steer: Callable[[Tensor], Tensor]) -> None:
    """``steer`` as a PyTorch hook on the module's first input or on its output."""
    module = model.get_submodule(site.path)
    if site.side == "input":
        module.register_forward_pre_hook(lambda _, args: (steer(args[0]), *args[1:]))
    else:
        module.register_forward_hook(lambda _, args, output: _on_output(output, steer))


def _on_output(output: Any, steer: Callable[[Tensor], Tensor]) -> Any:
    return (steer(output[0]), *output[1:]) if isinstance(output, tuple) else steer(output)


class Hooked(Steered):
    """A PyTorch hook at each layer that has AUs; how it steers is the subclass's."""

    def __init__(self, model: nn.Module, plan: Plan, alpha: float):
        super().__init__(model)
        for strength in strengths(model, plan, alpha):
            if len(strength.index):
                hook(model, strength.site, self.steering(strength, model.dtype))  # type: ignore[arg-type]

    @staticmethod
    def steering(strength: Strength, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        raise NotImplementedError


class Formula(Hooked):
    """The definition in plain PyTorch, computed in at least float32 and rounded once."""

    @staticmethod
    def steering(strength: Strength, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        return lambda x: strength.formula(x if x.dtype == torch.float64 else x.float()).to(x.dtype)


class Public(Steered):
    """The public code's arithmetic, written into the forward passes as there: multiply, add, copy, at every layer."""

    def __init__(self, model: nn.Module, plan: Plan, alpha: float):
        super().__init__(model)
        for strength in strengths(model, plan, alpha):
            module = model.get_submodule(strength.site.path)
            forward = self._forward(module.forward, strength, strength.dense(model.dtype))  # type: ignore[arg-type]
            module.forward = MethodType(forward, module)  # type: ignore[method-assign]

    @staticmethod
    def _forward(original: Callable[..., Any], strength: Strength, value: Tensor) -> Callable[..., Any]:
        steer: Callable[[Tensor], Tensor] = {
            "scale": lambda x: x.copy_(x + value * x),
            "push": lambda x: x.copy_(x + value * x.abs()),
            "shift": lambda x: x.copy_(x + value),
        }[strength.operation]
        if strength.site.side == "input":
            return lambda _, x, *args, **options: original(steer(x), *args, **options)
        return lambda _, *args, **options: _on_output(original(*args, **options), steer)


class DenseHook(Hooked):
    """A PyTorch hook that changes the whole width in place, with one operation (two of "push")."""

    @staticmethod
    def steering(strength: Strength, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        value = strength.dense(dtype)
        factor = (1 + strength.dense(torch.float64)).to(dtype)
        return {
            "scale": lambda x: x.mul_(factor),
            "push": lambda x: x.addcmul_(x.abs(), value),
            "shift": lambda x: x.add_(value),
        }[strength.operation]


class SparseHook(Hooked):
    """A PyTorch hook that changes the AUs by advanced indexing."""

    @staticmethod
    def steering(strength: Strength, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        index, value, factor = strength.index, strength.value.to(dtype), (1 + strength.value).to(dtype)
        of_selected: Callable[[Tensor], Tensor] = {
            "scale": lambda x: x.mul_(factor),
            "push": lambda x: x.addcmul_(x.abs(), value),
            "shift": lambda x: x.add_(value),
        }[strength.operation]

        def steer(x: Tensor) -> Tensor:
            x[..., index] = of_selected(x[..., index])
            return x

        return steer


UNSTEERED, AGAIN, PUBLIC = "unsteered", "unsteered again", "public"
WAYS = (
    Way(UNSTEERED, lambda model, plan, alpha: Steered(model)),
    Way(AGAIN, lambda model, plan, alpha: Steered(model)),
    Way(PUBLIC, Public),
    Way("dense hook", DenseHook),
    Way("sparse hook", SparseHook),
)
