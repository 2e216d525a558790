"""AUs by effect per side effect: what a shift does to the wanted log-odds, for what it does to neutral text.

With g the effect of each AU (:meth:`austeer.Momentum.effect`) and r the rows of a profile (:class:`austeer.Profile`), for
small shifts s

    effect(s) = g . s,    KL(s) = s' M s,    M = sum(r r') / (2 sum(n))

Two kinds of step: the mean difference, s = delta (where it has the sign of g), and Newton's, s = M^-1 g, which has the
largest effect at a given KL. AUs are chosen one by one, each time the one with which the effect at equal KL grows most:
forward selection, as by a Cholesky factorisation with pivots. Off its diagonal M is drawn towards 0, since rows are
few: what seems to cancel between two AUs is partly chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SelectionError
from .momentum import Momentum
from .profile import Profile

STEPS = ("difference", "newton")

#: Part of M's mean diagonal that is added to it: AUs that seem to have no side effect are mostly those not seen to.
DAMPING = 0.001

#: How far M is drawn towards its diagonal.
SHRINKAGE = 0.5


@dataclass(frozen=True)
class Candidates:
    """The AUs of some sites, one after the other.

    Attributes:
        sites: their names. units: AUs of each. g, delta, diagonal: float64 [AUs]. rows: float32 [draws, AUs]; M is
            rows' rows, and ``diagonal`` is its diagonal.
    """

    sites: tuple[str, ...]
    units: tuple[int, ...]
    g: Tensor
    delta: Tensor
    diagonal: Tensor
    rows: Tensor

    @classmethod
    def of(cls, momentum: Momentum, profile: Profile, sites: Sequence[str]) -> Candidates:
        """Raises SelectionError: a site or layer that has no effects or profile, or a profile of another model."""
        profile.check(momentum.model)
        found = [profile.scaled(site, momentum.layers) for site in sites]
        return cls(
            tuple(sites),
            tuple(momentum.counters(site).positive.numel() for site in sites),
            torch.cat([momentum.effect(site).flatten() for site in sites]),
            torch.cat([(momentum.counters(site).delta_sum / momentum.pairs).flatten() for site in sites]),
            torch.cat([diagonal.flatten() for _, diagonal in found]),
            torch.cat([rows.flatten(1) for rows, _ in found], 1),
        )

    def kl(self, order: Tensor, steps: Tensor) -> Tensor:
        """The KL of the first 1, 2, ... of the AUs at ``order`` shifted by ``steps``: float64 [k], nats a token."""
        moved = self.rows[:, order].double() * steps
        return moved.cumsum(1).square().sum(0)

    def effect(self, order: Tensor, steps: Tensor) -> Tensor:
        """The same of the effect, nats."""
        return (self.g[order] * steps).cumsum(0)


@dataclass(frozen=True)
class Choice:
    """AUs in the order in which they were chosen, and their steps: int64 [k], float64 [k]."""

    order: Tensor
    steps: Tensor


def choose(
    found: Candidates,
    k: int,
    step: str = "newton",
    *,
    damping: float = DAMPING,
    shrinkage: float = SHRINKAGE,
    together: bool = True,
    agreeing: bool = False,
) -> Choice:
    """The k AUs of the largest effect for their side effect.

    Args:
        step: "difference" or "newton". damping: part of the mean diagonal that is added to it.
        together: whether the AUs' acting together counts; otherwise each is ranked by |g| / sqrt(M's diagonal).
        agreeing: whether a Newton step, too, takes AUs only whose mean difference has the sign of the effect.

    Raises:
        SelectionError: fewer than k AUs have a step.
    """
    diagonal = found.diagonal + damping * found.diagonal.mean()
    usable = found.g * found.delta > 0 if step == "difference" or agreeing else found.g != 0
    if int(usable.sum()) < k:
        raise SelectionError(
            f"k: found {k}, expected at most {int(usable.sum())}: so many AUs of {', '.join(found.sites)} have an effect"
            + (" of the sign of their mean difference" if step == "difference" or agreeing else "")
        )
    if not together:
        score = torch.where(usable, found.g.abs() / diagonal.sqrt(), -1.0)
        order = score.argsort(descending=True, stable=True)[:k]
        return Choice(order, found.delta[order] if step == "difference" else (found.g / diagonal)[order])
    if step == "difference":
        return _by_difference(found, k, diagonal, shrinkage, usable)
    return _by_newton(found, k, diagonal, shrinkage, usable)


def _by_difference(found: Candidates, k: int, diagonal: Tensor, shrinkage: float, usable: Tensor) -> Choice:
    gains, own = found.g * found.delta, diagonal * found.delta.square()
    moved = torch.zeros(len(found.rows), dtype=torch.float64, device="cpu")
    free, order, effect, spread, diagonal_kl = usable.clone(), [], 0.0, 0.0, 0.0
    for _ in range(k):
        cross = (found.rows.T @ moved.float()).double() * found.delta
        kl = (1 - shrinkage) * spread + shrinkage * diagonal_kl + own + 2 * (1 - shrinkage) * cross
        score = torch.where(free & (kl > 0), (effect + gains) / kl.clamp(min=1e-300).sqrt(), -math.inf)
        best = int(score.argmax())
        free[best] = False
        order.append(best)
        moved += found.rows[:, best].double() * found.delta[best]
        effect, diagonal_kl = effect + float(gains[best]), diagonal_kl + float(own[best])
        spread = float(moved.square().sum())
    chosen = torch.tensor(order, device="cpu")
    return Choice(chosen, found.delta[chosen])


def _by_newton(found: Candidates, k: int, diagonal: Tensor, shrinkage: float, usable: Tensor) -> Choice:
    """Pivoted Cholesky of the shrunk M: W is [chosen, AUs], and a pivot is the AU of the largest gain."""
    rest, left, free = diagonal.clone(), found.g.clone(), usable.clone()
    columns = torch.zeros(k, len(found.g), dtype=torch.float64, device="cpu")
    order: list[int] = []
    for number in range(k):
        gain = torch.where(free & (rest > 1e-9 * diagonal), left.square() / rest, -math.inf)
        best = int(gain.argmax())
        free[best] = False
        column = (1 - shrinkage) * (found.rows.T @ found.rows[:, best]).double()
        column[best] = diagonal[best]
        column -= columns[:number].T @ columns[:number, best]
        column /= rest[best].sqrt()
        columns[number] = column
        left = left - column * (left[best] / rest[best].sqrt())
        rest = rest - column.square()
        order.append(best)
    chosen = torch.tensor(order, device="cpu")
    factor = columns[:, chosen].T.tril()  # L of M = L L', in the order of choice
    steps = torch.cholesky_solve(found.g[chosen][:, None], factor)[:, 0]
    return Choice(chosen, steps)
