"""Which ways to steer are possible at a model's sites, and what they keep there, by its skeleton alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from . import linear
from .path_work import Place, Target, table_bytes
from .paths import why_not_fused
from .sites import Site


def place_of(
    network: nn.Module, site: Site, tokens: int, aus: dict[int, int], dtype: torch.dtype, operation: str
) -> Place:
    """A site in a forward pass of ``tokens``. ``aus``: layer -> how many are steered there."""
    module = network.get_submodule(site.projection) if site.projection else None
    return Place(
        tokens=tokens,
        width=site.width,
        count=aus.get(site.layer, 0),
        dtype=dtype,
        operation=operation,
        side=site.side,
        projection=None if module is None else linear.sizes(module),
        bias=getattr(module, "bias", None) is not None,
    )


def why_not(network: nn.Module, way: str, sites: Sequence[Site], operation: str) -> str:
    """Why a way is not possible at a site, as far as the model's shapes say; empty if it is."""
    if way in ("public", "dense hook", "sparse hook", "lora") and operation != "scale":
        return f"it scales, and cannot {operation}"
    for site in sites:
        projection = network.get_submodule(site.projection) if site.projection else None
        if way == "lora" and projection is None:
            return "no linear layer makes this tensor"
        if way == "fused" and (reason := why_not_fused(projection)):
            return reason
        if way == "fold" and (reason := _why_not_fold(network, site, operation)):
            return reason
    return ""


def _why_not_fold(network: nn.Module, site: Site, operation: str) -> str:
    if not site.parts:
        return "no linear layer makes this tensor"
    if operation == "push":
        return "push is not linear"
    if operation == "shift" and site.projection is None:
        return "shift in a mixture of experts would need router weights that sum to 1"
    for path in site.parts:
        weights = linear.weights_of(module := network.get_submodule(path))
        if isinstance(weights, str):
            return weights
        if operation == "shift" and getattr(module, weights.bias or "", None) is None:
            return "shift needs a bias and the layer has none"
    return ""


def kept_bytes(
    network: nn.Module,
    way: str,
    sites: Sequence[Site],
    aus: dict[int, int],
    dtype: torch.dtype,
    operation: str,
    target: Target,
) -> int:
    """Bytes on the device: tables, and for fold the rows of the weights (and the biases) that it saves."""
    total = 0
    for site in sites:
        total += table_bytes(way, place_of(network, site, 0, aus, dtype, operation), target)
        if way != "fold" or site.layer not in aus:
            continue
        for path in site.parts:
            weights = linear.weights_of(module := network.get_submodule(path))
            assert isinstance(weights, linear.Weights)  # otherwise fold was refused
            saved = getattr(module, weights.weight).numel() // site.width * aus[site.layer]
            bias = getattr(module, weights.bias, None) if weights.bias else None
            total += dtype.itemsize * (saved + (0 if bias is None else bias.numel()))
    return total
