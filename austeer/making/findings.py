"""What a check of pairs found: numbers, a verdict in plain words, a remedy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: From harmless to grave. "note": to be known, and in some pairs meant so.
LEVELS = ("ok", "note", "warning", "grave")


@dataclass(frozen=True)
class PairsFinding:
    """One thing that was looked at.

    Attributes:
        name: what. level: one of ``LEVELS``. verdict: what was found, a sentence. remedy: what to do; "" if nothing.
        numbers: what the verdict is from, for machines.
    """

    name: str
    level: str
    verdict: str
    remedy: str = ""
    numbers: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, level: str, verdict: str, why: str, remedy: str, numbers: Mapping[str, Any]) -> PairsFinding:
        """A finding to which ``why`` it matters, and the remedy, belong only if it is not "ok"."""
        if level == "ok":
            return cls(name, level, verdict, numbers=numbers)
        return cls(name, level, verdict + why, remedy, numbers)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "numbers": dict(self.numbers)}


def share(part: int, whole: int) -> str:
    """A part of a whole, as people read it: ``12 of 50 (24 %)``."""
    return f"{part} of {whole} ({percent(part / whole)})" if whole else "0 of 0"


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def worst(*levels: str) -> str:
    """The gravest of some levels."""
    return max(levels, key=LEVELS.index)
