"""Steering through nnsight: an edit, written once and replayed in every trace, at every step of a generation.

Its documented form for an intervention that stays. ``NNsight`` is the wrapper for a model that is already there; a
trace without a block of its own runs the model, or a method of it, under the edits alone. The block runs beside the
model and takes turns with it: each planned layer hands its tensor over, and it is multiplied in place.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from austeer import Plan
from austeer.models.structure import first_tensor

from ..plain_ways import dense, strengths
from ..steered import Steered, Way
from .packages import needed

PIP = "--no-deps nnsight"  # what it asks for beside ours is for remote runs


class NNsight(Steered):
    """``nnsight.NNsight`` around the model, edited in place at each layer that has AUs."""

    def __init__(self, model: nn.Module, plan: Plan, alpha: float):
        nnsight = needed("nnsight", PIP)
        super().__init__(model)
        # The loop over all steps ends, as nnsight documents, by asking for one that does not come.
        warnings.filterwarnings("ignore", message=".*was never reached: the loop asked for a step the run did not make")
        self.nnsight = lens = nnsight.NNsight(model)
        planned = [
            (lens.get(site.path), site.side, (1 + dense(site, index, gamma, torch.float64)).to(model.dtype))  # type: ignore[arg-type]
            for site, index, gamma in strengths(model, plan, alpha)
            if len(index)
        ]
        with lens.edit(inplace=True) as tracer:
            for _ in tracer.iter[:]:
                for module, side, factor in planned:
                    first_tensor(getattr(module, side)).mul_(factor)

    def generate(self, ids: Tensor, **options: Any) -> Tensor:
        mask = torch.ones_like(ids)
        return self.nnsight.trace(fn="generate", trace=False, input_ids=ids, attention_mask=mask, **options)

    def logits(self, ids: Tensor) -> Tensor:
        return self.nnsight.trace(trace=False, input_ids=ids, use_cache=False).logits

    def close(self) -> None:
        self.nnsight.clear_edits()


WAY = Way("nnsight", NNsight, peer=True, module=False)
