"""Groups of AUs, steered together by their mean differences: how far is what they do the sum of what gradients say?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..momentum.momentum import Momentum
from ..momentum.profile import Profile
from ..momentum.selection import plan_of
from ..plans.plan import Plan
from .runner import Job
from .sample import gains
from .statistics import Interval, linearity

#: Strengths of the mean differences: one at which nearly everything is linear, and two that plans are steered with.
ALPHAS = (1.0, 4.0, 16.0)


@dataclass(frozen=True)
class Group:
    """AUs that were steered together.

    Attributes:
        kind: how they were chosen, see :func:`austeer.causal.sample.draw_groups`. units: (layer, index) of each.
        predicted: the sum of their effects times their mean differences, nats: the effect of alpha 1.
        kl: the predicted KL on neutral text at alpha 1, nats a token; None without a profile.
        raised: half the difference of the log-odds between alpha and -alpha, mean over items, nats, of each alpha.
    """

    kind: str
    units: tuple[tuple[int, int], ...]
    predicted: float
    kl: float | None
    raised: tuple[float, ...]


@dataclass(frozen=True)
class Strength:
    """All groups at one strength.

    Attributes:
        correlation: Pearson's, of the predicted with the measured effects. slope: the measured effect for one nat of
            predicted effect, of a line through zero: 1 where shifts are small. Both with 95 % intervals, over groups
            and items.
        means: for each kind the mean predicted and the mean measured effect, nats.
        kl: for each kind the median predicted KL, nats a token; empty without a profile.
    """

    alpha: float
    correlation: Interval
    slope: Interval
    means: dict[str, tuple[float, float]]
    kl: dict[str, float]


@dataclass(frozen=True)
class Together:
    """Groups, and what all of them show at each strength."""

    groups: list[Group]
    strengths: list[Strength]


def _places(plan: Plan) -> tuple[tuple[int, int], ...]:
    return tuple(zip(plan.layer.tolist(), plan.index.tolist()))


def jobs_of(momentum: Momentum, site: str, chosen: Mapping[str, Tensor], alphas: Sequence[float]) -> list[Job]:
    """A job for each group and strength: first all groups at the first strength."""
    found = []
    for alpha in alphas:
        for units in (row for rows in chosen.values() for row in rows):
            plan = plan_of(momentum, site, units, "shift")
            names = " ".join(f"{layer}:{index}" for layer, index in _places(plan))
            found.append(Job(f"together {alpha!r} {names}", plan, alpha))
    return found


def together(
    momentum: Momentum,
    site: str,
    chosen: Mapping[str, Tensor],
    alphas: Sequence[float],
    raised: np.ndarray,
    items: Sequence[str],
    profile: Profile | None = None,
    seed: int = 0,
) -> Together:
    """
    Args:
        chosen: kind -> int64 [groups, AUs]. raised: [alphas * groups, items], nats, of :func:`jobs_of`.
        items: the group of each item, which are resampled together.
    """
    kinds = np.array([kind for kind, rows in chosen.items() for _ in rows])
    rows = [row for rows in chosen.values() for row in rows]
    gain = gains(momentum, site)
    predicted = np.array([float(gain[row].sum()) for row in rows])
    plans = [plan_of(momentum, site, row, "shift") for row in rows]
    kl = None if profile is None else np.array([profile.kl(plan) for plan in plans])
    effects = raised.reshape(len(alphas), len(rows), -1)
    means = effects.mean(-1)  # [alphas, groups]
    groups = [
        Group(
            kind=str(kinds[i]),
            units=_places(plan),
            predicted=float(predicted[i]),
            kl=None if kl is None else float(kl[i]),
            raised=tuple(means[:, i].tolist()),
        )
        for i, plan in enumerate(plans)
    ]
    strengths = []
    for alpha, effect, mean in zip(alphas, effects, means):
        expected = alpha * predicted
        members = {kind: kinds == kind for kind in chosen}
        strengths.append(
            Strength(
                alpha,
                *linearity(expected, effect, items, seed),
                means={k: (float(expected[own].mean()), float(mean[own].mean())) for k, own in members.items()},
                kl={} if kl is None else {k: float(alpha**2 * np.median(kl[own])) for k, own in members.items()},
            )
        )
    return Together(groups, strengths)
