"""Vectors of the residual stream: all AUs of one decoder layer at the site "layer", shifted together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import SelectionError
from ..momentum.momentum import Momentum
from ..momentum.selection import plan_of
from ..plans.plan import Plan

SITE = "layer"

#: So many layers are tried unless they are named.
LAYERS = 10


def layers_of(method: str, momentum: Momentum, layers: Sequence[int] | None, count: int = LAYERS) -> list[int]:
    """The layers that are asked for; by default ``count`` of the measured ones, evenly spread.

    Raises:
        SelectionError: a layer that was not measured.
    """
    chosen = spread(momentum.layers, count) if layers is None else list(layers)
    for layer in chosen:
        if layer not in momentum.layers:
            raise SelectionError(
                f"method {method!r}: found layer {layer!r}, expected one that was measured: {list(momentum.layers)}"
            )
    return chosen


def spread(layers: Sequence[int], count: int) -> list[int]:
    """At most ``count`` of ``layers``, evenly, away from both ends."""
    count = min(count, len(layers))
    return [layers[(2 * i + 1) * len(layers) // (2 * count)] for i in range(count)]


def vector_plan(momentum: Momentum, layer: int, vector: Tensor | None = None) -> Plan:
    """A plan that shifts a layer's AUs by alpha * ``vector``: [width]; by default the mean difference."""
    width = momentum.counters(SITE).positive.shape[1]
    order = momentum.layers.index(layer) * width + torch.arange(width, device="cpu")
    plan = plan_of(momentum, SITE, order, "shift")
    return plan if vector is None else replace(plan, delta=vector.float())
