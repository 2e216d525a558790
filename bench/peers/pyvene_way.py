"""Steering through pyvene: a custom intervention at each planned layer, in its documented form for steering generation.

The intervention scales; pyvene hands it a copy of the tensor and copies what it returns back into the original. Hooks
are put on and taken off by every call of pyvene's own ``forward`` and ``generate``. Without ``intervene_on_prompt`` and
with its default locations pyvene would leave positions out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from austeer import Plan

from ..plain_ways import dense, strengths
from ..steered import Steered, Way
from .packages import gradient_flags_kept, needed

PIP = "--no-deps pyvene"  # of what it asks for, thirty packages are for notebooks and plots


class Pyvene(Steered):
    """``pyvene.IntervenableModel`` with an intervention of its own at each layer that has AUs."""

    def __init__(self, model: nn.Module, plan: Plan, alpha: float):
        pyvene = needed("pyvene", PIP)
        super().__init__(model)

        class Scale(pyvene.ConstantSourceIntervention):  # type: ignore[name-defined]
            """Multiplies what it is given, a copy, by a vector [width]."""

            def __init__(self, factor: Tensor):
                super().__init__(keep_last_dim=True)
                self.register_buffer("factor", factor)

            def forward(self, base: Tensor, source: Tensor | None = None, subspaces: Any = None) -> Tensor:
                return base.mul_(self.factor)

        interventions = [
            {
                "component": f"{site.path}.{site.side}",
                "intervention": Scale((1 + dense(site, index, gamma, torch.float64)).to(model.dtype)),  # type: ignore[arg-type]
            }
            for site, index, gamma in strengths(model, plan, alpha)
            if len(index)
        ]
        with gradient_flags_kept(model):
            self.pyvene = pyvene.IntervenableModel(interventions, model=model)

    def generate(self, ids: Tensor, **options: Any) -> Tensor:
        base = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return self.pyvene.generate(base, unit_locations=None, intervene_on_prompt=True, **options)[1]

    def logits(self, ids: Tensor) -> Tensor:
        return self.pyvene({"input_ids": ids}, unit_locations=None, use_cache=False)[1].logits


WAY = Way("pyvene", Pyvene, peer=True, module=False)
