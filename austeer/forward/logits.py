"""The head of a model, on the hidden states that are asked for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import CaptureError
from ..models.structure import decoder_of, evaluating, input_device, text_config, unwrap, vocabulary_size
from .tokens import made_up

#: Rows of logits that are made at once: 128 rows of a vocabulary of 256,000 in float32 are 131 MB.
LOGIT_ROWS = 128


@torch.no_grad()
def expect_head(model: nn.Module) -> None:
    """Raises CaptureError where there is none, or where the model makes something else of what it gives.

    A pass over a few tokens, of the model and of its decoder.
    """
    if unwrap(model).get_output_embeddings() is None:  # type: ignore[operator]
        raise CaptureError(
            f"{type(unwrap(model)).__name__}: found no head that gives next tokens, expected a causal language model; "
            "load it with AutoModelForCausalLM"
        )
    ids = torch.tensor([made_up(6, vocabulary_size(model))], device=input_device(model))
    with evaluating(model):
        whole, hidden = unwrap(model)(input_ids=ids).logits, decoder_of(model)(input_ids=ids).last_hidden_state
        own = log_probabilities(model, hidden)
    expected = whole.to(own.dtype).log_softmax(-1).to(own.device)
    error, scale = (own - expected).abs().max(), (expected - expected.mean(-1, keepdim=True)).abs().max()
    if error > 0.05 * scale:
        raise CaptureError(
            f"{type(unwrap(model)).__name__}: found logits that are not those of its head (scaled or capped in an "
            f"unknown way; log-probabilities differ by {float(error):.2g} nats), expected them"
        )


def log_probabilities(model: nn.Module, hidden: Tensor) -> Tensor:
    """log p of every token of the vocabulary, from last hidden states [..., width]; float32 at least."""
    config = text_config(model)
    logits = unwrap(model).get_output_embeddings()(hidden)  # type: ignore[operator]
    # Some families scale (Cohere, Granite, Falcon-H1) or cap (Gemma 2, RecurrentGemma) what the head gives. MPT has
    # a scale in its config, which its model does not use.
    scale = None if config.model_type == "mpt" else getattr(config, "logit_scale", None)
    logits = logits * (scale or 1) / (getattr(config, "logits_scaling", None) or 1)
    logits = logits * (getattr(config, "lm_head_multiplier", None) or 1)
    cap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    logits = logits if cap is None else torch.tanh(logits / cap) * cap
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
