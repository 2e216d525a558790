"""A plan on a model: whether it fits, and which AUs it has at each site of each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import PlanError
from ..models.sites import Site, fingerprint
from .plan import Plan


def check_plan_fits(plan: Plan, model: nn.Module, sites: Mapping[str, list[Site]]) -> None:
    found, expected = fingerprint(model, {name: sites[name] for name in plan.sites}), plan.model
    widths = {name: expected.widths[name] for name in plan.sites}
    if (found.model_type, found.layers, found.widths) != (expected.model_type, expected.layers, widths):
        raise PlanError(
            f"the plan was made for {expected.name} ({expected.model_type}, {expected.layers} layers, widths {widths}) "
            f"and the model is {found.name} ({found.model_type}, {found.layers} layers, widths {found.widths}); "
            "measure and select on this model"
        )


@dataclass(frozen=True)
class Entry:
    """The AUs that one plan has at one site of one layer.

    Attributes:
        plan: the plan's row in the table.
        index: int [count], the AUs as columns of the table, distinct. beta, delta: float32 [count], theirs.
        rank: int64 [count], each AU's place in its plan, from 0.
        operation: the plan's.
        first: the AU that the table's column 0 is: not 0 where a process holds a slice of the site.
    """

    plan: int
    index: Tensor
    beta: Tensor
    delta: Tensor
    rank: Tensor
    operation: str
    first: int = 0

    @property
    def magnitude(self) -> bool:
        return self.operation == "push"

    def strengths(self, alpha: float, k: int) -> tuple[Tensor, Tensor]:
        """gamma and shift of each AU, float32 [count], on the CPU; zeros from rank k on."""
        strength = torch.where(self.rank < k, torch.tensor(alpha, dtype=torch.float32), 0.0)
        zero = torch.zeros_like(strength)
        return (zero, strength * self.delta) if self.operation == "shift" else (strength * self.beta, zero)


def entries_of(plans: Sequence[Plan], sites: Mapping[str, list[Site]]) -> dict[tuple[str, int], list[Entry]]:
    """For each (site, layer), lower layers first, the plans' AUs there."""
    found: dict[tuple[str, int], list[Entry]] = {}
    for name in sites:
        for number, plan in enumerate(plans):
            if name not in plan.sites:
                continue
            positions = plan.of(name)
            for layer in plan.layer[positions].unique().tolist():
                ranks = positions[plan.layer[positions] == layer]
                entry = Entry(number, plan.index[ranks], plan.beta[ranks], plan.delta[ranks], ranks, plan.operation)
                found.setdefault((name, layer), []).append(entry)
    return dict(sorted(found.items(), key=lambda item: item[0][1]))
