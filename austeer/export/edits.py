"""Steering as an edit of weights: what plans do to each linear layer, told from the model's structure alone.

With x the input of a linear layer y = W x + b, and gamma, shift and the direction d zero but at a plan's AUs:

=========================== ==================================================================
at its input (attention,    W (x + gamma * x + shift) + b  =  W (1 + gamma) x + (b + W shift)
neuron)
at its output (ffn)         y + gamma * y + shift          =  (1 + gamma) W x + (1 + gamma) b + shift
after it, where the output  r + c y + shift                =  r + c (W x + b + shift / c)
is added, times c, to r
(layer; ffn of a mixture)
a direction less, at its    W (x - alpha d (d . x)) + b    =  (W - alpha (W d) d') x + b
input and at its output     y - alpha d (d . y)            =  (W - alpha d d' W) x + (b - alpha d (d . b))
=========================== ==================================================================
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AusteerError, AusteerWarning, PlanError
from ..models import linear
from ..models.families import LAYOUTS
from ..models.projection import why_not_own_code, why_not_the_projection
from ..models.sites import Site, find_sites, site_at
from ..models.structure import text_config
from ..plans.fit import LayerUnits, check_alpha, check_plan_fits, units_by_layer, why_not_linear
from ..plans.plan import Plan
from ..steering.strength import dose_of


class ExportError(AusteerError):
    """A plan that cannot be written in the asked form, or a model that it cannot be written for."""


class ExportWarning(AusteerWarning):
    """An export that may not be what was wanted."""


@dataclass(frozen=True)
class Direction:
    """A direction of AUs of one side of a linear layer, that is removed alpha times.

    Attributes:
        index: int64 [count]. values: float64 [count], the direction's, of length 1.
    """

    index: Tensor
    values: Tensor
    alpha: float


@dataclass(frozen=True)
class Strengths:
    """What is done to AUs of one side of a linear layer, summed over plans: x + gamma * x + shift - directions.

    Attributes:
        index: int64 [count], distinct and ascending. gamma, shift: float64 [count], in the activation's own unit.
        directions: what is removed; all of their AUs are in ``index``.
    """

    index: Tensor
    gamma: Tensor
    shift: Tensor
    directions: tuple[Direction, ...] = ()

    def __len__(self) -> int:
        return len(self.index)

    @property
    def shifts(self) -> bool:
        return bool(self.shift.any())

    @property
    def rank(self) -> int:
        """Of the change of a weight: one for each scaled AU, and one for each direction."""
        return int(self.gamma.count_nonzero()) + len(self.directions)

    @property
    def changed(self) -> Tensor:
        """The AUs that are scaled or in a direction: int64, distinct and ascending."""
        scaled = self.gamma != 0
        for direction in self.directions:
            scaled = scaled | torch.isin(self.index, direction.index)
        return self.index[scaled]

    def at(self, index: Tensor) -> Strengths:
        """The same of some AUs by their places in ``index`` [count], ascending, which has all that are changed."""
        kept = torch.isin(self.index, index)
        directions = (replace(one, index=torch.searchsorted(index, one.index)) for one in self.directions)
        places = torch.searchsorted(index, self.index[kept])
        return Strengths(places, self.gamma[kept], self.shift[kept], tuple(directions))

    def linear(self, t: Tensor, dim: int) -> Tensor:
        """What becomes of float64 ``t``, whose ``dim`` counts all AUs of the side, but for the shifts."""
        wide = t.movedim(dim, -1)
        result = wide.clone()
        result[..., self.index] *= 1 + self.gamma
        for one in self.directions:
            along = wide[..., one.index] @ one.values
            result[..., one.index] -= one.alpha * along[..., None] * one.values
        return result.movedim(-1, dim)

    @classmethod
    def sum(cls, parts: Sequence[Strengths]) -> Strengths:
        """Strengths at the same side of one layer, added up at each AU; directions one beside another."""
        index, place = torch.cat([part.index for part in parts]).unique(return_inverse=True)
        zeros = torch.zeros(len(index), dtype=torch.float64, device="cpu")
        values = ([part.gamma for part in parts], [part.shift for part in parts])
        gamma, shift = (zeros.index_add(0, place, torch.cat(one)) for one in values)
        return cls(index, gamma, shift, tuple(direction for part in parts for direction in part.directions))


@dataclass
class Edit:
    """What plans do to one linear layer, or to the down projections of one set of experts.

    Attributes:
        path: the module's. layer: of the decoder. sites: the names of the sites that it serves.
        weights: where the module keeps its weight and bias, and which dimension is which.
        experts: whether its weight is three-dimensional, one matrix an expert.
        input, output: the strengths at either side; None where there are none.
    """

    path: str
    layer: int
    weights: linear.WeightNames
    experts: bool
    sites: list[str] = field(default_factory=list)
    input: Strengths | None = None
    output: Strengths | None = None

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.path} (site {' and '.join(map(repr, self.sites))} of layer {self.layer})"

    def add(self, site: Site, strengths: Strengths) -> None:
        """Adds what is done at a site that the module serves."""
        if site.name not in self.sites:
            self.sites.append(site.name)
        before = getattr(self, site.side)
        setattr(self, site.side, strengths if before is None else Strengths.sum([before, strengths]))

    @property
    def rank(self) -> int:
        """Of the change of the weight: one for each scaled AU, and one for each direction."""
        return sum(side.rank for side in (self.input, self.output) if side is not None)

    @property
    def shifts(self) -> bool:
        return any(side is not None and side.shifts for side in (self.input, self.output))


#: A strength, or one for each of a plan's sites by name.
Alpha = float | Mapping[str, float]


def with_alphas(
    plans: Plan | Sequence[Plan | tuple[Plan, Alpha]], alpha: Alpha | None = None, kl: float | None = None
) -> list[tuple[Plan, float]]:
    """Each plan with its strength: its own where it comes as a pair, otherwise ``alpha``, or 1.

    A plan with a strength for each of its sites becomes one plan for each of them.

    Args:
        kl: instead of ``alpha``, of one plan, whose dose predicts the strength; nothing is measured.

    Raises:
        PlanError: something else than plans and finite float32 numbers, no plan, or other sites than the plan's.
        SteeringError: ``kl`` of a plan without a dose.
    """
    given = [plans] if isinstance(plans, Plan) else list(plans) if isinstance(plans, Sequence) else [plans]
    if not given:
        raise PlanError("plans: found none, expected at least one")
    if kl is not None:
        return [_at_kl(given, alpha, kl)]
    found: list[tuple[Plan, float]] = []
    for one in given:
        plan, strength = one if isinstance(one, tuple) and len(one) == 2 else (one, 1.0 if alpha is None else alpha)
        _check_plan(plan)
        if not isinstance(strength, Mapping):
            found.append((plan, check_alpha(strength, PlanError)))
            continue
        if set(strength) != set(plan.sites):
            raise PlanError(f"alpha: found sites {sorted(map(str, strength))}, expected {sorted(plan.sites)}")
        found += [(plan.take(plan.of(site)), check_alpha(value, PlanError)) for site, value in strength.items()]
    return found


def _at_kl(given: Sequence[Any], alpha: Alpha | None, kl: float) -> tuple[Plan, float]:
    """The one plan, with the strength at which its KL is predicted to be this."""
    if alpha is not None or any(isinstance(one, tuple) for one in given):
        raise PlanError(f"found both alpha and kl ({kl!r}), expected one of them")
    if len(given) > 1:
        raise PlanError(
            f"kl: found {len(given)} plans, expected one: their KLs do not add up as their shifts do. Give each its "
            "alpha, or the sum of the plans with its own dose (plan = a + b; plan.with_dose(profile.dose(plan)))"
        )
    _check_plan(given[0])
    return given[0], check_alpha(dose_of(given[0]).alpha(kl), PlanError)


def _check_plan(plan: object) -> None:
    if not isinstance(plan, Plan):
        raise PlanError(
            f"plans: found {type(plan).__name__}, expected an austeer.Plan, or a sequence of plans or of pairs (plan, "
            "alpha)"
        )


def warn_of_another_model(plans: Iterable[tuple[Plan, float]], name: str) -> None:
    """Warns where a plan was measured on a model of another name: weights of one architecture can be anything.

    Args:
        name: of the model that is exported for; folders count by their last part.
    """
    found = sorted({plan.model.name for plan, _ in plans if _last(plan.model.name) != _last(name)})
    if found:
        warnings.warn(
            f"the plan was measured on {', '.join(found)} and is exported for {name}, of the same architecture; right "
            "for a copy or a fine-tune of it, otherwise measure and select on this model",
            ExportWarning,
            stacklevel=3,
        )


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()


def edits_of(model: nn.Module, plans: Sequence[tuple[Plan, float]]) -> list[Edit]:
    """What ``plans``, each with its alpha, do to the weights of a model; lower layers first.

    What several plans add at one site adds up: x + (gamma_a + gamma_b) * x + shift_a + shift_b, less what each ablates
    of x by itself: alpha_a d_a (d_a . x) + alpha_b d_b (d_b . x). (The sum ``a + b`` of the plans has one direction.)

    Args:
        model: its structure is read and nothing else; it may be on the meta device.
        plans: as :func:`with_alphas` gives them.

    Raises:
        PlanError: a plan for another model.
        ExportError: a plan that is no edit of weights (``push``; ``scale`` and ``ablate`` at the site ``layer``), with
            the reason.
    """
    sites = find_sites(model, list(dict.fromkeys(name for plan, _ in plans for name in plan.sites)))
    for plan, _ in plans:
        check_plan_fits(plan, model, sites)
    edits: dict[str, Edit] = {}
    checked: set[tuple[type, type]] = set()
    for (name, layer), entries in units_by_layer([plan for plan, _ in plans], sites).items():
        site = site_at(sites[name], layer)
        for entry in entries:
            if reason := why_not_linear(site, entry.operation):
                raise ExportError(
                    f"site {name!r} of layer {layer}, operation {entry.operation!r}: {reason}, so it is no edit of "
                    f"weights; {_instead(site, entry.operation)}, or steer at run time (austeer.steer, or austeer's "
                    "plugin in vLLM)"
                )
        for shifts, paths in ((False, site.parts), (True, (str(site.bias),))):
            part = [entry for entry in entries if (entry.operation == "shift") == shifts]
            if not part:
                continue
            strengths = summed(part, plans)
            if shifts:
                strengths = replace(strengths, shift=strengths.shift / site.bias_factor)
            for path in paths:
                if site.projection or shifts:
                    _check_site(model, site, path, checked)
                edits.setdefault(path, _edit(model, site, path)).add(site, strengths)
    return list(edits.values())


def _instead(site: Site, operation: str) -> str:
    """What is an edit of weights where steering at a site with an operation is none."""
    others = " or ".join(repr(other) for other in ("scale", "shift") if why_not_linear(site, other) is None)
    if operation == "push":
        return f"use plan.with_operation({others})" if others else "select at 'attention' with another operation"
    return f"use plan.with_operation({others}), or select at 'attention'" if others else "select at 'attention'"


def summed(entries: Sequence[LayerUnits], plans: Sequence[tuple[Plan, float]]) -> Strengths:
    """Summed over the plans that have AUs at a site of a layer."""
    parts = []
    for entry in entries:
        plan, alpha = plans[entry.plan]
        index = entry.index.long()
        if entry.operation == "ablate":
            zero = torch.zeros(len(index), dtype=torch.float64, device="cpu")
            directions = (Direction(index, entry.direction(len(plan)).double(), alpha),) if alpha else ()
            parts.append(Strengths(index, zero, zero, directions))
            continue
        # Each is a float32 product, as everywhere (DESIGN: Operation); only the sum over plans is wider.
        gamma, shift = (values.double() for values in entry.strengths(alpha, len(plan)))
        parts.append(Strengths(index, gamma, shift))
    return Strengths.sum(parts)


def _edit(model: nn.Module, site: Site, path: str) -> Edit:
    module = model.get_submodule(path)
    weights = linear.weights_of(module)
    if isinstance(weights, str):
        raise ExportError(
            f"{path}: {weights}, expected a linear layer whose weights can be edited; give the unquantised, unwrapped "
            "model, or its name"
        )
    if sum(other is module for _, other in model.named_modules(remove_duplicate=False)) > 1:
        raise ExportError(f"{path}: found it in several places of the model, expected each layer to have its own")
    for name in filter(None, (weights.weight, weights.bias)):
        if name not in module._parameters and getattr(module, name) is not None:
            raise ExportError(
                f"{path}: found a {name} that is made anew at each forward pass (pruning, weight normalisation ...), "
                "expected a parameter; make it permanent first, or give the unwrapped model"
            )
    return Edit(path, site.layer, weights, experts=getattr(module, weights.weight).dim() == 3)


def _check_site(model: nn.Module, site: Site, path: str, checked: set[tuple[type, type]]) -> None:
    """Refuses a block that does more to its tensor than adding what the module at ``path`` makes.

    Transformers' code of the table's families was read and tested; a block of other code with one projection is run.
    """
    reason = why_not_own_code(model, site, path) if site.side == "output" else None
    known = reason is None and text_config(model).model_type in LAYOUTS
    if known or site.projection == site.path:
        return
    if site.projection is not None:
        block = model.get_submodule(site.path)
        kind = (type(block), type(model.get_submodule(site.projection)))
        if kind in checked:
            return
        checked.add(kind)
        reason = why_not_the_projection(_with_values(model, site), site)
    if reason is not None:
        raise ExportError(f"site {site.name!r} of layer {site.layer}: {reason}, so it is no edit of weights")


def _with_values(model: nn.Module, site: Site) -> nn.Module:
    """The model, or one with the same block where the model has no values."""
    if not any(p.device.type == "meta" for p in model.get_submodule(site.path).parameters()):
        return model
    holder = nn.Module()
    at = holder
    *above, last = site.path.split(".")
    for name in above:
        at.add_module(name, nn.Module())
        at = at.get_submodule(name)
    block = copy.deepcopy(model.get_submodule(site.path)).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*block.parameters(), *block.buffers()):
            tensor.fill_(0.01)  # any finite values will do
    at.add_module(last, block)
    return holder


def describe(plans: Iterable[tuple[Plan, float]]) -> list[dict]:
    """Plans and their alphas as JSON, for the metadata of what is exported."""
    return [
        {
            "alpha": float(alpha),
            "k": len(plan),
            "sites": list(plan.sites),
            "operation": plan.operation,
            "pairs": plan.pairs,
            "model": plan.model.to_json(),
            "digest": plan.digest,
        }
        for plan, alpha in plans
    ]
