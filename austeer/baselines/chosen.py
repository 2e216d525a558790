"""AUs of a site in an order, as a plan with the beta and delta that were measured."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import SelectionError, check_count
from ..momentum import Counters, Momentum
from ..plan import Plan
from ..statistics import effect_size, ranking, signed_rate


def plan_of(momentum: Momentum, site: str, order: Tensor, operation: str, beta: float | None = None) -> Plan:
    """The AUs at ``order`` as a plan, with their own delta, and their own beta unless one is given.

    Args:
        order: int64 [k], row * width + index in the site's counters, most important first.
    """
    counters = momentum.counters(site)
    width = counters.positive.shape[1]
    own = signed_rate(counters, momentum.pairs).flatten()[order]
    return Plan(
        site=(site,) * len(order),
        layer=torch.tensor(momentum.layers)[order // width].int(),
        index=(order % width).int(),
        beta=(own if beta is None else torch.full_like(own, beta)).float(),
        delta=(counters.delta_sum.flatten()[order] / momentum.pairs).float(),
        operation=operation,
        model=momentum.model,
        pairs=momentum.pairs,
        chat_template=momentum.chat_template,
    )


def random_plan(momentum: Momentum, site: str, k: int, seed: int, operation: str = "scale") -> Plan:
    """k AUs of a site drawn uniformly without replacement, each with its own beta and delta (paper: random AUs).

    Nested: a smaller k gives the first of a larger one.
    """
    size = momentum.counters(site).positive.numel()
    k = check_count("k", k, size, f"AUs of {site!r}", SelectionError)
    chosen = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:k]
    return plan_of(momentum, site, ranking(momentum, site)[chosen], operation)


def by_difference(counters: Counters) -> Tensor:
    """All AUs of a site by |mean difference|, largest first: int64 [layers * width]; ties by layer, then index."""
    return torch.argsort(counters.delta_sum.abs().flatten(), descending=True, stable=True)


def by_effect(counters: Counters, pairs: int) -> Tensor:
    """All AUs of a site by |mean difference| / its standard deviation; otherwise as :func:`by_difference`."""
    return torch.argsort(effect_size(counters, pairs).flatten(), descending=True, stable=True)
