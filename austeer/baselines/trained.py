"""A trained vector: added to the residual stream at one layer, it is learnt by gradient descent on the same pairs.

Subramani et al., "Extracting Latent Steering Vectors from Pretrained Language Models" (Findings of ACL 2022) learn such
a vector for a sentence; Cao et al., "Personalized Steering of Large Language Models: Versatile Steering Vectors Through
Bi-directional Preference Optimization" (NeurIPS 2024) learn one from pairs. Here v maximises the mean over pairs of

    log p(positive | prompt, v) - log p(negative | prompt, v)    with KL(v) = v' M v at most ``UNIT``

M being :func:`austeer.baselines.newton.side_effect_matrix`. It begins at that layer's Newton step, which is where it
would stay if effects were linear, and climbs along the gradients of batches of pairs, in coordinates in which steps of
one length have one side effect, always at the limit. Ours differs from both papers in that limit, and from the second
one in that the log-odds themselves are raised, not how often they are positive.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import SelectionError
from ..forward.gradients import ShiftGradients
from ..forward.pair_scores import PairBatch, effects_of, scored_batches
from ..forward.tokens import length_limit, tokenise
from ..models.sites import Site, find_sites
from ..models.structure import first_tensor
from .arm import Arm, Material
from .newton import UNIT, newton_step, side_effect_matrix
from .residual import SITE, layers_of, vector_plan

#: Layers that are trained unless they are named: those whose Newton step promises most.
LAYERS = 2

#: Times that every pair is seen, tokens of a batch, the first step's length as part of the vector's (which goes to 0),
#: and how much of its direction is that of the steps before.
EPOCHS, BATCH_TOKENS, RATE, INERTIA = 2, 512, 0.1, 0.8


def trained_arms(material: Material, layers: Sequence[int] | None = None) -> Iterator[Arm]:
    """An arm for each layer; by default for the ``LAYERS`` whose Newton step has the largest predicted effect.

    Each takes ``EPOCHS`` passes over the pairs, and the way back from the end to its layer. The same every time.

    Raises:
        SelectionError: no pair with two different texts behind a common beginning.
    """
    momentum, profile = material.momentum, material.with_profile("trained")
    if layers is None:
        promised = {layer: newton_step(momentum, profile, layer)[1] for layer in momentum.layers}
        layers = sorted(sorted(promised, key=lambda layer: -promised[layer])[:LAYERS])
    batches = _batches(material)
    for layer in layers_of("trained", momentum, layers):
        matrix, (start, _) = side_effect_matrix(profile, layer), newton_step(momentum, profile, layer)
        vector = _train(material.model, layer, batches, start, matrix)
        yield Arm("trained", vector_plan(momentum, layer, vector), len(vector), f"layer {layer}")


def _train(model: nn.Module, layer: int, batches: Sequence[PairBatch], start: Tensor, matrix: Tensor) -> Tensor:
    """The vector: float64 [width]; ``start`` is where it begins, and ``matrix`` its side effect."""
    (site,) = (site for site in find_sites(model, [SITE])[SITE] if site.layer == layer)
    gradients = ShiftGradients(model, {SITE: [site]})
    factor = torch.linalg.cholesky(matrix)  # M = L L'; of w = L' v the side effect is |w|^2
    limit, steps = math.sqrt(UNIT), EPOCHS * len(batches)
    w, vector = factor.T @ start, start
    heading = torch.zeros_like(w)
    generator = torch.Generator().manual_seed(0)
    order = [
        number for _ in range(EPOCHS) for number in torch.randperm(len(batches), generator=generator, device="cpu")
    ]
    with gradients.attached():
        for step, number in enumerate(order):
            with _added(gradients.model, site, vector):
                effects = effects_of(gradients, batches[number], None)[SITE]
            up = torch.linalg.solve_triangular(factor, effects[:, 0].double().sum(0)[:, None], upper=False)[:, 0]
            heading = INERTIA * heading + (1 - INERTIA) * up
            w = w + RATE * (1 - step / steps) * limit * heading / heading.norm()
            w = w * (limit / w.norm())
            vector = torch.linalg.solve_triangular(factor.T, w[:, None], upper=True)[:, 0]
    return vector


def _batches(material: Material) -> list[PairBatch]:
    pairs, model = material.pairs, material.model
    special = not pairs.chat_template
    tokens = tokenise(material.tokenizer, pairs.items, length_limit(model, None), special=special, source=pairs.source)
    both = [(one, two) for one, two in zip(tokens.positive, tokens.negative) if one[0] == two[0]]
    if not both:
        raise SelectionError(
            f"method 'trained': found no pair of {pairs.source} whose two texts differ behind a common beginning, "
            "expected the pairs that momentum was counted on; give them"
        )
    return list(scored_batches(both, BATCH_TOKENS, share=False))


@contextmanager
def _added(model: nn.Module, site: Site, vector: Tensor) -> Iterator[None]:
    """The model with a vector added to what a decoder layer gives."""

    def add(module, args, output):
        x = first_tensor(output)
        x = x + vector.to(x)
        return type(output)([x, *output[1:]]) if isinstance(output, (tuple, list)) else x

    handle = model.get_submodule(site.path).register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
