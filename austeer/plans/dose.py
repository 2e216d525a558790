"""Dose and response of a plan: which KL a strength costs, and which effect it has, as predicted and as measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from ..errors import PlanError
from .evidence import check_text

#: Tokens on which the KL of a steering is measured: whole texts, at most so many in all.
MEASURED_TOKENS = 512

#: Tokens that a plan carries to measure on, and measured strengths, at most.
MOST_TOKENS, MOST_POINTS = 4096, 100


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
        if not self.kl or any(not 0 <= value < math.inf for value in (*self.kl, self.error)):
            raise PlanError("dose: found a KL that is negative or no number, expected one of each number of AUs")
        if self.effect and (len(self.effect) != len(self.kl) or not all(map(math.isfinite, self.effect))):
            raise PlanError(f"dose: found {len(self.effect)} effects, expected {len(self.kl)} finite ones, or none")
        if sum(map(len, self.ids)) > MOST_TOKENS or len(self.measured) > MOST_POINTS:
            raise PlanError(f"dose: found more than {MOST_TOKENS} tokens or {MOST_POINTS} measured strengths")
        for point in self.measured:
            if not 1 <= point.k <= len(self.kl) or not (0 < point.alpha < math.inf and 0 <= point.kl < math.inf):
                raise PlanError(f"dose: found the measured strength {point}, expected positive numbers")

    def alpha(self, kl: float, k: int | None = None) -> float:
        """The strength at which the KL of the first k AUs is ``kl`` nats a token, as far as is known.

        Raises:
            PlanError: ``kl`` is not a positive number, or the plan changes nothing on neutral text.
        """
        if isinstance(kl, bool) or not isinstance(kl, (int, float)) or not 0 < kl < math.inf:
            raise PlanError(f"kl: found {kl!r}, expected a positive number of nats a token, for example 0.1")
        points = self._points(k)
        if not points:
            raise PlanError("kl: found a plan that changes nothing on neutral text, expected one that does; give alpha")
        alpha, slope = _nearest(points, [known for _, known in points], kl)
        base, known = points[alpha]
        return base * (kl / known) ** (1 / slope)

    def kl_of(self, alpha: float, k: int | None = None) -> float:
        """The KL of the first k AUs at a strength, nats a token, as far as is known."""
        points = self._points(k)
        if not points or alpha == 0:
            return 0.0
        place, slope = _nearest(points, [base for base, _ in points], abs(alpha))
        base, known = points[place]
        return known * (abs(alpha) / base) ** slope

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

    def _points(self, k: int | None) -> list[tuple[float, float]]:
        """(alpha, KL) of what is known of the first k AUs, ascending in both."""
        k = k or len(self.kl)
        points: list[tuple[float, float]] = []
        for point in sorted(self.measured, key=lambda point: point.alpha):
            if point.k == k and point.kl > (points[-1][1] if points else 0.0):
                points.append((point.alpha, point.kl))
        predicted = self.kl[k - 1]
        return points or ([(1.0, predicted)] if predicted > 0 else [])


def _nearest(points: list[tuple[float, float]], values: list[float], wanted: float) -> tuple[int, float]:
    """The point from which to go, and the slope on logarithmic axes.

    Between two points it is theirs; below all it is 2, as for all small shifts; and beyond them that of the last two.
    """
    place = max((i for i, value in enumerate(values) if value <= wanted), default=0)
    if wanted < values[0] or len(points) < 2:
        return place, 2.0
    low = min(place, len(points) - 2)
    (one, first), (other, second) = points[low : low + 2]
    return place, min(max(math.log(second / first) / math.log(other / one), 0.5), 4.0)


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
