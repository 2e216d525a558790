"""What a measurement takes from its arguments and its model: strategy, layers, the longest text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral

import torch
from torch import nn

from ..errors import CaptureError, SiteError
from ..forward.tokens import encode
from ..models.sites import Layout, Site, layers_of
from ..models.structure import decoder_of, input_device, is_offloaded
from ..models.weights import exact
from .layerwise.layerwise import why_not


def chosen_strategy(model: nn.Module, strategy: str, device: str | torch.device | None, layout: Layout | None) -> str:
    """The strategy asked for; for "auto" layerwise where weights are offloaded or elsewhere, and it can be."""
    try:
        elsewhere = device is not None and exact(device) != input_device(model)
        usable = device is None or torch.empty(1, device=device).device.type != "meta"
    except RuntimeError:
        usable = False
    if not usable:
        raise CaptureError(f"device: found {device!r}, expected a device that computes here, for example 'cuda:0'")
    if strategy == "resident" and elsewhere:
        raise CaptureError(
            f"device: found {device} for a model on {input_device(model)}; the resident strategy runs where the model "
            "is. Move the model, or take strategy='layerwise'"
        )
    if strategy != "auto":
        return strategy
    wanted = elsewhere or is_offloaded(decoder_of(model))
    return "layerwise" if wanted and (elsewhere or why_not(model, layout) is None) else "resident"


def tokenizer_signature(tokenizer) -> str:
    """Tells tokenizers apart by what they make of a text."""
    ids = encode(tokenizer, ["The quick brown fox: 3.14159, 東京, naïve\n\tdef f(x): return x"])
    return hashlib.sha256(repr(ids).encode()).hexdigest()


def measured_layers(wanted: Iterable[int] | None, sites: Mapping[str, Sequence[Site]], count: int) -> tuple[int, ...]:
    """The layers that are measured, in order; by default all that have the sites.

    Raises:
        SiteError: some of them lack a site: the counters of a momentum's sites have the same layers.
    """
    own = {name: tuple(site.layer for site in found) for name, found in sites.items()}
    if wanted is None and len(set(own.values())) == 1:
        return next(iter(own.values()))
    layers = chosen_layers(wanted, count)
    for name, found in sites.items():
        if missing := [layer for layer in layers if layer not in own[name]]:
            raise SiteError(
                f"layers: found {missing[0]} without the site {name!r}, which layers {layers_of(found)} have; expected "
                "layers with all the sites that are measured together: give layers=..., or measure this site apart"
            )
    return layers


def chosen_layers(wanted: Iterable[int] | None, count: int) -> tuple[int, ...]:
    """The layers that are measured, in order; all by default."""
    if wanted is None:
        return tuple(range(count))
    layers = tuple(wanted) if isinstance(wanted, Iterable) else (wanted,)
    wrong = [n for n in layers if isinstance(n, bool) or not isinstance(n, Integral) or not 0 <= n < count]
    if wrong or not layers:
        raise SiteError(
            f"layers: found {wrong[0] if wrong else 'none'!r}, expected numbers from 0 to {count - 1}, "
            "for example layers=range(12)"
        )
    return tuple(sorted({int(n) for n in layers}))
