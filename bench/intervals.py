"""Ratios with intervals, and what may be said of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL, RESAMPLES = 0.95, 2000
#: An interval of a ratio that is narrower than this, and contains 1, says "the same".
NARROW = 0.02
#: If two runs of the same thing differ by more than this, with their interval, nothing is said at all.
NOISE = 0.02

SAME, SLOWER, FASTER, UNCLEAR, NOISY = "same", "slower", "faster", "unclear", "noise"


@dataclass(frozen=True)
class Ratio:
    """The median of so many paired ratios, and the bootstrapped interval of that median, of this level."""

    median: float
    low: float
    high: float
    level: float
    count: int

    @property
    def width(self) -> float:
        return self.high - self.low

    @property
    def noise(self) -> float:
        """How far from 1 the interval reaches."""
        return max(abs(self.low - 1), abs(self.high - 1))


def ratio(values: Sequence[Sequence[float]], reference: Sequence[Sequence[float]], level: float = LEVEL) -> Ratio:
    """The ratio of two series that were measured by turns, pair by pair.

    What drifts slowly drops out of each pair. Pairs of one group are close in time, and so alike: groups are drawn
    anew, with all their pairs, and not single pairs (cluster bootstrap, percentile method).

    Args:
        values, reference: [groups][pairs], all groups of one size.

    Raises:
        ValueError: fewer than two groups.
    """
    pairs = np.asarray(values, dtype=float) / np.asarray(reference, dtype=float)  # [groups, pairs]
    if len(pairs) < 2:
        raise ValueError(f"found {len(pairs)} groups of pairs, expected at least 2 for an interval")
    found = stats.bootstrap(
        (np.arange(len(pairs)),),
        lambda drawn, axis=-1: np.median(pairs[drawn].reshape(*drawn.shape[:-1], -1), axis=-1),
        confidence_level=level,
        n_resamples=RESAMPLES,
        method="percentile",
        vectorized=True,
        batch=100,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Ratio(float(np.median(pairs)), float(found.low), float(found.high), level, pairs.size)


def verdict(found: Ratio, again: Ratio) -> str:
    """What a ratio to the unsteered model says, beside that of the unsteered model to itself (the A/A ratio).

    ``noise`` where the A/A interval reaches further than ``NOISE`` from 1. ``slower`` or ``faster`` where 1 lies
    outside the interval and the median beyond the A/A interval; ``same`` where 1 lies inside and the interval is
    narrower than ``NARROW``; otherwise ``unclear``.
    """
    if again.noise > NOISE:
        return NOISY
    if found.low > 1 and found.median > again.high:
        return SLOWER
    if found.high < 1 and found.median < again.low:
        return FASTER
    return SAME if found.low <= 1 <= found.high and found.width < NARROW else UNCLEAR
