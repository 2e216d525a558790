"""Strengths of plans as the commands take them: ``--alpha``, or ``--kl`` and ``--profile``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torch import nn

    from ..momentum.profile import Profile
    from ..plans.plan import Plan

KL = Annotated[
    list[str] | None,
    typer.Option(
        "--kl",
        metavar="NATS",
        help="Instead of --alpha: the KL on neutral text that is allowed, nats a token, for example 0.1; as many as of "
        "--alpha. Of plans with the operation shift that have a dose, or with --profile.",
        show_default=False,
    ),
]
ProfileFile = Annotated[
    Path | None,
    typer.Option(
        "--profile",
        help="With --kl, for plans without a dose: the model's file of austeer profile.",
        show_default=False,
    ),
]


def parse_alphas(values: Sequence[str] | None) -> list[float]:
    """The strengths of ``--alpha``: repeated, or several with commas between."""
    return _numbers("--alpha", values, "a number such as -2.5, or several: 2,-2")


def parse_kls(values: Sequence[str] | None, alphas: Sequence[object], profile: Path | None) -> list[float]:
    """The side effects of ``--kl``, as :func:`parse_alphas`; raises AusteerError beside ``--alpha``."""
    from ..errors import AusteerError

    if not values:
        if profile is not None:
            raise AusteerError(f"--profile: found {profile} and no --kl, expected both; a profile says what a KL takes")
        return []
    if alphas:
        raise AusteerError(f"found both --alpha {alphas[0]} and --kl {values[0]}, expected one of them")
    return _numbers("--kl", values, "a positive number of nats a token, such as 0.1, or several: 0.02,0.1", above=0.0)


def _numbers(option: str, values: Sequence[str] | None, expected: str, above: float = -math.inf) -> list[float]:
    from ..errors import AusteerError

    found = []
    for text in (part for value in values or () for part in value.split(",")):
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not above < number < math.inf:
            raise AusteerError(f"{option}: found {text.strip()!r}, expected {expected}")
        found.append(number)
    return found


def with_doses(plans: Mapping[str, Plan], file: Path | None) -> tuple[dict[str, Plan], Profile | None]:
    """The plans, each with its dose, and the profile in ``file``, if there is one.

    Raises:
        SteeringError: a plan that has no dose and gets none.
    """
    from ..momentum.profile import Profile
    from ..steering.doses import plans_with_doses

    profile = None if file is None else Profile.load(file)
    return plans_with_doses(plans, profile), profile


def alphas_at(
    model: nn.Module,
    plans: Mapping[str, Plan],
    kls: Mapping[str, float],
    ks: Mapping[str, int | None],
    profile: Profile | None,
) -> dict[str, float]:
    """For each plan the strength at which it has its KL on this model, as measured on neutral text.

    Raises:
        SelectionError, SteeringError, PlanError, CaptureError: as :func:`austeer.steer`.
    """
    from ..steering.steer import steer

    counts = {name: len(plan) if (k := ks[name]) is None else k for name, plan in plans.items()}
    found = steer(model, plans, kl=kls, k=counts, profile=profile).alpha
    return found if isinstance(found, dict) else dict.fromkeys(plans, found)
