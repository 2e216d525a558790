"""Doses of plans on a model: predicted by a profile, and corrected by what a strength is seen to do."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace

from torch import nn

from ..errors import SelectionError, SteeringError, SteeringWarning
from ..forward.logits import expect_head
from ..momentum.profile import Profile
from ..plans.dose import Point, some_ids
from ..plans.plan import Plan
from .side_effects import ByRows, side_effects_of
from .strength import dose_of

#: Strengths that are tried, at most; and how near to the KL that is asked for is near enough.
STEPS, NEAR = 2, 0.05

#: A measured KL so many times larger or smaller than the predicted one is told of.
FAR = 2.0

#: Steers with the plans, each by its name, at these strengths.
Probe = Callable[[Mapping[str, float]], AbstractContextManager[ByRows]]


def plans_with_doses(plans: Mapping[str, Plan], profile: Profile | None) -> dict[str, Plan]:
    """The plans, each with its dose.

    Raises:
        SteeringError: a plan that has none and gets none: there is no profile, or it is none for this plan.
    """
    found = dict(plans)
    for name, plan in plans.items():
        if plan.dose is None and profile is not None:
            try:
                found[name] = plan.with_dose(profile.dose(plan))
            except SelectionError as error:
                raise SteeringError(f"kl: {error}") from error
        dose_of(found[name], name)
    return found


def measured_doses(
    model: nn.Module,
    plans: Mapping[str, Plan],
    kls: Mapping[str, float],
    ks: Mapping[str, int],
    profile: Profile | None,
    probe: Probe,
) -> dict[str, Plan]:
    """The plans with what the strengths for the wanted KL were seen to do.

    Args:
        kls, ks: for each plan the KL that is wanted, nats a token, and how many AUs are steered.

    Raises:
        SteeringError: no text to measure on, a KL that is no number, or one that is not reached.
    """
    found = dict(plans)
    for step in range(STEPS):
        alphas = {name: dose_of(plan).alpha(kls[name], ks[name]) for name, plan in found.items()}
        waiting = [name for name in found if not _known(found[name], ks[name], alphas[name], kls[name])]
        if not waiting:
            break
        if step == 0:
            expect_head(model)
        texts: dict[tuple[tuple[int, ...], ...], list[str]] = {}
        for name in waiting:
            texts.setdefault(_ids(found[name], name, profile), []).append(name)
        with probe(alphas) as steering:
            for ids, names in texts.items():
                for name, (kl, _) in zip(names, side_effects_of(model, ids, steering, names).mean()):
                    if not math.isfinite(kl):
                        raise SteeringError(
                            f"kl: found a KL of {kl} at alpha = {alphas[name]:.4g}, expected a number; load the model "
                            "in bfloat16 or float32"
                        )
                    if step == 0:
                        _warn_where_far(name, alphas[name], kl, kls[name])
                    point = Point(ks[name], alphas[name], max(kl, 0.0))
                    found[name] = replace(found[name], dose=dose_of(found[name]).with_measured([point]))
    for name, plan in found.items():
        seen = [point for point in dose_of(plan).measured if point.k == ks[name]]
        strongest = max(seen, key=lambda point: point.alpha)
        if strongest.kl * FAR < kls[name]:
            raise SteeringError(
                f"kl: found {kls[name]:g} nats a token, and at alpha = {strongest.alpha:.4g} the plan was measured to "
                f"have {strongest.kl:.3g}: it is far outside of the range in which KL grows with the strength; "
                "expected a smaller kl, or give alpha"
            )
    return found


def _known(plan: Plan, k: int, alpha: float, kl: float) -> bool:
    """Whether this strength, or one nearly like it, was measured to do nearly that."""
    near = [p for p in dose_of(plan).measured if p.k == k and abs(p.kl / kl - 1) <= NEAR]
    return any(abs(point.alpha / alpha - 1) <= NEAR for point in near)


def _ids(plan: Plan, name: str, profile: Profile | None) -> tuple[tuple[int, ...], ...]:
    ids = dose_of(plan).ids or (() if profile is None else some_ids(profile.ids))
    if not ids:
        raise SteeringError(
            f"kl: found no neutral text to measure plan {name!r} on: a user's own does not travel with a plan. Give "
            "steer the profile, or exact=False to steer with the predicted strength"
        )
    return ids


def _warn_where_far(name: str, alpha: float, kl: float, wanted: float) -> None:
    if not wanted / FAR <= kl <= wanted * FAR:
        of = f" of plan {name!r}" if name else ""
        warnings.warn(
            f"kl: at the strength{of} predicted for {wanted:.3g} nats a token (alpha = {alpha:.4g}) {kl:.3g} were "
            "measured: it is outside of the range in which effects grow with the strength. It is corrected; a smaller "
            "kl is predicted better",
            SteeringWarning,
            stacklevel=4,
        )
