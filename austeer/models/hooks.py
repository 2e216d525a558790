"""The accelerate hooks of a module."""

from __future__ import annotations

from collections.abc import Iterator

from accelerate.hooks import ModelHook
from torch import nn


def hooks_on(module: nn.Module) -> Iterator[ModelHook]:
    """Every accelerate hook of a module, however deep they are chained; the chains themselves, too."""
    waiting = [getattr(module, "_hf_hook", None)]
    while waiting:
        hook = waiting.pop()
        if hook is not None:
            waiting += getattr(hook, "hooks", ())
            yield hook
