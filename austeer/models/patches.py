"""A function in place of one module's forward, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import SteeringError


class Patch:
    """Replaces the forward of one module instance. ``attach`` and ``detach`` are exact opposites.

    Under accelerate's hooks it goes in place of what they call (``_old_forward``), so that an offloaded weight is there
    when it runs; hooks that come or go later find it, and pass it on, as they would the module's own forward.

    Attributes:
        inner: what the module ran before, for the replacement to call.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.inner: Callable[..., Any] = module.forward
        self._ours: Callable[..., Any] | None = None
        self._was_set = False

    def attach(self, forward: Callable[..., Any]) -> None:
        values, name = vars(self.module), _place_of_forward(self.module)
        self._was_set = name in values
        self.inner, self._ours = own_forward(self.module), forward
        values[name] = forward

    def detach(self) -> None:
        """Does nothing where nothing is attached.

        Raises:
            SteeringError: someone wrapped or replaced our forward; the module is left as it is then.
        """
        if self._ours is None:
            return
        ours, self._ours, values = self._ours, None, vars(self.module)
        for name in ("forward", "_old_forward"):
            if values.get(name) is ours:
                if name == "forward" and not self._was_set:
                    del values[name]
                else:
                    values[name] = self.inner
                return
        raise SteeringError(
            f"{type(self.module).__name__}: found another forward in place of ours, so it may not have been steered "
            "since; expected changes of a forward to be made before steering"
        )


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """What a module runs in the end, under accelerate's hooks; equal until somebody puts another in its place."""
    return getattr(module, _place_of_forward(module))


def _place_of_forward(module: nn.Module) -> str:
    return "_old_forward" if "_hf_hook" in vars(module) and "_old_forward" in vars(module) else "forward"


def owner_of(module: nn.Module, kind: type) -> Any:
    """The object of this kind whose method runs as the module's forward; None if there is none."""
    for name in ("forward", "_old_forward"):
        owner = getattr(vars(module).get(name), "__self__", None)
        if isinstance(owner, kind):
            return owner
    return None
