"""Contrastive Activation Addition: one vector, the mean difference of the residual stream, at one layer.

Rimsky et al., "Steering Llama 2 via Contrastive Activation Addition" (ACL 2024). With a the residual stream behind
decoder layer L at the last token of a pair's texts, over pairs j:

    v = mean over j of (a_j(positive) - a_j(negative)),    x <- x + alpha * v

which is ``shift`` of all AUs of one layer at site "layer". Ours differs in two ways. The vector is added at all
positions (the paper: at those after the prompt; ``steer(..., scope="generation")`` does that). Activations are read at
the last token of the answer (the paper: at the answer's letter, which in its A/B pairs is the token before the last).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..errors import SelectionError
from ..momentum.momentum import Momentum
from ..momentum.selection import plan_of
from .arm import Arm

SITE = "layer"

#: So many layers are tried unless they are named.
LAYERS = 10


def caa_arms(momentum: Momentum, layers: Sequence[int] | None = None) -> Iterator[Arm]:
    """An arm for each layer.

    Args:
        layers: decoder layers from 0; by default ``LAYERS`` of the measured ones, evenly spread.

    Raises:
        SelectionError: a layer that was not measured.
    """
    width = momentum.counters(SITE).positive.shape[1]
    for layer in spread(momentum.layers, LAYERS) if layers is None else layers:
        if layer not in momentum.layers:
            raise SelectionError(
                f"method 'caa': found layer {layer!r}, expected one that was measured: {list(momentum.layers)}"
            )
        order = momentum.layers.index(layer) * width + torch.arange(width, device="cpu")
        yield Arm("caa", plan_of(momentum, SITE, order, "shift"), width, f"layer {layer}")


def spread(layers: Sequence[int], count: int) -> list[int]:
    """At most ``count`` of ``layers``, evenly, away from both ends."""
    count = min(count, len(layers))
    return [layers[(2 * i + 1) * len(layers) // (2 * count)] for i in range(count)]
