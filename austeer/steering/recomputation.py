"""Activation checkpointing: what is computed anew in the backward pass must be steered as it was in the forward pass.

Between the two alpha may change and the block may end, and then the gradients are another model's. Only the autograd
graph remembers the forward pass, by the function that it will run again. So while a model is steered, the functions
that checkpoint its modules hand on a function which knows how things were when it was made, and refuses to run when
they are different. It costs nothing where nothing is checkpointed.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.utils import checkpoint

from ..errors import SteeringError
from ..models.sites import Site

#: What modules call their checkpointing function: Transformers' layers, and PyTorch's CheckpointWrapper (FSDP).
_NAMES = ("_gradient_checkpointing_func", "checkpoint_fn")

#: ``known``: whether this thread is inside a checkpointed function that is watched.
_thread = threading.local()


class Recomputation:
    """Watches the checkpointed modules of a decoder.

    Attributes:
        state: another number after each change of what steering does.
    """

    def __init__(self, decoder: nn.Module):
        self._decoder = decoder
        self.state = 0

    def attach(self) -> None:
        self.changed()
        for module in self._decoder.modules():
            for name in _NAMES:
                if name in vars(module):
                    vars(module)[name] = Watched(vars(module)[name], self)

    def detach(self) -> None:
        self.changed()
        for module in self._decoder.modules():
            for name in _NAMES:
                found = vars(module).get(name)
                if isinstance(found, Watched) and found.owner is self:
                    vars(module)[name] = found.function

    def changed(self) -> None:
        """What was run before would come out differently now."""
        self.state += 1


class Watched:
    """A module's checkpointing function, which runs functions now and once more in the backward pass."""

    def __init__(self, function: Callable, owner: Recomputation):
        self.function, self.owner = function, owner

    @torch._disable_dynamo  # a graph would hold the state as a constant, and be compiled again after each change
    def __call__(self, run: Callable, *args, **kwargs):
        return self.function(partial(_run, run, self.owner, self.owner.state), *args, **kwargs)


def _run(run: Callable, owner: Recomputation, state: int, *args, **kwargs):
    """``run``, where steering is what it was in the forward pass."""
    if owner.state != state:
        raise SteeringError(
            "activation checkpointing: found a layer to be computed anew in the backward pass, and alpha, k or the "
            "steering itself is not what it was in the forward pass; expected backward() inside the block and before "
            "such a change, or model.gradient_checkpointing_disable()"
        )
    before = getattr(_thread, "known", False)
    _thread.known = True
    try:
        return run(*args, **kwargs)
    finally:
        _thread.known = before


def expect_watched(site: Site) -> None:
    """To be called where a site runs in training or with gradients.

    Raises:
        SteeringError: this is, or will be, a recomputation by a checkpoint that is not watched: of a forward pass
            before the block, or by a function that is no module's.
    """
    if getattr(_thread, "known", False):
        return
    if torch._C._current_graph_task_id() != -1 or _is_checkpointed():
        raise SteeringError(
            f"activation checkpointing at site {site.name!r} of layer {site.layer} ({site.path}): found a checkpoint "
            "that steering does not know of, or a forward pass before the block, and its recomputation might be "
            "steered otherwise; expected model.gradient_checkpointing_enable() before the block in place of "
            "torch.utils.checkpoint, and forward and backward inside it"
        )


def _is_checkpointed() -> bool:
    """Whether ``torch.utils.checkpoint`` is among the callers: nothing else shows it, where it is re-entrant."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename == checkpoint.__file__:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def is_recomputed(decoder: nn.Module) -> bool:
    """Whether parts of a forward pass now would be computed anew in its backward pass."""
    if not torch.is_grad_enabled():
        return False
    return any(
        "checkpoint_fn" in vars(module) or (module.training and getattr(module, "gradient_checkpointing", False))
        for module in decoder.modules()
    )
