"""AUs by effect per side effect: what a shift does to the wanted log-odds, for what it does to neutral text.

With g the effect of each AU (:meth:`austeer.Momentum.effect`) and r the rows of a profile (:class:`austeer.Profile`),
for small shifts s

    effect(s) = g . s,    KL(s) = s' M s,    M = sum(r r') / (2 sum(n))

Two kinds of step: the mean difference, s = delta (where it has the sign of g), and Newton's, s = M^-1 g, which has the
largest effect at a given KL. AUs are chosen one by one, each time the one with which the effect at equal KL grows most:
forward selection, for Newton's step as by a Cholesky factorisation with pivots. Off its diagonal M is drawn towards 0:
draws are few, and what seems to cancel between two AUs is partly chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..counters import Counters
from ..errors import SelectionError, check_count
from ..models.sites import Fingerprint
from ..plans.table import STEPPED_BY
from .profile import Profile

#: Part of the mean diagonal of a site's M that is added to it: AUs that seem to have no side effect are mostly those
#: that were not seen to.
DAMPING = 0.001

#: How far M is drawn towards its diagonal.
SHRINKAGE = 0.8

#: AUs that are looked at together: those of the largest effect for their side effect, each alone.
POOL = 2000

#: Numbers of AUs at which effects are predicted.
KS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300)

#: Parts of a profile's texts, of which each judges what the others have chosen.
FOLDS = 4

#: As few AUs are taken as have this part of the largest predicted effect.
ENOUGH = 0.95


class Effects(Protocol):
    """What is needed of a momentum."""

    @property
    def model(self) -> Fingerprint: ...
    @property
    def layers(self) -> tuple[int, ...]: ...
    @property
    def pairs(self) -> int: ...
    def counters(self, site: str) -> Counters: ...
    def effect(self, site: str) -> Tensor: ...
    def halves(self) -> tuple[Effects, Effects]: ...


@dataclass(frozen=True)
class Candidates:
    """The AUs of some sites, one after the other.

    Attributes:
        sites: their names. sizes: AUs of each. g, delta, diagonal: float64 [AUs]. rows: float32 [draws, AUs]; M is
            rows' rows, and ``diagonal`` is its diagonal. scale: float64 [AUs], the mean of the diagonal of each one's
            site: what a small diagonal is small against.
    """

    sites: tuple[str, ...]
    sizes: tuple[int, ...]
    g: Tensor
    delta: Tensor
    diagonal: Tensor
    rows: Tensor
    scale: Tensor

    @classmethod
    def of(cls, momentum: Effects, profile: Profile, sites: Sequence[str]) -> Candidates:
        """Raises SelectionError: a site or layer that has no effects or profile, or a profile of another model."""
        profile.check(momentum.model)
        found = [profile.scaled(site, momentum.layers) for site in sites]
        return cls(
            tuple(sites),
            tuple(momentum.counters(site).positive.numel() for site in sites),
            *_effects(momentum, sites),
            torch.cat([diagonal.flatten() for _, diagonal in found]),
            torch.cat([rows.flatten(1) for rows, _ in found], 1),
            torch.cat([diagonal.mean().expand(diagonal.numel()) for _, diagonal in found]),
        )

    def usable(self, step: str) -> Tensor:
        """bool [AUs], which have an effect, and by their mean difference one of its sign."""
        return self.g * self.delta > 0 if step == "difference" else self.g != 0

    def take(self, units: Tensor) -> Candidates:
        """Some of them; ``sites`` and ``sizes`` stay those of all."""
        g, delta, diagonal = self.g[units], self.delta[units], self.diagonal[units]
        rows = self.rows[:, units].contiguous()
        return replace(self, g=g, delta=delta, diagonal=diagonal, rows=rows, scale=self.scale[units])

    def kl(self, order: Tensor, steps: Tensor) -> float:
        """The KL of shifts of some AUs, nats a token."""
        return float((self.rows[:, order].double() @ steps).square().sum())

    def per_side_effect(self, order: Tensor, steps: Tensor) -> float:
        """The effect of shifts at a KL of 1 nat a token, as far as it is linear: nats."""
        kl = self.kl(order, steps)
        return float(self.g[order] @ steps) / math.sqrt(kl) if kl > 0 else 0.0


def _effects(momentum: Effects, sites: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The effects and mean differences of the AUs of some sites, one after the other: float64 [AUs] each."""
    g = [momentum.effect(site).flatten() for site in sites]
    delta = [(momentum.counters(site).delta_sum / momentum.pairs).flatten() for site in sites]
    return torch.cat(g), torch.cat(delta)


@dataclass(frozen=True)
class Choice:
    """AUs in the order in which they were chosen.

    Attributes:
        order: int64 [k]. delta: float64 [k], their mean differences. factor: for Newton's step the Cholesky factor of
            the chosen AUs' M, float64 [k, k], and ``target`` its solution for their g, float64 [k]: a smaller k has the
            first of both.
    """

    order: Tensor
    delta: Tensor
    factor: Tensor | None = None
    target: Tensor | None = None

    def steps(self, k: int) -> Tensor:
        """The shifts of the first k: float64 [k]."""
        if self.factor is None or self.target is None:
            return self.delta[:k]
        return torch.linalg.solve_triangular(self.factor[:k, :k].T, self.target[:k, None], upper=True)[:, 0]


def choose(found: Candidates, k: int, step: str, *, damping: float = DAMPING, shrinkage: float = SHRINKAGE) -> Choice:
    """The k AUs of the largest effect for their side effect.

    Args:
        step: "difference" or "newton". damping: part of the mean diagonal that is added to it. shrinkage: how far M is
            drawn towards its diagonal; 1 takes no notice of AUs' acting together.

    Raises:
        SelectionError: fewer than k AUs have a step.
    """
    if step not in STEPPED_BY:
        raise SelectionError(f"step: found {step!r}, expected one of {', '.join(STEPPED_BY)}")
    diagonal = found.diagonal + damping * found.scale
    usable = found.usable(step) & (diagonal > 0)
    if not usable.any():
        raise SelectionError(
            f"{' and '.join(found.sites)}: found no AU with an effect, expected some; give other pairs"
        )
    of = f"AUs of {' and '.join(found.sites)} that have an effect"
    k = check_count("k", k, int(usable.sum()), of if step == "newton" else f"{of} of delta's sign", SelectionError)
    alone = torch.where(usable, found.g.abs() / diagonal.clamp(min=1e-300).sqrt(), -1.0)
    pool = alone.argsort(descending=True, stable=True)[: min(max(POOL, 4 * k), int(usable.sum()))]
    choice = (_by_difference if step == "difference" else _by_newton)(found.take(pool), k, diagonal[pool], shrinkage)
    return replace(choice, order=pool[choice.order])


def _by_difference(found: Candidates, k: int, diagonal: Tensor, shrinkage: float) -> Choice:
    gains, own = found.g * found.delta, diagonal * found.delta.square()
    moved = torch.zeros(len(found.rows), dtype=torch.float64, device="cpu")
    free, order = torch.ones_like(diagonal, dtype=torch.bool), list[int]()
    effect, together, apart = 0.0, 0.0, 0.0
    for _ in range(k):
        cross = (found.rows.T @ moved.float()).double() * found.delta
        kl = (1 - shrinkage) * (together + 2 * cross) + shrinkage * apart + own
        score = torch.where(free & (kl > 0), (effect + gains) / kl.clamp(min=1e-300).sqrt(), -math.inf)
        best = int(score.argmax())
        free[best] = False
        order.append(best)
        moved += found.rows[:, best].double() * found.delta[best]
        effect, apart = effect + float(gains[best]), apart + float(own[best])
        together = float(moved.square().sum())
    chosen = torch.tensor(order, device="cpu")
    return Choice(chosen, found.delta[chosen])


def _by_newton(found: Candidates, k: int, diagonal: Tensor, shrinkage: float) -> Choice:
    """Cholesky's factorisation of the shrunk M, row by row; a pivot is the AU of the largest gain."""
    rest, left, free = diagonal.clone(), found.g.clone(), torch.ones_like(diagonal, dtype=torch.bool)
    rows = torch.zeros(k, len(found.g), dtype=torch.float64, device="cpu")
    order: list[int] = []
    for number in range(k):
        gain = torch.where(free & (rest > 1e-9 * diagonal), left.square() / rest, -math.inf)
        best = int(gain.argmax())
        free[best] = False
        row = (1 - shrinkage) * (found.rows.T @ found.rows[:, best]).double()
        row[best] = diagonal[best]
        row -= rows[:number].T @ rows[:number, best]
        row /= rest[best].sqrt()
        rows[number] = row
        left = left - row * (left[best] / rest[best].sqrt())
        rest = rest - row.square()
        order.append(best)
    chosen = torch.tensor(order, device="cpu")
    factor = rows[:, chosen].T.tril()
    target = torch.linalg.solve_triangular(factor, found.g[chosen][:, None], upper=False)[:, 0]
    return Choice(chosen, found.delta[chosen], factor, target)


@dataclass(frozen=True)
class EffectCurve:
    """The effect that k AUs are predicted to have at a KL of 1 nat a token: at a smaller one its square root of that.

    Each half of the pairs and of the texts chooses, and what it chose is judged by the other halves, so that what is
    chosen for its errors does not count; with half the data a large k does a little worse than with all of it.

    Attributes:
        sites: of the AUs. k: ascending. effect: nats, as far as it is linear.
    """

    sites: tuple[str, ...]
    k: tuple[int, ...]
    effect: tuple[float, ...]

    @property
    def best(self) -> float:
        """The largest effect."""
        return max(self.effect)

    @property
    def enough(self) -> int:
        """The smallest k that has ``ENOUGH`` of it."""
        return next(k for k, effect in zip(self.k, self.effect) if effect >= ENOUGH * self.best)


def effect_curve(momentum: Effects, profile: Profile, sites: Sequence[str], step: str) -> EffectCurve:
    """How the predicted effect depends on the number of AUs.

    Raises:
        SelectionError: no effects, no profile of a site, no halves, or no AU with an effect.
    """
    folds = [
        Candidates.of(*half, sites) for half in zip(momentum.halves(), profile.halves())
    ]  # the second is what the first has not seen
    effects: list[list[float]] = []
    for seen, unseen in (folds, folds[::-1]):
        choice = choose(seen, min(max(KS), int(seen.usable(step).sum())), step)
        ks = [k for k in KS if k <= len(choice.order)]
        effects.append([unseen.per_side_effect(choice.order[:k], choice.steps(k)) for k in ks])
    found = tuple((a + b) / 2 for a, b in zip(*effects))
    if not max(found) > 0:
        raise SelectionError(
            f"{' and '.join(sites)}: found no number of AUs whose effect one half of the pairs predicts for the other; "
            "give more pairs, or k"
        )
    return EffectCurve(tuple(sites), KS[: len(found)], found)


def kl_ratio(momentum: Effects, profile: Profile, sites: Sequence[str], step: str, count: int) -> list[float]:
    """How many times larger than on the texts that AUs were chosen by their KL is on others, for 1, 2, ... AUs.

    The mean over ``FOLDS`` parts of the texts, for each of which the others choose; 1 where there is one text alone.
    """
    if len(profile.texts.unique()) < 2:
        return [1.0] * count
    ks = [k for k in KS if k < count] + [count]
    logs = torch.zeros(len(ks), dtype=torch.float64, device="cpu")
    splits = profile.splits(FOLDS)
    for rest, part in splits:
        seen, unseen = (Candidates.of(momentum, half, sites) for half in (rest, part))
        choice = choose(seen, count, step)
        for i, k in enumerate(ks):
            order, steps = choice.order[:k], choice.steps(k)
            ratio = unseen.kl(order, steps), seen.kl(order, steps)
            logs[i] += math.log(ratio[0] / ratio[1]) / len(splits) if min(ratio) > 0 else 0.0
    return [math.exp(max(value, 0.0)) for value in _between(ks, logs, count)]


def effect_ratio(momentum: Effects, profile: Profile, sites: Sequence[str], step: str, count: int) -> list[float]:
    """What part of the effect on the pairs that AUs were chosen by they have on others, for 1, 2, ... AUs.

    The halves of the pairs choose, and each judges what the other chose; from halves to all pairs by the formula of
    Spearman and Brown, 2 r / (1 + r), as what they do not share falls with their number. 1 where there are no halves.
    """
    try:
        halves = momentum.halves()
    except SelectionError:
        return [1.0] * count
    whole = Candidates.of(momentum, profile, sites)
    sides = []
    for half in halves:
        g, delta = _effects(half, sites)
        sides.append(replace(whole, g=g, delta=delta))
    most = min(count, *(int(side.usable(step).sum()) for side in sides))
    if most == 0:
        return [0.0] * count
    ks = [k for k in KS if k < most] + [most]
    parts = torch.zeros(len(ks), dtype=torch.float64, device="cpu")
    for seen, unseen in (sides, sides[::-1]):
        choice = choose(seen, most, step)
        for i, k in enumerate(ks):
            order, steps = choice.order[:k], choice.steps(k)
            parts[i] += float(unseen.g[order] @ steps) / float(seen.g[order] @ steps) / 2
    parts = parts.clamp(0.0, 1.0)
    return _between(ks, 2 * parts / (1 + parts), count)


def _between(ks: Sequence[int], values: Tensor, count: int) -> list[float]:
    """For 1, 2, ... ``count`` AUs, between values at some numbers of them, straight on a logarithmic axis."""
    found: list[float] = np.interp(np.log(range(1, count + 1)), np.log(ks), values.numpy()).tolist()
    return found


def site_sets(sites: Sequence[str]) -> list[tuple[str, ...]]:
    """Each site by itself, and all of them together."""
    return [(site,) for site in sites] + ([tuple(sites)] if len(sites) > 1 else [])


def best_sites(momentum: Effects, profile: Profile, sites: Sequence[str], step: str) -> list[EffectCurve]:
    """The curve of each site that has one, and of all of them together, the largest predicted effect first.

    Raises:
        SelectionError: none has.
    """
    curves: list[EffectCurve] = []
    reasons: list[SelectionError] = []
    for kind in site_sets(sites):
        try:
            curves.append(effect_curve(momentum, profile, kind, step))
        except SelectionError as error:  # a site without an effect is only not the best
            reasons.append(error)
    if not curves:
        raise reasons[0]
    return sorted(curves, key=lambda curve: -curve.best)
