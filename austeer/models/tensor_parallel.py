"""Which atomic units a process holds where a model is split over several (tensor parallelism).

Transformers (``DistributedConfig(tp_plan="auto")``, 5.17 to 5.23 alike) makes each weight of a parallel layer a DTensor
and replaces the layer's forward. The inputs of the attention output projection and of the down projection, which are
the sites ``attention`` and ``neuron``, are then this process's slice only; ``ffn`` and ``layer`` are whole everywhere.
``in_features`` stays the whole width, so sites, plans and fingerprints are those of the model in one piece.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from ..errors import SteeringError
from .sites import Site
from .structure import base_of

#: Styles of Transformers' plans under which a row-wise layer receives its whole input and takes its slice itself.
_SPLIT_INSIDE = ("rowwise_split_input", "rowwise_rep")


def held(model: nn.Module, site: Site) -> range | None:
    """The atomic units of ``site`` in this process's tensor, or None if it holds them all.

    Raises:
        SteeringError: they are interleaved, so they are no range.
    """
    if site.side != "input":
        return None
    module = model.get_submodule(site.path)
    weight: Any = getattr(getattr(module, "base_layer", module), "weight", None)  # base_layer: inside PEFT's wrapper
    if not is_split(weight) or _style(model, site.path) in _SPLIT_INSIDE:
        return None
    start, stop = 0, site.width
    whole = True
    for dimension, placement in enumerate(weight.placements):
        if getattr(placement, "dim", None) not in (weight.ndim - 1, -1):
            continue  # replicated, or cut along the outputs (FSDP), which gathers before the layer runs
        if hasattr(placement, "split_factor"):
            raise SteeringError(
                f"{site.path}: found a weight placed as {placement}, expected a contiguous slice for each process; "
                "load the model with tp_plan rules 'rowwise' for it"
            )
        parts = weight.device_mesh.size(dimension)
        size = -((start - stop) // parts)  # as torch.chunk cuts: the last parts may be shorter, or empty
        start = min(stop, start + size * weight.device_mesh.get_local_rank(dimension))
        stop = min(stop, start + size)
        whole = False
    return None if whole else range(start, stop)


def is_split(parameter: object) -> bool:
    """Whether a parameter is a DTensor: one slice of it for each process of a mesh."""
    return hasattr(parameter, "device_mesh") and hasattr(parameter, "placements")


def _style(model: nn.Module, path: str) -> str | None:
    """What Transformers' plan for tensor parallelism says of a module; its names may leave out a prefix of the path."""
    plan = getattr(base_of(model), "tp_plan", None) or {}
    names = re.sub(r"\.\d+(?=\.|$)", ".*", path).split(".")
    return next((plan[name] for name in (".".join(names[i:]) for i in range(len(names))) if name in plan), None)
