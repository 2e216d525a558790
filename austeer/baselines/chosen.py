"""Choices of AUs that several methods share: at random, and by mean difference."""

from __future__ import annotations

import torch

from ..errors import SelectionError, check_count
from ..momentum.momentum import Momentum
from ..momentum.selection import plan_of
from ..plans.plan import Plan
from ..statistics import ranking


def random_plan(momentum: Momentum, site: str, k: int, seed: int, operation: str = "scale") -> Plan:
    """k AUs of a site drawn uniformly without replacement, each with its own beta and delta (paper: random AUs).

    Nested: a smaller k gives the first of a larger one.
    """
    size = momentum.counters(site).positive.numel()
    k = check_count("k", k, size, f"AUs of {site!r}", SelectionError)
    chosen = torch.randperm(size, generator=torch.Generator().manual_seed(seed), device="cpu")[:k]
    return plan_of(momentum, site, ranking(momentum, site)[chosen], operation)
