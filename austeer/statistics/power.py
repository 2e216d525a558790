"""How many pairs it takes: the exact power of the two-sided sign test."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2

import numpy as np
from scipy import optimize, stats

from ..errors import SelectionError

#: Nearer to one half no rate is asked for: it would take hundreds of thousands of pairs.
LEAST_RATE = 0.505


def critical_count(pairs: int | np.ndarray, level: float) -> np.ndarray:
    """The smallest count (of the more frequent sign) whose two-sided p-value is at most ``level``: int64.

    It is more than ``pairs`` where not even a unanimous AU passes.
    """
    pairs = np.asarray(pairs, dtype=np.int64)
    count = np.asarray(stats.binom.isf(level / 2, pairs, 0.5), dtype=np.int64) + 1
    for _ in range(2):  # the quantile may be off by one where the level is met exactly
        count = np.where(2 * stats.binom.sf(count - 2, pairs, 0.5) <= level, count - 1, count)
    return np.where(2 * stats.binom.sf(count - 1, pairs, 0.5) <= level, count, count + 1)


def power(pairs: int | np.ndarray, rate: float, level: float) -> np.ndarray:
    """The chance that an AU passes a two-sided sign test at ``level``.

    Args:
        pairs: in how many pairs it differs.
        rate: its true share of positive signs among them, P[m > 0 | m != 0]; 1 - rate gives the same.
    """
    pairs = np.asarray(pairs, dtype=np.int64)
    count = critical_count(pairs, level)
    return stats.binom.sf(count - 1, pairs, rate) + stats.binom.cdf(pairs - count, pairs, rate)


def pairs_needed(rate: float, level: float, wanted: float = 0.8) -> int:
    """The smallest number of pairs from which on an AU of this rate passes with at least this power, exactly.

    Exact power is a saw: it falls where a further pair raises the count that is needed. From the number that is given
    it stays above what is wanted.

    Raises:
        SelectionError: ``rate`` is not from 0.505 to 1, ``level`` not between 0 and 1, or ``wanted`` not between both.
    """
    _check(level, wanted)
    if not LEAST_RATE <= rate <= 1:
        raise SelectionError(f"rate: found {rate!r}, expected {LEAST_RATE} to 1: the share of pairs with one sign")
    spread = stats.norm.isf(level / 2) / 2 + stats.norm.ppf(wanted) * (rate * (1 - rate)) ** 0.5
    near = (spread / (rate - 0.5)) ** 2  # a normal approximation
    last = int(2 * near) + 4 * smallest_pairs(1, level) + 50
    for first in (max(1, int(0.7 * near) - 50), 1):
        pairs = np.arange(first, last)
        failing = np.flatnonzero(power(pairs, rate, level) < wanted)
        if failing.size:
            return int(pairs[failing[-1]]) + 1
    return 1


def detectable_rate(pairs: int, level: float, wanted: float = 0.8) -> float | None:
    """The smallest rate that is found with at least this power on so many pairs; None if not even 1 is.

    Raises:
        SelectionError: as in :func:`pairs_needed`.
    """
    _check(level, wanted)
    if critical_count(pairs, level) > pairs:
        return None
    return float(optimize.brentq(lambda rate: float(power(pairs, rate, level)) - wanted, 0.5, 1.0))


def smallest_pairs(size: int, max_fdr: float) -> int:
    """The fewest pairs on which one unanimous AU among ``size`` can pass Benjamini-Hochberg's correction."""
    return max(1, ceil(1 + log2(size / max_fdr) - 1e-9))


@dataclass(frozen=True)
class DetectableRate:
    """What so many pairs can find at one site.

    Attributes:
        pairs: in how many pairs an AU differs, at most.
        level: of a single test, that the correction over the site comes to: max_fdr * discoveries / size, and with no
            discovery that of the first one.
        power: what is wanted. rate: the smallest rate that is found with it; None: not even a unanimous AU is.
        needed: for some rates, how many pairs it takes.
    """

    pairs: int
    level: float
    power: float
    rate: float | None
    needed: dict[float, int]

    @classmethod
    def of(
        cls,
        pairs: int,
        size: int,
        found: int = 0,
        max_fdr: float = 0.05,
        wanted: float = 0.8,
        rates: tuple[float, ...] = (0.6, 0.7, 0.8, 0.9),
    ) -> DetectableRate:
        """For a site of ``size`` AUs, of which ``found`` pass."""
        level = max_fdr * max(found, 1) / size
        needed = {rate: pairs_needed(rate, level, wanted) for rate in rates}
        return cls(pairs, level, wanted, detectable_rate(pairs, level, wanted), needed)


def _check(level: float, wanted: float) -> None:
    if not 0 < level < wanted < 1:
        raise SelectionError(
            f"power: found the level {level!r} and the power {wanted!r}, expected 0 < level < power < 1, for example "
            "0.05 and 0.8"
        )
