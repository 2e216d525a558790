"""Methods that differ in which AUs they choose, and leave beta and delta as they were measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ..errors import SelectionError, check_count
from ..momentum.momentum import Momentum
from ..momentum.selection import plan_of
from ..statistics import effect_size, ranking
from ..statistics.ranking import by_difference
from .arm import Arm
from .chosen import random_plan

#: Draws of random AUs, each an arm of its own.
SEEDS = (0, 1, 2)


def ranked(momentum: Momentum, site: str, method: str) -> Tensor:
    """The order in which a method of this module takes the AUs of a site: int64 [layers * width]."""
    if method == "difference":
        return by_difference(momentum.counters(site))
    if method == "standardised":
        sizes = effect_size(momentum.counters(site), momentum.pairs)
        return torch.argsort(sizes.flatten(), descending=True, stable=True)
    return ranking(momentum, site)


def ranked_arms(
    momentum: Momentum, method: str, sites: Iterable[str], operations: Iterable[str], ks: tuple[int, ...]
) -> Iterator[Arm]:
    """One nested plan for each site and operation, and an arm of it for each k."""
    for site in sites:
        largest = check_count(
            "k", max(ks), momentum.counters(site).positive.numel(), f"AUs of {site!r}", SelectionError
        )
        order = ranked(momentum, site, method)[:largest]
        for operation in operations:
            plan = plan_of(momentum, site, order, operation)
            yield from (Arm(method, plan, k) for k in ks)


def random_arms(
    momentum: Momentum, sites: Iterable[str], operations: Iterable[str], ks: tuple[int, ...]
) -> Iterator[Arm]:
    """As :func:`ranked_arms`, for each of ``SEEDS``; the same AUs for every operation."""
    for site in sites:
        for seed in SEEDS:
            drawn = random_plan(momentum, site, max(ks), seed)
            for operation in operations:
                plan = drawn.with_operation(operation)
                yield from (Arm("random", plan, k, f"seed {seed}") for k in ks)


def all_arms(momentum: Momentum, sites: Iterable[str], operations: Iterable[str]) -> Iterator[Arm]:
    """Every AU of a site in one arm: beta and delta are the soft weights, and k is no choice."""
    for site in sites:
        order = ranking(momentum, site)
        for operation in operations:
            yield Arm("all", plan_of(momentum, site, order, operation), len(order))
