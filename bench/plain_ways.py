"""Steering without this library: the formula, the public code's arithmetic, and the hooks that PyTorch users write."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from austeer import Plan
from austeer.models.sites import Site, find_sites
from austeer.models.structure import input_device

from .steered import Steered, Way


def strengths(model: nn.Module, plan: Plan, alpha: float) -> Iterator[tuple[Site, Tensor, Tensor]]:
    """For every layer of the plan's site: the site, its AUs' indices int64 [count], gamma = alpha * beta float32."""
    device = input_device(model)
    for site in find_sites(model, plan.sites)[plan.sites[0]]:
        rows = plan.layer == site.layer
        yield site, plan.index[rows].long().to(device), (alpha * plan.beta[rows]).to(device)


def dense(site: Site, index: Tensor, gamma: Tensor, dtype: torch.dtype) -> Tensor:
    """gamma of every AU of a layer, 0 where the plan has none: [width]."""
    vector = torch.zeros(site.width, dtype=torch.float64, device=gamma.device)
    return vector.index_copy_(0, index, gamma.double()).to(dtype)


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
        for site, index, gamma in strengths(model, plan, alpha):
            if len(index):
                hook(model, site, self.steering(model, site, index, gamma))

    def steering(self, model: nn.Module, site: Site, index: Tensor, gamma: Tensor) -> Callable[[Tensor], Tensor]:
        raise NotImplementedError


class Formula(Hooked):
    """The definition in plain PyTorch, x + gamma * x, computed in at least float32 and rounded once."""

    def steering(self, model: nn.Module, site: Site, index: Tensor, gamma: Tensor) -> Callable[[Tensor], Tensor]:
        factor = dense(site, index, gamma, torch.float64)

        def steer(x: Tensor) -> Tensor:
            wide = x if x.dtype == torch.float64 else x.float()
            return (wide + factor.to(wide.dtype) * wide).to(x.dtype)

        return steer


class Public(Steered):
    """The public code's arithmetic, written into the forward passes as there: multiply, add, copy, at every layer."""

    def __init__(self, model: nn.Module, plan: Plan, alpha: float):
        super().__init__(model)
        for site, index, gamma in strengths(model, plan, alpha):
            module = model.get_submodule(site.path)
            strength = dense(site, index, gamma, model.dtype)  # type: ignore[arg-type]
            forward = self._forward(module.forward, site.side, strength)
            module.forward = MethodType(forward, module)  # type: ignore[method-assign]

    @staticmethod
    def _forward(original: Callable[..., Any], side: str, strength: Tensor) -> Callable[..., Any]:
        def steer(x: Tensor) -> Tensor:
            return x.copy_(x + strength * x)

        if side == "input":
            return lambda _, x, *args, **options: original(steer(x), *args, **options)
        return lambda _, *args, **options: _on_output(original(*args, **options), steer)


class DenseHook(Hooked):
    """A PyTorch hook that multiplies the tensor in place by 1 + gamma."""

    def steering(self, model: nn.Module, site: Site, index: Tensor, gamma: Tensor) -> Callable[[Tensor], Tensor]:
        factor = (1 + dense(site, index, gamma, torch.float64)).to(model.dtype)  # type: ignore[arg-type]
        return lambda x: x.mul_(factor)


class SparseHook(Hooked):
    """A PyTorch hook that multiplies the AUs by advanced indexing."""

    def steering(self, model: nn.Module, site: Site, index: Tensor, gamma: Tensor) -> Callable[[Tensor], Tensor]:
        factor = (1 + gamma).to(model.dtype)  # type: ignore[arg-type]

        def steer(x: Tensor) -> Tensor:
            x[..., index] *= factor
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
