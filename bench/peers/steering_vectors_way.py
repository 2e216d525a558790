"""Steering through steering-vectors: a ``SteeringVector`` of gammas, and an operator that makes x's own change of it.

The library adds to a module's output what an operator makes of the output and the vector: gamma * x. It patches the
outputs of the kinds of modules that it knows: ``ffn`` is its "mlp", ``layer`` its "decoder_block". The input of the
attention output projection is none of them. It makes a mask of the positions on the CPU at every call.
"""

from __future__ import annotations

from torch import nn

from austeer import Plan
from austeer.models.sites import find_sites

from ..plain_ways import dense, strengths
from ..steered import Steered, UnavailableError, Way
from .packages import needed

PIP = "--no-deps steering-vectors"  # it asks for transformers 4, and runs with 5

#: What the library calls the module whose output is a site.
LAYER_TYPES = {"ffn": "mlp", "layer": "decoder_block"}


class SteeringVectors(Steered):
    """``steering_vectors.SteeringVector``, put on with ``patch_activations``."""

    def __init__(self, model: nn.Module, plan: Plan, alpha: float):
        library = needed("steering_vectors", PIP)
        super().__init__(model)
        site = plan.sites[0]
        if plan.sites != (site,) or site not in LAYER_TYPES:
            raise UnavailableError(
                f"steering-vectors: found the site {', '.join(plan.sites)}, expected {' or '.join(LAYER_TYPES)}; it "
                "changes modules' outputs, and no input"
            )
        vector = library.SteeringVector(
            layer_activations={
                one.layer: dense(one, index, gamma, model.dtype)  # type: ignore[arg-type]
                for one, index, gamma in strengths(model, plan, alpha)
                if len(index)
            },
            layer_type=LAYER_TYPES[site],
        )
        paths = dict(enumerate(one.path for one in find_sites(model, [site])[site]))
        self.handle = vector.patch_activations(
            model,
            layer_config={LAYER_TYPES[site]: lambda _, layer: paths.get(layer, "")},
            operator=lambda x, gamma: x * gamma,
        )

    def close(self) -> None:
        self.handle.remove()


WAY = Way("steering-vectors", SteeringVectors, peer=True, module=False)
