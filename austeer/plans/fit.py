"""A plan on a model: whether it fits, and which AUs it has at each site of each layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor, nn

from ..errors import AusteerError, PlanError
from ..models.linear import bias_owner, weights_of
from ..models.sites import Fingerprint, Site, fingerprint
from .plan import Plan


def check_alpha(value: object, error: type[AusteerError], where: str = "") -> float:
    """``value`` as a float; raises ``error`` if it is no finite float32 number, which strengths are."""
    largest = torch.finfo(torch.float32).max
    if isinstance(value, bool) or not isinstance(value, Real) or not abs(value) <= largest:  # type: ignore[operator]
        raise error(f"alpha: found {value!r}{where}, expected a finite float32 number")
    return float(value)


def check_plan_fits(plan: Plan, model: nn.Module, sites: Mapping[str, list[Site]]) -> None:
    """Raises PlanError where the plan was made for another architecture; ``sites``: the plan's at least."""
    check_architecture(plan.model, plan.sites, fingerprint(model, {name: sites[name] for name in plan.sites}))


def check_architecture(expected: Fingerprint, sites: Iterable[str], found: Fingerprint, what: str = "the plan") -> None:
    """Raises PlanError where a plan, or a probe, was made for another architecture.

    Args:
        expected: what it was made for. sites: its own. found: the model's, with the widths of these sites.
        what: what the error calls it.
    """
    widths = {name: expected.widths[name] for name in sites}
    if (found.model_type, found.layers, found.widths) != (expected.model_type, expected.layers, widths):
        raise PlanError(
            f"{what} was made for {expected.name} ({expected.model_type}, {expected.layers} layers, widths {widths}) "
            f"and the model is {found.name} ({found.model_type}, {found.layers} layers, widths {found.widths}); "
            "make it anew on this model"
        )


def why_not_linear(site: Site, operation: str) -> str | None:
    """The reason why no weights and biases could do what steering at a site does; None if some could."""
    if operation == "push":
        return "push is not linear"
    if operation in ("scale", "ablate"):
        return None if site.parts else "no linear layer makes this tensor"
    if site.bias is not None:
        return None
    if site.name == "layer":
        return "no linear layer is known whose output this family's layers add to theirs as it is"
    return "shift in a mixture of experts would need router weights that sum to 1, or an ungated shared expert"


def why_no_edit(model: nn.Module, site: Site, operation: str) -> str | None:
    """The reason why steering at a site is no edit of weights, as far as modules and shapes say; None if it is one."""
    if reason := why_not_linear(site, operation):
        return reason
    if operation == "shift":
        found = bias_owner(model.get_submodule(str(site.bias)), site.side)
        return found if isinstance(found, str) else None
    for path in site.parts:
        if isinstance(weights := weights_of(model.get_submodule(path)), str):
            return weights if len(site.parts) == 1 else f"{path}: {weights}"
    return None


@dataclass(frozen=True)
class LayerUnits:
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

    @property
    def form(self) -> str:
        """What one pass over a tensor can do for several plans at once; "linear": x + gamma * x + shift."""
        return {"push": "magnitude", "ablate": "direction"}.get(self.operation, "linear")

    def amounts(self, alpha: float, k: int) -> Tensor:
        """alpha times beta, delta or the direction, whichever the operation has; float32 [count], on the CPU.

        Zeros from rank k on.
        """
        strength = torch.where(self.rank < k, torch.tensor(alpha, dtype=torch.float32, device="cpu"), 0.0)
        of_one = {"shift": self.delta, "ablate": self.direction(k)}.get(self.operation, self.beta)
        return strength * of_one

    def strengths(self, alpha: float, k: int) -> tuple[Tensor, Tensor]:
        """gamma and shift of each AU, float32 [count], on the CPU; zeros from rank k on. Not of "ablate"."""
        if self.operation == "ablate":
            raise ValueError("strengths: found 'ablate', expected an operation with a gamma or a shift of each AU")
        amounts = self.amounts(alpha, k)
        zero = torch.zeros_like(amounts)
        return (zero, amounts) if self.operation == "shift" else (amounts, zero)

    def direction(self, k: int) -> Tensor:
        """delta of the AUs below rank k at length 1; float32 [count], on the CPU. Zeros where there is none below."""
        used = torch.where(self.rank < k, self.delta, 0.0).double()  # whose squares do not vanish
        length = used.norm()
        return (used / length if length else used).float()


def units_by_layer(plans: Sequence[Plan], sites: Iterable[str]) -> dict[tuple[str, int], list[LayerUnits]]:
    """For each (site, layer), lower layers first, the plans' AUs there."""
    found: dict[tuple[str, int], list[LayerUnits]] = {}
    for name in sites:
        for number, plan in enumerate(plans):
            positions = plan.of(name)
            for layer in plan.layer[positions].unique().tolist():
                ranks = positions[plan.layer[positions] == layer]
                columns = (plan.index[ranks], plan.beta[ranks], plan.delta[ranks])
                found.setdefault((name, layer), []).append(LayerUnits(number, *columns, ranks, plan.operation))
    return dict(sorted(found.items(), key=lambda item: item[0][1]))
