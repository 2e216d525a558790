"""Dose and response of a plan: which KL a strength costs, and which effect it has, as predicted and as measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Real
from typing import Any

from torch import Tensor

from ..errors import AusteerError, PlanError
from .evidence import check_text

#: Nats a token beyond all that can be meant.
LARGEST_KL = 1e6

#: Tokens on which the KL of a steering is measured: whole texts, at most so many in all.
MEASURED_TOKENS = 512

#: Tokens that a plan carries to measure on, and measured strengths, at most.
MOST_TOKENS, MOST_POINTS = 4096, 100

#: KLs and strengths beyond it, and measured ones below 1 / LARGEST, are no measurements, and powers of them no numbers.
LARGEST = 1e30


@dataclass(frozen=True)
class Point:
    """What one strength of the first k AUs was measured to do: KL(unsteered || steered), nats a token."""

    k: int
    alpha: float
    kl: float


@dataclass(frozen=True)
class Dose:
    """What a plan of shifts does at the strength alpha, to first order of its shifts.

    Attributes:
        kl: of the first 1, 2, ... AUs, KL(unsteered || steered) on neutral text at alpha = 1, nats a token; it grows
            with alpha squared.
        effect: the same of the mean change of log p(positive) - log p(negative), nats, which grows with alpha; empty
            where it is not known.
        error: the relative standard error of ``kl``. texts: what the neutral text is called.
        ids: token ids of neutral texts to measure on; none where that text is not to travel with a plan.
        measured: what was measured on such text, which corrects ``kl``.

    Raises:
        PlanError: a number that is not finite, or fewer than none.
    """

    kl: tuple[float, ...]
    effect: tuple[float, ...] = ()
    error: float = 0.0
    texts: str = "neutral text"
    ids: tuple[tuple[int, ...], ...] = ()
    measured: tuple[Point, ...] = ()

    def __post_init__(self) -> None:
        check_text("dose: texts", self.texts)
        if not self.kl or any(not 0 <= value <= LARGEST for value in (*self.kl, self.error)):
            raise PlanError(
                f"dose: found a KL that is negative, beyond {LARGEST:g} or no number, expected one for each k"
            )
        if self.effect and (len(self.effect) != len(self.kl) or not all(map(math.isfinite, self.effect))):
            raise PlanError(f"dose: found {len(self.effect)} effects, expected {len(self.kl)} finite ones, or none")
        if sum(map(len, self.ids)) > MOST_TOKENS or len(self.measured) > MOST_POINTS:
            raise PlanError(f"dose: found more than {MOST_TOKENS} tokens or {MOST_POINTS} measured strengths")
        for point in self.measured:
            if not 1 <= point.k <= len(self.kl) or not (_usable(point.alpha) and (point.kl == 0 or _usable(point.kl))):
                raise PlanError(f"dose: found the measured strength {point}, expected positive numbers")

    def alpha(self, kl: float, k: int | None = None) -> float:
        """The strength at which the KL of the first k AUs is ``kl`` nats a token, as far as is known.

        Raises:
            PlanError: ``kl`` is not a positive number, or the plan changes nothing on neutral text.
        """
        kl = positive_kl(kl, PlanError)
        curve = self._curve(k)
        if curve is None:
            raise PlanError("kl: found a plan that changes nothing on neutral text, expected one that does; give alpha")
        return curve.alpha(kl)

    def kl_of(self, alpha: float, k: int | None = None) -> float:
        """The KL of the first k AUs at a strength, nats a token, as far as is known."""
        curve = self._curve(k)
        return 0.0 if curve is None or alpha == 0 else curve.kl(abs(alpha))

    def effect_of(self, alpha: float, k: int | None = None) -> float | None:
        """The predicted effect of the first k AUs at a strength, nats; None where it is not known."""
        return self.effect[(k or len(self.kl)) - 1] * alpha if self.effect else None

    def top(self, k: int) -> Dose:
        """That of the first k AUs."""
        measured = tuple(point for point in self.measured if point.k <= k)
        return replace(self, kl=self.kl[:k], effect=self.effect[:k], measured=measured)

    def with_measured(self, points: Iterable[Point]) -> Dose:
        """The same with further measured strengths."""
        found = {(point.k, point.alpha): point for point in (*self.measured, *points)}
        return replace(self, measured=tuple(found[key] for key in sorted(found)))

    def to_json(self) -> dict[str, Any]:
        """All but the two columns, which are tensors of a file."""
        found = asdict(self)
        del found["kl"], found["effect"]
        return found

    @classmethod
    def from_json(cls, data: dict[str, Any], kl: tuple[float, ...], effect: tuple[float, ...]) -> Dose:
        """Raises PlanError, TypeError or ValueError where ``data`` is none."""
        rest = dict(data)
        ids = tuple(tuple(int(token) for token in row) for row in rest.pop("ids"))
        measured = tuple(Point(**point) for point in rest.pop("measured"))
        return cls(kl=kl, effect=effect, ids=ids, measured=measured, **rest)

    def _curve(self, k: int | None) -> _Curve | None:
        """What is known of the first k AUs; None if they change nothing.

        Where nothing was measured of so many, what was of the nearest number corrects their prediction.
        """
        k = k or len(self.kl)
        predicted = self.kl[k - 1]
        known = {point.k for point in self.measured if self.kl[point.k - 1] > 0}
        nearest = min(known, key=lambda other: (abs(other - k), other), default=k)
        scale = 1.0 if nearest == k else predicted / self.kl[nearest - 1]
        points: list[tuple[float, float]] = []
        for point in sorted(self.measured, key=lambda point: point.alpha):
            if point.k == nearest and point.kl * scale > (points[-1][1] if points else 0.0):
                points.append((point.alpha, point.kl * scale))
        return _Curve(predicted, points) if predicted > 0 or points else None


@dataclass(frozen=True)
class _Curve:
    """KL by strength: ``predicted`` * alpha^2 for small ones, through the measured points, and straight on beyond them.

    Between points it is straight on logarithmic axes. From 0 to the first point (a, K) it is

        q alpha^2 / (1 + (q a^2 / K - 1) alpha / a),    q = predicted

    which keeps to the prediction where shifts are small, and goes through the point; or where that has more than was
    predicted the square of alpha through it, as the prediction was too small.

    Attributes:
        points: (alpha, KL), ascending in both.
    """

    predicted: float
    points: list[tuple[float, float]]

    def kl(self, alpha: float) -> float:
        if not self.points or alpha < self.points[0][0]:
            q = self._start()
            return q * alpha**2 / (1 + self._bend(q) * alpha)
        return math.exp(_straight([(math.log(a), math.log(kl)) for a, kl in self.points], math.log(alpha)))

    def alpha(self, kl: float) -> float:
        if not self.points or kl < self.points[0][1]:
            q = self._start()
            half = kl * self._bend(q) / 2  # of q alpha^2 - 2 half alpha - kl = 0
            return (half + math.sqrt(half**2 + q * kl)) / q
        return math.exp(_straight([(math.log(kl), math.log(a)) for a, kl in self.points], math.log(kl), (1 / 4, 2.0)))

    def _start(self) -> float:
        return max([self.predicted] + [kl / alpha**2 for alpha, kl in self.points[:1]])

    def _bend(self, q: float) -> float:
        if not self.points:
            return 0.0
        alpha, kl = self.points[0]
        return (q * alpha**2 / kl - 1) / alpha


def _straight(points: list[tuple[float, float]], x: float, slopes: tuple[float, float] = (0.5, 4.0)) -> float:
    """Straight between points, and beyond the last as between the last two: as a square, where there is one."""
    place = max(i for i, (at, _) in enumerate(points) if at <= x or i == 0)
    at, value = points[place]
    if len(points) == 1:
        return value + (2.0 if slopes[1] > 2 else 0.5) * (x - at)
    low = min(place, len(points) - 2)
    slope = (points[low + 1][1] - points[low][1]) / (points[low + 1][0] - points[low][0])
    if place == len(points) - 1:
        slope = min(max(slope, slopes[0]), slopes[1])
    return value + slope * (x - at)


def _usable(value: float) -> bool:
    return 1 / LARGEST <= value <= LARGEST


def positive_kl(kl: object, error: type[AusteerError]) -> float:
    """``kl`` as a float; raises ``error`` unless it is a positive number."""
    if isinstance(kl, bool) or not isinstance(kl, Real) or not 0 < kl < LARGEST_KL:  # type: ignore[operator]
        raise error(f"kl: found {kl!r}, expected a positive number of nats a token, for example 0.1")
    return float(kl)


def some_ids(ids: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
    """The first texts, of ``MEASURED_TOKENS`` tokens at most; the beginning of the first where it is longer."""
    found: list[tuple[int, ...]] = []
    left = MEASURED_TOKENS
    for row in ids:
        if found and len(row) > left:
            break
        found.append(tuple(row[:left].tolist()))
        left -= len(found[-1])
    return tuple(found)


def line_of(text: str) -> str:
    """A name of texts as a plan may hold it: one short line."""
    line = "".join(letter if letter.isprintable() else " " for letter in text)
    return line if len(line) <= 200 else f"{line[:197]}..."
