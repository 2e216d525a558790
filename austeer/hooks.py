"""Putting an accelerate hook on a module, and taking exactly that one off again."""

from __future__ import annotations

from accelerate.hooks import ModelHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from torch import nn


class Attachment:
    """One hook on one module. ``attach`` and ``detach`` are exact opposites; ``detach`` may be called at any time."""

    def __init__(self, module: nn.Module, hook: ModelHook):
        self.module, self.hook = module, hook
        self._had_forward = "forward" in vars(module)

    def attach(self) -> None:
        add_hook_to_module(self.module, self.hook, append=True)

    def detach(self) -> None:
        found = getattr(self.module, "_hf_hook", None)
        if found is None or not _contains(found, self.hook):
            return
        rest = _without(found, self.hook)
        if rest is not None:
            # Removing accelerate's own hook would load offloaded weights back: take out ours only.
            self.hook.detach_hook(self.module)
            self.module._hf_hook = rest
            return
        remove_hook_from_module(self.module)
        if not self._had_forward:
            # accelerate leaves the original bound method in the instance; without it the class's serves again
            vars(self.module).pop("forward", None)


def _contains(hook: ModelHook, ours: ModelHook) -> bool:
    return hook is ours or (isinstance(hook, SequentialHook) and any(_contains(h, ours) for h in hook.hooks))


def _without(hook: ModelHook, ours: ModelHook) -> ModelHook | None:
    """``hook`` with ``ours`` taken out of it, however deep accelerate has chained it; None if nothing is left."""
    if hook is ours:
        return None
    if not isinstance(hook, SequentialHook):
        return hook
    rest = [kept for kept in (_without(inner, ours) for inner in hook.hooks) if kept is not None]
    return SequentialHook(*rest) if len(rest) > 1 else rest[0] if rest else None
