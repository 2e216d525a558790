"""A dense Newton step: one vector of the residual stream, of the largest effect for its side effect, at one layer.

With g the effects of a layer's AUs (:meth:`austeer.Momentum.effect`) and M the matrix of the side effect among them
(:mod:`austeer.momentum.by_effect`: KL(s) = s' M s), the shift of the largest effect at a given KL is

    s = M^-1 g,    M = (1 - shrinkage) * rows' rows + shrinkage * diagonal + damping * mean of the diagonal

a natural gradient step (Amari, "Natural Gradient Works Efficiently in Learning", Neural Computation 1998) in the space
of shifts. It knows the gradient, as "effect" does, and steers every AU of a layer, as CAA does: what lies between the
two is what choosing AUs does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..errors import SelectionError
from ..momentum.by_effect import DAMPING, SHRINKAGE
from ..momentum.momentum import Momentum
from ..momentum.profile import Profile
from ..momentum.selection import KL as UNIT
from .arm import Arm, Material
from .residual import SITE, layers_of, vector_plan


def newton_arms(material: Material, layers: Sequence[int] | None = None) -> Iterator[Arm]:
    """An arm for each layer; by default for as many as "caa" has."""
    momentum, profile = material.momentum, material.with_profile("newton")
    for layer in layers_of("newton", momentum, layers):
        vector, _ = newton_step(momentum, profile, layer)
        yield Arm("newton", vector_plan(momentum, layer, vector), len(vector), f"layer {layer}")


def newton_step(momentum: Momentum, profile: Profile, layer: int) -> tuple[Tensor, float]:
    """The step of a predicted KL of ``UNIT``: float64 [width], and its predicted effect, nats.

    Raises:
        SelectionError: no AU of the layer has an effect.
    """
    g = momentum.effect(SITE)[momentum.layers.index(layer)]
    if not g.any():
        raise SelectionError(f"layer {layer}: found effects that are all 0, expected some; are its pairs' texts equal?")
    step = torch.cholesky_solve(g[:, None], torch.linalg.cholesky(side_effect_matrix(profile, layer)))[:, 0]
    step = step * math.sqrt(UNIT / float(g @ step))
    return step, float(g @ step)


def side_effect_matrix(profile: Profile, layer: int) -> Tensor:
    """M of a layer's AUs, drawn towards its diagonal as draws are few: float64 [width, width]."""
    rows, diagonal = (found[..., 0, :] for found in profile.scaled(SITE, [layer]))
    matrix = (1 - SHRINKAGE) * (rows.T @ rows).double()
    matrix.diagonal().copy_(diagonal + DAMPING * diagonal.mean())
    return matrix
