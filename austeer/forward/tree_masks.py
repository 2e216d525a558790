"""How a decoder is told that a row is a tree of texts (packing.py): masks for its kinds of layers, and positions.

Transformers' decoders take a finished mask in place of the one they would make: one [batch, 1, tokens, tokens] tensor,
or one for each kind of layer. Windows and chunks are part of a finished mask, counted in positions.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..models.families import LAYOUTS
from ..models.structure import decoder_of, floating_dtype, text_config
from .packing import Batch

#: Forms in which a mask is handed over: by kind of layer, or one for all.
FORMS = ("mapping", "tensor")

#: Attention implementations that take any mask.
_ANY_MASK = ("eager", "sdpa")

_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}


def forms(model: nn.Module, decoder: nn.Module) -> Iterable[str]:
    """In which forms this decoder may take a tree; none where its layers are no causal attention, or take no mask.

    Only for families of the table: another may look at columns where these look at positions (GPT-Neo's windows), which
    shows in long texts alone.
    """
    config = text_config(model)
    if config.model_type not in LAYOUTS:
        return ()
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):  # "vision": of images alone
        return ()
    kinds = set(getattr(config, "layer_types", None) or ())
    if getattr(config, "_attn_implementation", None) not in _ANY_MASK or not kinds <= _KINDS:
        return ()
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        return ()
    # Bloom, MPT and some Falcons count positions inside the attention, along the row.
    if getattr(config, "alibi", False) or getattr(getattr(config, "attn_config", None), "alibi", False):
        return ()
    return FORMS if kinds else ("tensor",)


def longest_short_text(model: nn.Module) -> int | None:
    """The length beyond which a text changes the positions of all others in its batch; None if there is none.

    LongRoPE scales all positions by other factors as soon as one of them is beyond the original context.
    """
    config = text_config(model)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(entry for entry in rope.values() if isinstance(entry, Mapping))]
    for entry in kinds:
        if entry.get("rope_type") == "longrope":
            return entry.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
    return None


def masks(model: nn.Module, batch: Batch, device: torch.device, form: str) -> Tensor | Mapping[str, Tensor]:
    """The finished masks of a batch of trees, 0 where a token sees and the least number where not."""
    config = text_config(model)
    assert batch.sees is not None and batch.positions is not None
    sees = batch.sees.to(device, non_blocking=True)[:, None]  # [rows, 1, length, length]
    positions = batch.positions.to(device, non_blocking=True)
    dtype = floating_dtype(model)

    def finished(kind: str) -> Tensor:
        seen = sees
        if kind == "sliding_attention" and getattr(config, "sliding_window", None):
            # from the token seen to the one that sees
            seen = seen & (positions[:, None, :, None] - positions[:, None, None, :] < config.sliding_window)
        elif kind == "chunked_attention":
            chunk = positions // config.attention_chunk_size
            seen = seen & (chunk[:, None, :, None] == chunk[:, None, None, :])
        return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, torch.finfo(dtype).min)

    if form == "mapping":
        return {kind: finished(kind) for kind in dict.fromkeys(config.layer_types)}
    return finished("sliding_attention" if _windowed(model) else "full_attention")


def _windowed(model: nn.Module) -> bool:
    """Whether a model with one kind of layer has windows. Some configs name one that their model ignores."""
    config = text_config(model)
    modules = (sys.modules.get(kind.__module__) for kind in type(decoder_of(model)).__mro__)  # also of a subclass
    return (
        bool(getattr(config, "sliding_window", None))
        and getattr(config, "use_sliding_window", True)
        and any(hasattr(module, "create_sliding_window_causal_mask") for module in modules)
    )
