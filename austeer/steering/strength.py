"""How strongly: alpha and k as the user gives them, for every plan and site."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import PlanError, SteeringError, check_count
from ..plans.dose import Dose
from ..plans.fit import check_alpha
from ..plans.plan import Plan

#: One number, one a site, or (plans with names) either of them a plan.
Alpha = float | Mapping[str, Any]


class Strength:
    """alpha for each plan and site, and k for each plan; checked as they are set, and unchanged if that fails.

    Args:
        plans: name -> plan. named: whether the user gave names, and so may give alpha and k by name.
    """

    def __init__(self, plans: Mapping[str, Plan], named: bool):
        self._plans, self._named = dict(plans), named
        self._alpha: dict[str, dict[str, float]] = {}
        self._k: dict[str, int] = {}

    def of(self, site: str) -> list[tuple[float, int]]:
        """(alpha, k) of each plan at a site, in the order of the plans."""
        return [(self._alpha[name].get(site, 0.0), self._k[name]) for name in self._plans]

    # --- alpha -------------------------------------------------------------------------------------------------------

    def set_alpha(self, alpha: Alpha) -> None:
        """Raises SteeringError: not a finite float32 number, or other plans or sites than there are."""
        given = self._for_each("alpha", alpha)
        self._alpha = {name: _by_site(given[name], plan) for name, plan in self._plans.items()}

    def alpha(self) -> float | dict[str, Any]:
        """As it was set, in the shortest form that says the same."""
        values = {name: _shortest(by_site) for name, by_site in self._alpha.items()}
        return _shortest(values) if self._named else next(iter(values.values()))

    # --- kl ----------------------------------------------------------------------------------------------------------

    def kl_by_name(self, kl: float | Mapping[str, float]) -> dict[str, float]:
        """What is asked of each plan; raises SteeringError where other plans are named than there are."""
        return self._for_each("kl", kl)

    def alpha_for(self, kl: float | Mapping[str, float]) -> float | dict[str, float]:
        """The alpha at which each plan has that KL.

        Raises:
            SteeringError: other plans than there are, or one without a dose. PlanError: no positive number.
        """
        values = {}
        for name, wanted in self.kl_by_name(kl).items():
            values[name] = dose_of(self._plans[name], name).alpha(wanted, self._k[name])
        return values if self._named else next(iter(values.values()))

    def kl(self) -> float | dict[str, float] | None:
        """That of each plan at its alpha; None if it is not known of all."""
        values: dict[str, float] = {}
        for name, plan in self._plans.items():
            alpha = _shortest(self._alpha[name])
            if plan.dose is None or isinstance(alpha, dict):
                return None
            values[name] = plan.dose.kl_of(alpha, self._k[name])
        return _shortest(values)

    # --- k -----------------------------------------------------------------------------------------------------------

    def set_k(self, k: int | Mapping[str, int] | None) -> None:
        """Sets how many AUs of each plan are steered.

        Raises:
            PlanError: more AUs than a plan has, or less than one; or none of them form a direction that is to be
                ablated.
            SteeringError: other plans than there are.
        """
        given = self._for_each("k", k)
        new: dict[str, int] = {}
        for name, plan in self._plans.items():
            what = f"the AUs of plan {name!r}" if self._named else "the plan's AUs"
            value = len(plan) if given[name] is None else given[name]
            new[name] = check_count("k", value, len(plan), what, PlanError)
            plan.expect_directions(new[name])
        self._k = new

    def k(self) -> int | dict[str, int]:
        return _shortest(self._k)

    def k_by_name(self) -> dict[str, int]:
        return dict(self._k)

    def _for_each(self, what: str, given: Any) -> dict[str, Any]:
        if not self._named or not isinstance(given, Mapping):
            return dict.fromkeys(self._plans, given)
        if set(given) != set(self._plans):
            raise SteeringError(
                f"{what}: found plans {sorted(map(str, given))}, expected {sorted(self._plans)}, or one number for all"
            )
        return {name: given[name] for name in self._plans}


def dose_of(plan: Plan, name: str = "") -> Dose:
    """Raises SteeringError where the plan has none."""
    if plan.dose is None:
        found = f"plan {name!r}" if name else "a plan"
        if plan.operation != "shift":
            raise SteeringError(
                f"kl: found {found} of {plan.operation!r}, expected 'shift': what {plan.operation} adds depends on the "
                "activation, so no strength is known for a KL. Select with operation='shift', or give alpha"
            )
        raise SteeringError(
            f"kl: found {found} without a dose, expected one that was selected with a profile (select(..., "
            "profile=...), austeer select --profile). Give the model's profile (profile=, --profile), or alpha"
        )
    return plan.dose


def _by_site(alpha: Any, plan: Plan) -> dict[str, float]:
    values = dict(alpha) if isinstance(alpha, Mapping) else dict.fromkeys(plan.sites, alpha)
    if set(values) != set(plan.sites):
        raise SteeringError(f"alpha: found sites {sorted(map(str, values))}, expected {sorted(plan.sites)}")
    return {name: check_alpha(value, SteeringError, f" for site {name!r}") for name, value in values.items()}


def _shortest(values: Mapping[str, Any]) -> Any:
    """The one value that all have, or a copy of the whole."""
    first = next(iter(values.values()))
    return first if all(value == first for value in values.values()) else dict(values)


def named_plans(plan: Plan | Mapping[str, Plan]) -> dict[str, Plan]:
    """Plans by name, one without a name under ""; raises PlanError where there is none, or something else."""
    plans = dict(plan) if isinstance(plan, Mapping) else {"": plan}
    if not plans:
        raise PlanError("plan: found an empty dictionary, expected at least one plan by name")
    for name, one in plans.items():
        if not isinstance(name, str):
            raise PlanError(f"plan: found {name!r} as a plan's name, expected a string")
        if not isinstance(one, Plan):
            raise PlanError(f"plan: found {type(one).__name__}, expected an austeer.Plan, or a dictionary name -> Plan")
    return plans
