"""What a plan is compared with: plans whose AUs were chosen another way."""

from __future__ import annotations

import torch

from .errors import SelectionError, check_count
from .momentum import Momentum
from .plan import Plan


def random_plan(momentum: Momentum, site: str, k: int, seed: int, operation: str = "scale") -> Plan:
    """k AUs of a site drawn uniformly without replacement, each with its own beta and delta (paper: random AUs)."""
    size = momentum.counters(site).positive.numel()
    k = check_count("k", k, size, f"AUs of {site!r}", SelectionError)
    everything = momentum.select(site, k=size, operation=operation)
    chosen = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:k]
    return everything.take(chosen)
