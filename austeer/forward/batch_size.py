"""How many tokens a batch may have: what suits the device, within the memory that is free."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..models.structure import floating_dtype, text_config
from ..utils.machine import free_memory

#: More tokens than these make no batch faster.
LARGEST = {"cpu": 1024, "cuda": 16384}

#: The part of free memory that a batch may take.
SHARE = 0.4


def bytes_a_token(model: nn.Module) -> int:
    """What a decoder layer holds at once of one token, from above: residual, projections, and the widest MLP twice."""
    config = text_config(model)
    hidden = config.hidden_size
    sizes = [getattr(config, name, None) for name in ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")]
    # Gemma 3n has a size for each layer.
    wide = max((max(v) if isinstance(v, Sequence) else v for v in sizes if v), default=4 * hidden)
    experts = getattr(config, "num_experts_per_tok", None) or 1
    return floating_dtype(model).itemsize * (8 * hidden + 3 * wide * experts)


def automatic_batch_tokens(model: nn.Module, device: torch.device, free: int | None = None) -> int:
    """Tokens in a batch, with padding; ``free``: bytes on the device, by default those that are free now."""
    largest = LARGEST.get(device.type, LARGEST["cuda"])
    fitting = int(SHARE * (free_memory(device) if free is None else free)) // bytes_a_token(model)
    return max(64, min(largest, fitting))
