"""What a check of pairs found: numbers, a verdict in plain words, a remedy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .length_control import LengthControl

#: From harmless to grave. "note": to be known, and in some pairs meant so.
LEVELS = ("ok", "note", "warning", "grave")


@dataclass(frozen=True)
class Finding:
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

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "numbers": dict(self.numbers)}


@dataclass(frozen=True)
class PairsReport:
    """What :func:`austeer.making.check_pairs` found.

    Attributes:
        source: where the pairs are from. pairs: how many. usable: how many of them have two sides that differ.
        findings: one for each thing that was looked at.
        control: what the AUs do with length alone, if the model was asked.
    """

    source: str
    pairs: int
    usable: int
    findings: tuple[Finding, ...]
    control: LengthControl | None = None

    def of(self, level: str) -> tuple[Finding, ...]:
        """The findings of a level."""
        return tuple(found for found in self.findings if found.level == level)

    def __getitem__(self, name: str) -> Finding:
        """The finding of a name; raises KeyError if that was not looked at."""
        found = next((finding for finding in self.findings if finding.name == name), None)
        if found is None:
            raise KeyError(f"{name!r}; found {', '.join(finding.name for finding in self.findings)}")
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "pairs": self.pairs,
            "usable": self.usable,
            "findings": [finding.to_json() for finding in self.findings],
            "length_control": None if self.control is None else self.control.to_json(),
        }


def share(part: int, whole: int) -> str:
    """A part of a whole, as people read it: ``12 of 50 (24 %)``."""
    return f"{part} of {whole} ({percent(part / whole)})" if whole else "0 of 0"


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def worst(*levels: str) -> str:
    """The gravest of some levels."""
    return max(levels, key=LEVELS.index)
