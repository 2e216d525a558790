"""Plans for timing: random AUs, evenly spread over as many layers as are to be touched."""

from __future__ import annotations

import torch
from torch import nn

from austeer import Plan
from austeer.costs.steering import spread
from austeer.errors import PlanError, check_count
from austeer.models.sites import find_sites, fingerprint


def spread_plan(
    model: nn.Module, site: str, k: int, layers: int | None = None, seed: int = 0, operation: str = "scale"
) -> Plan:
    """k random AUs of a site, in ``layers`` layers that lie as far apart as they can, about as many in each.

    Every beta is +1 or -1, as of an AU that every pair agrees on.

    Args:
        layers: how many; by default as many as there are, or as k.

    Raises:
        PlanError: fewer AUs than layers, or more than these layers have.
    """
    sites = find_sites(model, [site])
    print_ = fingerprint(model, sites)
    width = print_.widths[site]
    layers = max(1, min(k, print_.layers)) if layers is None else layers
    layers = check_count("layers", layers, print_.layers, "the model's layers", PlanError)
    k = check_count("k", k, layers * width, f"AUs of {layers} layers of site {site!r}", PlanError)
    if k < layers:
        raise PlanError(f"layers: found {layers} with k={k}, expected at most one layer an AU; give more AUs")
    generator, count = torch.Generator().manual_seed(seed), spread(k, layers, print_.layers)
    layer = torch.cat([torch.full((aus,), one) for one, aus in count.items()])
    chosen = [torch.randperm(width, generator=generator)[:aus] for aus in count.values()]
    return Plan(
        site=(site,) * k,
        layer=layer.int(),
        index=torch.cat(chosen).int(),
        beta=torch.randint(0, 2, (k,), generator=generator).float() * 2 - 1,
        delta=torch.randn(k, generator=generator) * 0.1,
        operation=operation,
        model=print_,
        pairs=10,
    )
