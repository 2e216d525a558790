"""Scores of AUs and their order."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..counters import Counted, Counters
from ..errors import SelectionError
from ..plans.table import TIES


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


def ranking(momentum: Counted, site: str, ties: str = "effect") -> Tensor:
    """All AUs of a site, best first: int64 [layers * width], row * width + index in the counters.

    Ordered by |beta|. ``ties="public"`` then takes the earlier layer and the lower index, as the public code does;
    ``"effect"`` takes the larger effect size first. Deterministic: integer counts decide, and a stable sort.

    Raises:
        SelectionError: a site that was not measured, or an unknown tie rule.
    """
    if ties not in TIES:
        raise SelectionError(f"ties: found {ties!r}, expected one of {', '.join(TIES)}")
    counters = momentum.counters(site)
    score = torch.maximum(counters.positive, counters.negative).flatten().numpy()  # |beta| * pairs, exact
    keys = [np.arange(score.size), -score]
    if ties == "effect":
        keys.insert(1, -effect_size(counters, momentum.pairs).flatten().numpy())
    return torch.from_numpy(np.lexsort(keys))


def by_difference(counters: Counters) -> Tensor:
    """All AUs of a site by |mean difference|, largest first: int64 [layers * width]; ties by layer, then index."""
    return torch.argsort(counters.delta_sum.abs().flatten(), descending=True, stable=True)
