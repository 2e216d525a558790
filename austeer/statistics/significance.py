"""What stands out from chance: exact sign tests of all AUs of a site, corrected for their number."""

from __future__ import annotations

from numbers import Real

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from ..counters import Counters
from ..errors import SelectionError
from .power import critical_count


def p_values(counters: Counters) -> Tensor:
    """Two-sided exact sign test of each AU, float64 [layers, width]: zeros are left out, as the test prescribes.

    The null hypothesis is that positive and negative are equally likely; p = 1 where no pair differs.
    """
    most = torch.maximum(counters.positive, counters.negative).numpy()
    return torch.from_numpy(np.minimum(1.0, 2 * stats.binom.sf(most - 1, _decided(counters), 0.5)))


def adjusted_p_values(counters: Counters) -> Tensor:
    """:func:`p_values` after Benjamini-Hochberg's correction over the whole site, float64 [layers, width].

    AUs with an adjusted p-value of at most q are, on average, false discoveries in a share of at most q.
    """
    p = p_values(counters)
    return torch.from_numpy(stats.false_discovery_control(p.flatten().numpy())).view_as(p)


def discoveries(counters: Counters, max_fdr: float = 0.05) -> Tensor:
    """Which AUs pass at this false discovery rate: bool [layers, width].

    Raises:
        SelectionError: a rate that is none.
    """
    if isinstance(max_fdr, bool) or not isinstance(max_fdr, Real) or not 0 < max_fdr < 1:
        raise SelectionError(f"max_fdr: found {max_fdr!r}, expected a rate between 0 and 1, for example 0.05")
    return adjusted_p_values(counters) <= max_fdr


def chance_below(counters: Counters, level: float = 0.05) -> float:
    """How many AUs would have a p-value of at most ``level`` if every sign were a fair coin; at most ``level`` of all.

    Exact: counts are whole numbers, so a test at 5 % errs in fewer than 5 %.
    """
    decided, count = np.unique(_decided(counters), return_counts=True)
    chance = np.minimum(1.0, 2 * stats.binom.sf(critical_count(decided, level) - 1, decided, 0.5))
    return float((chance * count).sum())


def rate_interval(counts: np.ndarray, pairs: int, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """The exact (Clopper-Pearson) interval of the true share, given that it was seen in ``counts`` of ``pairs`` pairs.

    It is an interval for an AU that was named beforehand. The first of a ranking were chosen for being large, and their
    true shares are smaller than they look.
    """
    counts, tail = np.asarray(counts), (1 - level) / 2
    low = np.where(counts == 0, 0.0, stats.beta.ppf(tail, np.maximum(counts, 1), pairs - counts + 1))
    high = np.where(counts == pairs, 1.0, stats.beta.isf(tail, counts + 1, np.maximum(pairs - counts, 1)))
    return low, high


def beta_histogram(counters: Counters, pairs: int, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many AUs have |beta| in each bin, and how many would by chance alone.

    Chance is a fair coin for each pair in which the AU differs; pairs in which it does not stay as they are.

    Args:
        edges: ascending [bins + 1]; the last bin has its upper edge, the others do not.

    Returns:
        int64 [bins] and float64 [bins].
    """
    most = torch.maximum(counters.positive, counters.negative).flatten().numpy()
    least = np.ceil(np.asarray(edges) * pairs - 1e-9).astype(np.int64)  # |beta| >= edge is a count of at least this
    least[-1] = np.floor(edges[-1] * pairs + 1e-9) + 1
    found = np.diff([np.count_nonzero(most < bound) for bound in least])
    decided, count = np.unique(_decided(counters), return_counts=True)
    # P(max(X, n - X) >= t) for X of n fair coins: certain up to half of them, rounded up.
    tail = np.minimum(1.0, 2 * stats.binom.sf(least[:, None] - 1, decided, 0.5))
    tail = np.where(least[:, None] <= (decided + 1) // 2, 1.0, tail)  # [bins + 1, different n]
    return found, -np.diff(tail @ count)


def _decided(counters: Counters) -> np.ndarray:
    """In how many pairs each AU differs."""
    return (counters.positive + counters.negative).numpy()
