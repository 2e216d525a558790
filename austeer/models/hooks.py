"""Putting an accelerate hook on a module, and taking exactly that one off again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from accelerate.hooks import ModelHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from torch import nn

from ..errors import SteeringError


class Hook(ModelHook):
    """A hook that knows whether it is on a module: accelerate takes it off and on again as it chains others to it."""

    def __init__(self) -> None:
        self.bound = False

    def init_hook(self, module: nn.Module) -> nn.Module:
        self.bound = True
        self.bind(module)
        return module

    def detach_hook(self, module: nn.Module) -> nn.Module:
        if self.bound:
            self.release(module)
        self.bound = False
        return module

    def bind(self, module: nn.Module) -> None:
        """Called when it is put on the module."""

    def release(self, module: nn.Module) -> None:
        """Called when it is taken off."""


class Attachment:
    """One hook on one module. ``attach`` and ``detach`` are exact opposites; ``detach`` may be called at any time."""

    def __init__(self, module: nn.Module, hook: Hook):
        self.module, self.hook = module, hook
        self._had_forward = "forward" in vars(module)

    def attach(self) -> None:
        add_hook_to_module(self.module, self.hook, append=True)

    def detach(self) -> None:
        """Raises SteeringError where another hook has replaced ours, which did not run; no trace is left even so."""
        if self.hook not in hooks_on(self.module):
            if self.hook.bound:
                self.hook.detach_hook(self.module)
                raise SteeringError(
                    f"{type(self.module).__name__}: found another accelerate hook in place of ours, so it was not "
                    "steered since; expected hooks to be added with append=True"
                )
            return
        rest = _without(cast(ModelHook, self.module._hf_hook), self.hook)
        if rest is not None:
            # Removing accelerate's own hook would load offloaded weights back: take out ours only.
            self.hook.detach_hook(self.module)
            self.module._hf_hook = rest
            return
        remove_hook_from_module(self.module)
        if not self._had_forward:
            # accelerate leaves the original bound method in the instance; without it the class's serves again
            vars(self.module).pop("forward", None)


def hooks_on(module: nn.Module) -> Iterator[ModelHook]:
    """Every accelerate hook of a module, however deep they are chained; the chains themselves, too."""
    waiting = [getattr(module, "_hf_hook", None)]
    while waiting:
        hook = waiting.pop()
        if hook is not None:
            waiting += getattr(hook, "hooks", ())
            yield hook


def is_hooked(module: nn.Module, kind: type[ModelHook]) -> bool:
    """Whether a hook of this kind is on the module, alone or in a chain."""
    return any(isinstance(hook, kind) for hook in hooks_on(module))


def _without(hook: ModelHook, ours: ModelHook) -> ModelHook | None:
    """``hook`` with ``ours`` taken out of it, however deep accelerate has chained it; None if nothing is left."""
    if hook is ours:
        return None
    if not isinstance(hook, SequentialHook):
        return hook
    rest = [kept for kept in (_without(inner, ours) for inner in hook.hooks) if kept is not None]
    return SequentialHook(*rest) if len(rest) > 1 else rest[0] if rest else None
