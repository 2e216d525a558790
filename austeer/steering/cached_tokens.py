"""How many tokens a forward pass goes on from: those that its cache holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..errors import SteeringError

#: Under which names Transformers' decoders take what they go on from.
CACHES = ("past_key_values", "cache_params", "state", "mems", "past_buckets_states")


class CachedTokens:
    """The tokens in a decoder's caches: as the cache reports them, else as many as were run into it.

    A cache of keys and values knows its length. One of linear attention or of a state space (MiniMax, Mamba) does not:
    for those the tokens of each forward pass are added up, from an empty cache on.
    """

    def __init__(self) -> None:
        self._counts: WeakKeyDictionary[Any, int] = WeakKeyDictionary()

    def clear(self) -> None:
        """Forgets what was counted: what runs from now on may run without being seen."""
        self._counts = WeakKeyDictionary()

    def before(self, given: Mapping[str, Any], capturing: bool = False) -> int | Tensor:
        """Tokens in the cache that a forward pass is given; a tensor where it is a static cache's.

        Args:
            given: the decoder's arguments. capturing: whether the pass becomes part of a CUDA graph.

        Raises:
            SteeringError: it does not report them, and was not seen being filled.
        """
        name = next((name for name in CACHES if given.get(name) is not None), None)
        if name is None:
            return 0
        cache = given[name]
        length = reported(cache, capturing)
        if length is not None:
            return length
        counted = None if capturing or torch.compiler.is_compiling() else self._counted(cache)
        if counted is None:
            raise SteeringError(
                f"{name}: found a {type(cache).__name__} that does not report how many tokens it holds, and that was "
                "not filled inside this block in eager mode, token by token; expected one that does, or scope='all'"
            )
        return counted

    def _counted(self, cache: Any) -> int | None:
        layers = getattr(cache, "layers", None)
        if layers is None or any(getattr(layer, "record_past", False) for layer in layers):
            return None  # what is recorded may be taken back (assisted decoding), which nobody reports
        return self._counts.get(cache)

    def after(self, given: Mapping[str, Any], output: Any, tokens: int) -> None:
        """Notes how many ``tokens`` the cache of a finished forward pass holds, if it does not report them.

        Args:
            given, output: the decoder's arguments and what it returned: a cache may be made inside.
        """
        for name in CACHES:
            cache = given.get(name)
            cache = getattr(output, name, None) if cache is None else cache
            if cache is not None and hasattr(cache, "layers") and reported(cache) is None:
                self._counts[cache] = tokens


def reported(cache: Any, capturing: bool = False) -> int | Tensor | None:
    """The length that a cache reports: of the first layer that has one; None where something else fills it.

    Raises:
        SteeringError: a CUDA graph would keep the number of now (a static cache of windows).
    """
    layers = getattr(cache, "layers", None)
    if layers is None:
        return cache.get_seq_length() if hasattr(cache, "get_seq_length") else None
    lengths = (layer.get_seq_length() for layer in layers if hasattr(layer, "get_seq_length"))
    filled = (length for length in lengths if isinstance(length, Tensor) or length)
    if capturing or torch.compiler.is_compiling():  # a number would become part of the graph
        found = list(filled)
        length = next((length for length in found if isinstance(length, Tensor)), next(iter(found), None))
        if capturing and isinstance(length, int) and getattr(cache, "is_compileable", False):
            raise SteeringError(
                "found a static cache of windows in a CUDA graph, whose length is not on the device; expected "
                "scope='all', or decoding without a graph"
            )
    else:
        length = next(filled, None)
    if length is not None:
        return length
    return None if any(map(_has_state, layers)) or len(cache) > len(layers) else 0


def _has_state(layer: Any) -> bool:
    """Whether a layer of linear attention has seen tokens."""
    state = getattr(layer, "has_previous_state", False)
    return any(state.values()) if isinstance(state, Mapping) else bool(state)
