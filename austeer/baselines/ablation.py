"""Directional ablation: one direction, the mean difference of the residual stream, is removed at one layer.

After Arditi et al., "Refusal in Language Models Is Mediated by a Single Direction" (NeurIPS 2024). With v the mean
difference of the residual stream behind decoder layer L, as in :mod:`austeer.baselines.caa`:

    d = v / |v|,    x <- x - alpha * d (d . x)

which is ``ablate`` of all AUs of one layer at site "layer". Ours differs in three ways. The direction is removed where
it was measured (the paper: behind every layer, attention and MLP, the one that one layer gave). alpha is tuned, as of
all methods (the paper: 1, which removes it). Activations are read at the last token of the answer (the paper: at the
tokens after the instruction, of harmful and harmless ones).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..momentum.momentum import Momentum
from .arm import Arm
from .residual import layers_of, vector_plan


def ablation_arms(momentum: Momentum, layers: Sequence[int] | None = None) -> Iterator[Arm]:
    """An arm for each layer.

    Args:
        layers: decoder layers from 0; by default ten of the measured ones, evenly spread.

    Raises:
        SelectionError: a layer that was not measured.
    """
    for layer in layers_of("ablation", momentum, layers):
        plan = vector_plan(momentum, layer).with_operation("ablate")
        yield Arm("ablation", plan, len(plan), f"layer {layer}")
