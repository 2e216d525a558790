"""Scores, ties, significance: Momentum -> Plan."""

from __future__ import annotations

from numbers import Real

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from .errors import SelectionError, check_count
from .momentum import Counters, Momentum
from .plan import OPERATIONS, TIES, Plan


def signed_rate(counters: Counters, pairs: int) -> Tensor:
    """beta of each AU, float64 [layers, width] (paper: the score s with the winner's sign).

    +positive / pairs where positive >= negative, else -negative / pairs; so a tie gives +, as in the public code.
    """
    wins = counters.positive >= counters.negative
    return torch.where(wins, counters.positive, -counters.negative).double() / pairs


def effect_size(counters: Counters, pairs: int) -> Tensor:
    """|mean(m)| / std(m) of each AU over the pairs, float64 [layers, width]; infinite where m never varies, 0 if m = 0.

    The standard deviation is the sample's (n - 1), without the pairs' share that cancels in the square sum.
    """
    mean = counters.delta_sum / pairs
    variance = (counters.delta_square_sum - pairs * mean.square()).clamp(min=0) / max(pairs - 1, 1)
    return torch.where(mean == 0, 0.0, mean.abs() / variance.sqrt())


def p_values(counters: Counters) -> Tensor:
    """Two-sided exact sign test of each AU, float64 [layers, width]: zeros are left out, as the test prescribes.

    The null hypothesis is that positive and negative are equally likely; p = 1 where no pair differs.
    """
    most = torch.maximum(counters.positive, counters.negative).numpy()
    decided = (counters.positive + counters.negative).numpy()
    return torch.from_numpy(np.minimum(1.0, 2 * stats.binom.sf(most - 1, decided, 0.5)))


def adjusted_p_values(counters: Counters) -> Tensor:
    """:func:`p_values` after Benjamini-Hochberg's correction over the whole site, float64 [layers, width]."""
    p = p_values(counters)
    return torch.from_numpy(stats.false_discovery_control(p.flatten().numpy())).view_as(p)


def ranking(momentum: Momentum, site: str, ties: str = "effect") -> Tensor:
    """All AUs of a site, best first: int64 [layers * width], row * width + index in the counters.

    Ordered by |beta|. ``ties="public"`` then takes the earlier layer and the lower index, as the public code does;
    ``"effect"`` takes the larger effect size first. Deterministic: integer counts decide, and a stable sort.
    """
    if ties not in TIES:
        raise SelectionError(f"ties: found {ties!r}, expected one of {', '.join(TIES)}")
    counters = momentum.counters(site)
    score = torch.maximum(counters.positive, counters.negative).flatten().numpy()  # |beta| * pairs, exact
    keys = [np.arange(score.size), -score]
    if ties == "effect":
        keys.insert(1, -effect_size(counters, momentum.pairs).flatten().numpy())
    return torch.from_numpy(np.lexsort(keys))


def select(
    momentum: Momentum,
    site: str,
    k: int | None = None,
    *,
    max_fdr: float | None = None,
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
        ties: "effect" or "public", see :func:`ranking`.
        operation: what steering does with them: "scale" (the paper), "push" or "shift".

    Raises:
        SelectionError: k or max_fdr out of range, both or neither given, a site that was not measured, or no AU
            that passes.
    """
    counters = momentum.counters(site)
    if operation not in OPERATIONS:
        raise SelectionError(f"operation: found {operation!r}, expected one of {', '.join(OPERATIONS)}")
    if (k is None) == (max_fdr is None):
        raise SelectionError("select: expected exactly one of k and max_fdr, for example k=100")
    order = ranking(momentum, site, ties)
    if k is not None:
        chosen = order[: check_count("k", k, order.numel(), f"AUs of {site!r}", SelectionError)]
    else:
        assert max_fdr is not None
        chosen = order[_discoveries(counters, max_fdr, site)[order]]
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


def _discoveries(counters: Counters, max_fdr: float, site: str) -> Tensor:
    if isinstance(max_fdr, bool) or not isinstance(max_fdr, Real) or not 0 < max_fdr < 1:
        raise SelectionError(f"max_fdr: found {max_fdr!r}, expected a rate between 0 and 1, for example 0.05")
    adjusted = adjusted_p_values(counters).flatten()
    keep = adjusted <= max_fdr
    if not keep.any():
        raise SelectionError(
            f"max_fdr: no AU of site {site!r} passes {max_fdr}; the smallest adjusted p-value is {adjusted.min():.3g}. "
            "Give more pairs, or a larger rate"
        )
    return keep
