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

from ..momentum.momentum import Momentum
from .arm import Arm
from .residual import layers_of, vector_plan


def caa_arms(momentum: Momentum, layers: Sequence[int] | None = None) -> Iterator[Arm]:
    """An arm for each layer.

    Args:
        layers: decoder layers from 0; by default ten of the measured ones, evenly spread.

    Raises:
        SelectionError: a layer that was not measured.
    """
    for layer in layers_of("caa", momentum, layers):
        plan = vector_plan(momentum, layer)
        yield Arm("caa", plan, len(plan), f"layer {layer}")
