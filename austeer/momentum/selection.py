"""From a momentum to a plan: which AUs, in which order, moved how far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import mul
from typing import Any, Protocol

import torch
from torch import Tensor

from ..counters import Counters
from ..errors import SelectionError, check_count
from ..pairs.chat import ChatForm
from ..plans.dose import positive_kl
from ..plans.plan import Plan
from ..plans.table import COLUMNS, OPERATIONS, RANKED_BY, STEPPED_BY
from ..statistics import signed_rate
from ..statistics.ranking import by_difference
from ..statistics.selection import EXACTLY_ONE, select
from .by_effect import Candidates, Choice, Effects, best_sites, choose, effect_curve, effect_ratio, kl_ratio
from .profile import Profile

#: The KL that alpha = 1 has by Newton's step, where none is asked for: nats a token.
KL = 0.1


class Measured(Effects, Protocol):
    """What is needed of a :class:`austeer.Momentum`, which is one."""

    @property
    def identical(self) -> int: ...
    @property
    def chat_template(self) -> ChatForm: ...
    @property
    def sites(self) -> Mapping[str, Counters]: ...
    @property
    def effects(self) -> Measured | None: ...
    def halves(self) -> tuple[Measured, Measured]: ...
    def in_layers(self, layers: Sequence[int]) -> Measured: ...


@dataclass(frozen=True)
class Asked:
    """The arguments of :meth:`austeer.Momentum.select`."""

    site: str | Sequence[str]
    k: int | None
    kl: float | None
    max_fdr: float | None
    min_stability: float | None
    rank: str | None
    step: str | None
    ties: str
    operation: str | None
    layers: Sequence[int] | None


def selected(momentum: Measured, asked: Asked, profile: Profile | None) -> Plan:
    """The plan that :meth:`austeer.Momentum.select` describes; raises what it does."""
    paper = asked.ties == "public" or asked.max_fdr is not None or asked.min_stability is not None
    rank = asked.rank or ("momentum" if profile is None or paper else "effect")
    operation = asked.operation or ("shift" if rank == "effect" else "scale")
    for what, value, names in (("rank", rank, RANKED_BY), ("operation", operation, OPERATIONS)):
        if value not in names:
            raise SelectionError(f"{what}: found {value!r}, expected one of {', '.join(names)}")
    if asked.kl is not None:
        asked = replace(asked, kl=positive_kl(asked.kl, SelectionError))
    if not asked.site:
        raise SelectionError("site: found none, expected at least one, for example 'attention'")
    if asked.layers is not None:
        momentum = momentum.in_layers(asked.layers)
        alone = (asked.k, asked.kl, asked.max_fdr, asked.min_stability) == (None,) * 4
        if alone and isinstance(asked.site, str) and asked.site != "auto":
            asked = replace(asked, k=momentum.counters(asked.site).positive.numel())
    if rank == "effect":
        return _by_effect(momentum, asked, operation, profile)
    if not isinstance(asked.site, str) or asked.site == "auto" or asked.kl is not None or asked.step is not None:
        raise SelectionError(
            "select: found several sites, site='auto', kl or step with another rank than 'effect', expected one site "
            "and k; give effects and a profile (measure(..., effects=True), austeer.profile) for those"
        )
    site = asked.site
    momentum.counters(site)
    if rank == "difference":
        if asked.k is None or asked.max_fdr is not None or asked.min_stability is not None:
            raise SelectionError("select: expected k alone with rank 'difference', for example k=100")
        order = by_difference(momentum.counters(site))
        chosen = order[: check_count("k", asked.k, order.numel(), f"AUs of {site!r}", SelectionError)]
    else:
        limits = {"max_fdr": asked.max_fdr, "min_stability": asked.min_stability}
        chosen = select(momentum, site, asked.k, **limits, ties=asked.ties)
    plan = replace(plan_of(momentum, site, chosen, operation, ties=asked.ties), rank=rank)
    return plan if profile is None or operation != "shift" else with_dose(plan, momentum, profile)


def _by_effect(momentum: Measured, asked: Asked, operation: str, profile: Profile | None) -> Plan:
    if profile is None:
        raise SelectionError(
            "profile: found none, expected the model's, by whose side effects AUs are ranked; make it: "
            "austeer.profile(model, tokenizer), or austeer profile"
        )
    if operation != "shift":
        raise SelectionError(
            f"operation: found {operation!r} with rank 'effect', expected 'shift', of which effects are known"
        )
    if asked.max_fdr is not None or asked.min_stability is not None or asked.ties != "effect":
        raise SelectionError("select: found max_fdr, min_stability or ties with rank 'effect', expected k, or kl")
    if asked.k is None and asked.kl is None:
        raise SelectionError(f"{EXACTLY_ONE}; with a profile also kl, for example kl=0.1")
    step = asked.step or "newton"
    if step not in STEPPED_BY:
        raise SelectionError(f"step: found {step!r}, expected one of {', '.join(STEPPED_BY)}")
    if asked.site == "auto":
        known = [site for site in tuple(momentum.sites) if site in profile.rows]
        if not known:
            raise SelectionError(
                f"site: found no site with both effects ({', '.join(tuple(momentum.sites))}) and a profile "
                f"({', '.join(profile.rows)}), expected one"
            )
        curve = best_sites(momentum, profile, known, step)[0]
        sites, k = curve.sites, curve.enough if asked.k is None else asked.k
    else:
        sites = (asked.site,) if isinstance(asked.site, str) else tuple(dict.fromkeys(asked.site))
        k = asked.k if asked.k is not None else effect_curve(momentum, profile, sites, step).enough
    found = Candidates.of(momentum, profile, sites)
    choice = choose(found, k, step)
    return plan_of_choice(momentum, profile, found, choice, step, asked.kl or KL)


def plan_of_choice(
    momentum: Measured, profile: Profile, found: Candidates, choice: Choice, step: str, kl: float
) -> Plan:
    """AUs chosen by effect as a plan, with its dose; Newton's steps are scaled so that alpha = 1 has the ``kl``."""
    starts = torch.tensor([0, *found.sizes], device="cpu").cumsum(0)
    place = torch.bucketize(choice.order, starts[1:], right=True)
    names = [found.sites[i] for i in place.tolist()]
    plan = replace(plan_of(momentum, names, choice.order - starts[place], "shift"), rank="effect", step=step)
    ratio = kl_ratio(momentum, profile, found.sites, step, len(plan))
    if step == "newton":
        steps = choice.steps(len(plan))
        steps = steps / steps.abs().max()
        one = profile.kl(replace(plan, delta=steps.float())) * ratio[-1]
        plan = replace(plan, delta=(steps * ((kl / one) ** 0.5 if one > 0 else 1.0)).float())
    dose = with_dose(plan, momentum, profile).dose
    assert dose is not None
    part = effect_ratio(momentum, profile, found.sites, step, len(plan))
    dose = replace(dose, kl=tuple(map(mul, dose.kl, ratio)), effect=tuple(map(mul, dose.effect, part)))
    return plan.with_dose(dose)


def with_dose(plan: Plan, momentum: Measured, profile: Profile) -> Plan:
    """A plan of "shift" with its dose, and with its effects where they were measured: on these texts and pairs."""
    effects: list[float] = []
    if momentum.effects is not None:
        row_of = {layer: row for row, layer in enumerate(momentum.layers)}
        g = {site: momentum.effect(site) for site in plan.sites}
        effects = [float(g[unit.site][row_of[unit.layer], unit.index]) * unit.delta for unit in plan]
    return plan.with_dose(profile.dose(plan, effects))


def plan_of(
    momentum: Measured,
    site: str | Sequence[str],
    order: Tensor,
    operation: str,
    *,
    beta: float | None = None,
    ties: str = "effect",
) -> Plan:
    """The AUs at ``order`` as a plan, with the delta that was measured, and with their own beta unless one is given.

    Args:
        site: of all, or one an AU. order: int64 [k], row * width + index in the site's counters, most important first.
        ties: the rule that ``order`` was made by.
    """
    names = (site,) * len(order) if isinstance(site, str) else tuple(site)
    columns: dict[str, Any] = {
        name: torch.zeros(len(order), dtype=dtype, device="cpu") for name, dtype in COLUMNS.items()
    }
    layers = torch.tensor(momentum.layers, dtype=torch.int32, device="cpu")
    for name in dict.fromkeys(names):
        rows = torch.tensor([i for i, other in enumerate(names) if other == name], device="cpu")
        counters, units = momentum.counters(name), order[rows]
        width = counters.positive.shape[1]
        columns["layer"][rows], columns["index"][rows] = layers[units // width], (units % width).int()
        columns["beta"][rows] = signed_rate(counters, momentum.pairs).flatten()[units].float()
        columns["delta"][rows] = (counters.delta_sum.flatten()[units] / momentum.pairs).float()
    if beta is not None:
        columns["beta"] = torch.full_like(columns["beta"], beta)
    return Plan(
        site=names,
        **columns,
        operation=operation,
        model=momentum.model,
        pairs=momentum.pairs,
        ties=ties,
        chat_template=momentum.chat_template,
    )
