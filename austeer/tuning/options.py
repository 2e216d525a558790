"""The options that tune() and compare() share, checked once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import TaskError
from ..momentum.momentum import Momentum
from .calibrate import check_limit
from .data import Most


@dataclass(frozen=True)
class SearchOptions:
    """See :func:`austeer.tune` for each; sequences are tuples here.

    Raises:
        TaskError: no site, operation or number of AUs, or a limit that is no positive number.
    """

    momentum: Momentum | None
    sites: Sequence[str]
    operations: Sequence[str]
    ks: Iterable[int]
    max_kl: float
    budget: float | None
    neutral: Sequence[str] | None
    most: Most
    seed: int
    folder: str | Path | None
    progress: bool | None

    def __post_init__(self) -> None:
        for name in ("sites", "operations", "ks"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, example in (("sites", "attention"), ("operations", "shift")):
            if not getattr(self, name):
                raise TaskError(f"{name}: found none, expected at least one, for example {example!r}")
        if not self.ks:
            raise TaskError("ks: found none, expected numbers of AUs, for example (10, 100)")
        check_limit(self.max_kl)

    def settings(self, *names: str) -> dict[str, Any]:
        """Some of the options, for a search's record."""
        values = {name: getattr(self, name) for name in names}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def ks_of(self, momentum: Momentum) -> list[int]:
        """The numbers of AUs that every site has; a small model has fewer than the default's largest.

        Raises:
            SelectionError: a site that was not measured.
        """
        smallest = min(momentum.counters(site).positive.numel() for site in self.sites)
        return [k for k in self.ks if k <= smallest] or [smallest]
