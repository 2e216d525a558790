"""A decoder without its upper layers, for a while: what is not asked for is not run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .sites import unwrap


@contextmanager
def first_layers(model: nn.Module, path: str, count: int) -> Iterator[None]:
    """The model with the first ``count`` entries of the module list at ``path``; afterwards as it was."""
    parent, _, name = path.rpartition(".")
    owner = unwrap(model).get_submodule(parent)
    layers = owner._modules[name]
    assert layers is not None
    if count >= len(layers._modules):
        yield
        return
    fewer = nn.ModuleList()
    fewer.training = layers.training
    fewer._modules = dict(list(layers._modules.items())[:count])  # type: ignore[arg-type]
    owner._modules[name] = fewer
    try:
        yield
    finally:
        owner._modules[name] = layers
