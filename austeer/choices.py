"""What a measurement takes from its arguments and its model: strategy, layers, the longest text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from numbers import Integral

import torch
from torch import nn

from .errors import CaptureError, PairsError, SiteError
from .layerwise import why_not
from .sites import Layout, decoder_of, input_device, text_config
from .tokens import encode
from .weights import exact


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


def is_offloaded(model: nn.Module) -> bool:
    """Whether weights are loaded each time they are used."""
    return any(p.device.type == "meta" for p in model.parameters())


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


def length_limit(model: nn.Module, max_length: int | None) -> int:
    """The longest text, in tokens: what is asked for, within the model's context."""
    context = getattr(text_config(model), "max_position_embeddings", None)
    if max_length is not None and (isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1):
        raise PairsError(f"max_length: found {max_length!r}, expected an integer of at least 1")
    limit = min((n for n in (max_length, context) if n is not None), default=None)
    if limit is None:
        raise PairsError("the model's config names no context length; give max_length")
    return limit
