"""The k AUs of largest |beta|, with k given, or found by significance or stability."""

from __future__ import annotations

from torch import Tensor

from ..counters import Counted, Counters
from ..errors import SelectionError, check_count
from . import adjusted_p_values, detectable_rate, discoveries, pairs_needed, ranking, smallest_pairs
from .stability import stable_k

EXACTLY_ONE = "select: expected exactly one of k, max_fdr and min_stability, for example k=100"


def select(
    momentum: Counted,
    site: str,
    k: int | None = None,
    *,
    max_fdr: float | None = None,
    min_stability: float | None = None,
    ties: str = "effect",
) -> Tensor:
    """The AUs that :meth:`austeer.Momentum.select` makes a plan of: int64 [k], row * width + index, best first.

    Arguments and errors are those of :meth:`austeer.Momentum.select`.
    """
    counters = momentum.counters(site)
    if sum(value is not None for value in (k, max_fdr, min_stability)) != 1:
        raise SelectionError(EXACTLY_ONE)
    order = ranking(momentum, site, ties)
    if max_fdr is not None:
        passing = discoveries(counters, max_fdr).flatten()
        if not passing.any():
            raise SelectionError(_too_few(momentum, counters, site, max_fdr))
        return order[passing[order]]
    if min_stability is not None:
        k = stable_k(momentum, site, min_stability, ties)
    return order[: check_count("k", k, order.numel(), f"AUs of {site!r}", SelectionError)]


def _too_few(momentum: Counted, counters: Counters, site: str, max_fdr: float) -> str:
    """Why no AU passes, and how many pairs it takes."""
    size, pairs = counters.positive.numel(), momentum.pairs - momentum.identical
    found = f"max_fdr: no AU of site {site!r} passes {max_fdr}; "
    needed = smallest_pairs(size, max_fdr)
    if pairs < needed:
        return (
            f"{found}found {pairs} pairs with different texts, on which not even an AU with one sign on all of them "
            f"could, alone among {size}: expected at least {needed} pairs, or a larger rate"
        )
    level, rate = max_fdr / size, 0.7
    found += f"the smallest adjusted p-value is {float(adjusted_p_values(counters).min()):.3g}. "
    detectable = detectable_rate(pairs, level)
    if detectable is not None:
        found += f"{pairs} pairs find (power 0.8) AUs with one sign in {100 * detectable:.0f} % of the pairs or more; "
    return f"{found}{100 * rate:.0f} % takes {pairs_needed(rate, level)} pairs. Give more pairs, or a larger rate"
