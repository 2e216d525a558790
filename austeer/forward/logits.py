"""The head of a model, on the hidden states that are asked for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import CaptureError
from ..models.structure import text_config, unwrap

#: Rows of logits that are made at once: 128 rows of a vocabulary of 256,000 in float32 are 131 MB.
LOGIT_ROWS = 128


def expect_head(model: nn.Module) -> None:
    """Raises CaptureError where there is none."""
    if unwrap(model).get_output_embeddings() is None:  # type: ignore[operator]
        raise CaptureError(
            f"{type(unwrap(model)).__name__}: found no head that gives next tokens, expected a causal language model; "
            "load it with AutoModelForCausalLM"
        )


def log_probabilities(model: nn.Module, hidden: Tensor) -> Tensor:
    """log p of every token of the vocabulary, from last hidden states [..., width]; float32 at least."""
    config = text_config(model)
    logits = unwrap(model).get_output_embeddings()(hidden)  # type: ignore[operator]
    # Some families scale (Cohere, Granite) or cap (Gemma 2) what the head gives.
    logits = logits * (getattr(config, "logit_scale", None) or 1) / (getattr(config, "logits_scaling", None) or 1)
    cap = getattr(config, "final_logit_softcapping", None)
    logits = logits if cap is None else torch.tanh(logits / cap) * cap
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
