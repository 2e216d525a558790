"""How strongly: alpha and k as the user gives them, for every plan and site."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import PlanError, SteeringError, check_count
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

    # --- k -----------------------------------------------------------------------------------------------------------

    def set_k(self, k: int | Mapping[str, int] | None) -> None:
        """Raises PlanError: more AUs than a plan has, or less than one. SteeringError: other plans than there are."""
        given = self._for_each("k", k)
        new: dict[str, int] = {}
        for name, plan in self._plans.items():
            what = f"the AUs of plan {name!r}" if self._named else "the plan's AUs"
            value = len(plan) if given[name] is None else given[name]
            new[name] = check_count("k", value, len(plan), what, PlanError)
        self._k = new

    def k(self) -> int | dict[str, int]:
        return _shortest(self._k)

    def _for_each(self, what: str, given: Any) -> dict[str, Any]:
        if not self._named or not isinstance(given, Mapping):
            return dict.fromkeys(self._plans, given)
        if set(given) != set(self._plans):
            raise SteeringError(
                f"{what}: found plans {sorted(map(str, given))}, expected {sorted(self._plans)}, or one number for all"
            )
        return {name: given[name] for name in self._plans}


def _by_site(alpha: Any, plan: Plan) -> dict[str, float]:
    values = dict(alpha) if isinstance(alpha, Mapping) else dict.fromkeys(plan.sites, alpha)
    if set(values) != set(plan.sites):
        raise SteeringError(f"alpha: found sites {sorted(map(str, values))}, expected {sorted(plan.sites)}")
    return {name: check_alpha(value, SteeringError, f" for site {name!r}") for name, value in values.items()}


def _shortest(values: Mapping[str, Any]) -> Any:
    """The one value that all have, or a copy of the whole."""
    first = next(iter(values.values()))
    return first if all(value == first for value in values.values()) else dict(values)
