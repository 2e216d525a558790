"""Evidence: what is known of a plan's effect and cost. It is kept in the plan's file and shown in its card."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any

from ..errors import PlanError

#: Characters of a text in a plan's file, and rows of each table.
LONGEST_TEXT, MOST_ROWS = 300, 500


@dataclass(frozen=True)
class Outcome:
    """What one strength did to some data.

    Attributes:
        alpha: one number, or one for each of the plan's sites by name.
        data: what it was tried on, for example "48 held-out prompts".
        effect: the mean over the data, in the unit that ``Evidence.effect`` names.
        low, high: the effect's interval, if known.
        share: the share of the data that moved the wanted way, 0 to 1, if known.
        side_effect: in the unit that ``Evidence.side_effect`` names, if known.
    """

    alpha: float | dict[str, float]
    data: str
    effect: float
    low: float | None = None
    high: float | None = None
    share: float | None = None
    side_effect: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.alpha, Mapping):
            alpha = {
                check_text("alpha: site", site): check_finite("alpha", value) for site, value in self.alpha.items()
            }
            if not alpha:
                raise PlanError("alpha: found no site, expected a number or one for each site of the plan")
            object.__setattr__(self, "alpha", alpha)
        else:
            object.__setattr__(self, "alpha", check_finite("alpha", self.alpha))
        check_text("data", self.data)
        _set_numbers(self, "effect", optional=("low", "high", "share", "side_effect"))
        _check_interval("effect", self.low, self.high)
        if self.share is not None and not 0 <= self.share <= 1:
            raise PlanError(f"share: found {self.share}, expected 0 to 1")


@dataclass(frozen=True)
class Overhead:
    """What steering with the plan costs.

    Attributes:
        percent: of the unsteered model's time. low, high: its interval, if known.
        device: what it was timed on. path: "fold", "columns" ... setting: of what: dtype, batch, prompt, tokens.
    """

    percent: float
    device: str
    path: str
    setting: str
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        for name in ("device", "path", "setting"):
            check_text(name, getattr(self, name))
        _set_numbers(self, "percent", optional=("low", "high"))
        _check_interval("percent", self.low, self.high)


@dataclass(frozen=True)
class Evidence:
    """What is known of a plan; ``Plan.with_evidence`` gives it to one.

    Attributes:
        effect: what the effect is and its unit, for example "mean change of log-odds, nats". side_effect: the same.
        tested: the strengths that were tried. alpha: the one of them to start with, if one is recommended.
        overhead: what steering was seen to cost.

    Raises:
        PlanError: a number that is not finite, a text that is empty, too long or of several lines, an effect without
            a name, or an alpha that was not tried.
    """

    effect: str = ""
    side_effect: str = ""
    tested: tuple[Outcome, ...] = ()
    alpha: float | dict[str, float] | None = None
    overhead: tuple[Overhead, ...] = ()

    def __post_init__(self) -> None:
        for name, kind in (("tested", Outcome), ("overhead", Overhead)):
            rows = getattr(self, name)
            if not isinstance(rows, (tuple, list)) or not all(isinstance(row, kind) for row in rows):
                raise PlanError(f"{name}: found {type(rows).__name__}, expected a tuple of {kind.__name__}")
            if len(rows) > MOST_ROWS:
                raise PlanError(f"{name}: found {len(rows)} rows, expected at most {MOST_ROWS}")
            object.__setattr__(self, name, tuple(rows))
        needed = {"effect": bool(self.tested), "side_effect": any(row.side_effect is not None for row in self.tested)}
        for name, is_needed in needed.items():
            if is_needed or getattr(self, name):
                check_text(name, getattr(self, name))
        if self.alpha is not None and self.alpha not in [row.alpha for row in self.tested]:
            raise PlanError(f"alpha: found {self.alpha!r}, expected one of those that were tested")
        if self.alpha is not None:  # as the row has it: a float, not an int
            object.__setattr__(self, "alpha", next(row.alpha for row in self.tested if row.alpha == self.alpha))

    def sites(self) -> set[str]:
        """Those that a tested alpha names; empty where each is one number."""
        return {site for row in self.tested if isinstance(row.alpha, dict) for site in row.alpha}

    def ranges(self) -> dict[str | None, tuple[float, float]]:
        """Least and greatest alpha tested, by site; under None where it was one number for all."""
        found: dict[str | None, list[float]] = {}
        for row in self.tested:
            for site, alpha in (row.alpha if isinstance(row.alpha, dict) else {None: row.alpha}).items():
                found.setdefault(site, []).append(alpha)
        return {site: (min(values), max(values)) for site, values in found.items()}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Evidence:
        """Raises PlanError, TypeError, ValueError or KeyError where ``data`` is not evidence."""
        rest = dict(data)
        tested = tuple(Outcome(**row) for row in rest.pop("tested"))
        overhead = tuple(Overhead(**row) for row in rest.pop("overhead"))
        return cls(tested=tested, overhead=overhead, **rest)


def check_text(name: str, value: object, longest: int = LONGEST_TEXT) -> str:
    """``value`` if it is one line of printable text; otherwise raises PlanError."""
    if isinstance(value, str) and 0 < len(value) <= longest and value.isprintable():
        return value
    found = f"{value[:40]!r} ({len(value)} characters)" if isinstance(value, str) else type(value).__name__
    raise PlanError(f"{name}: found {found}, expected one line of 1 to {longest} printable characters")


def check_finite(name: str, value: object) -> float:
    """``value`` as a float if it is a finite number; otherwise raises PlanError."""
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:  # an int of hundreds of digits
            number = math.inf
        if math.isfinite(number):
            return number
        raise PlanError(f"{name}: found {number}, expected a finite number")
    raise PlanError(f"{name}: found {type(value).__name__}, expected a finite number")


def _set_numbers(row: object, *names: str, optional: tuple[str, ...]) -> None:
    """Plain floats, whatever kind of number was given."""
    for name in (*names, *optional):
        value = getattr(row, name)
        if value is not None or name in names:
            object.__setattr__(row, name, check_finite(name, value))


def _check_interval(name: str, low: float | None, high: float | None) -> None:
    if (low is None) != (high is None) or (low is not None and high is not None and low > high):
        raise PlanError(f"{name}: found the interval {low} to {high}, expected both ends, the lower first, or none")
