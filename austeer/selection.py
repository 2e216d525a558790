"""Momentum -> Plan: the k AUs of largest |beta|, with k given, or found by significance or stability."""

from __future__ import annotations

import torch

from .errors import SelectionError, check_count
from .momentum import Counters, Momentum
from .plan import OPERATIONS, Plan
from .statistics import (
    adjusted_p_values,
    detectable_rate,
    discoveries,
    pairs_needed,
    ranking,
    signed_rate,
    smallest_pairs,
)
from .statistics.stability import stable_k

EXACTLY_ONE = "select: expected exactly one of k, max_fdr and min_stability, for example k=100"


def select(
    momentum: Momentum,
    site: str,
    k: int | None = None,
    *,
    max_fdr: float | None = None,
    min_stability: float | None = None,
    ties: str = "effect",
    operation: str = "scale",
) -> Plan:
    """The k AUs of largest |beta| over all layers of one site together (paper, selection), as a plan.

    Args:
        momentum: counters from :func:`austeer.measure`.
        site: a measured site.
        k: how many AUs.
        max_fdr: instead of k, all AUs that a two-sided sign test with Benjamini-Hochberg's correction over the site
            keeps at this false discovery rate.
        min_stability: instead of k, the largest k (ten to a factor of ten, from 10 to a tenth of the site) of which the
            two halves of the pairs agree on at least this share, corrected for chance: the score of
            :class:`austeer.statistics.Stability`. All pairs together agree on more than their halves do.
        ties: "effect" or "public", see :func:`austeer.statistics.ranking`.
        operation: what steering does with them: "scale" (the paper), "push" or "shift".

    Raises:
        SelectionError: k, max_fdr or min_stability out of range, not exactly one of them given, a site that was not
            measured, no AU that passes (with the number of pairs that it takes), momentum without halves, or no k that
            is as stable (with the most stable one).
    """
    counters = momentum.counters(site)
    if operation not in OPERATIONS:
        raise SelectionError(f"operation: found {operation!r}, expected one of {', '.join(OPERATIONS)}")
    if sum(value is not None for value in (k, max_fdr, min_stability)) != 1:
        raise SelectionError(EXACTLY_ONE)
    order = ranking(momentum, site, ties)
    if max_fdr is not None:
        passing = discoveries(counters, max_fdr).flatten()
        if not passing.any():
            raise SelectionError(_too_few(momentum, counters, site, max_fdr))
        chosen = order[passing[order]]
    else:
        if min_stability is not None:
            k = stable_k(momentum, site, min_stability, ties)
        chosen = order[: check_count("k", k, order.numel(), f"AUs of {site!r}", SelectionError)]
    width = counters.positive.shape[1]
    beta = signed_rate(counters, momentum.pairs).flatten()
    return Plan(
        site=(site,) * len(chosen),
        layer=torch.tensor(momentum.layers)[chosen // width].int(),
        index=(chosen % width).int(),
        beta=beta[chosen].float(),
        delta=(counters.delta_sum.flatten()[chosen] / momentum.pairs).float(),
        operation=operation,
        model=momentum.model,
        pairs=momentum.pairs,
        ties=ties,
        chat_template=momentum.chat_template,
    )


def _too_few(momentum: Momentum, counters: Counters, site: str, max_fdr: float) -> str:
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
