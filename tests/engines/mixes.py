"""Plans that are added up, and the texts that show what they do, for tests inside serving engines."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

import austeer

#: Prompts of unlike lengths, and how many tokens are written after each.
PROMPTS = (
    "The weekend trip was",
    "Compared with the inn across the road, this one felt",
    "My first impression of the new library:",
)
TOKENS = 16
#: What logits are compared on.
TEXT = "The room was larger than in the pictures, and the people at the desk remembered our names."

#: Plans for different sites, each with its strength.
Parts = Sequence[tuple[austeer.Plan, float]]


def steered(model: nn.Module, parts: Parts) -> AbstractContextManager[Any]:
    """The model under our own steering; as it is where there is nothing to steer."""
    if not parts:
        return nullcontext()
    first, *rest = (plan for plan, _ in parts)
    return austeer.steer(model, sum(rest, first), alpha={plan.sites[0]: alpha for plan, alpha in parts})


def engine_logits(engine: Any, ids: torch.Tensor, request: Any = None, **options: Any) -> torch.Tensor:
    """vLLM's logits of the whole vocabulary at each token: float32 [tokens, vocabulary].

    Args:
        request: a LoRARequest. options: of the sampling parameters.
    """
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=1, logprobs=-1, prompt_logprobs=-1, flat_logprobs=True, detokenize=False, **options
    )
    (output,) = engine.generate([{"prompt_token_ids": ids[0].tolist()}], params, lora_request=request)
    rows = []
    for found in (output.prompt_logprobs, output.outputs[0].logprobs):
        for start, end in zip(found.start_indices, found.end_indices, strict=True):
            if end > start:  # the first token of a prompt has nothing before it
                row = torch.full((engine.model_config.get_vocab_size(),), torch.nan)
                row[torch.tensor(found.token_ids[start:end])] = torch.tensor(found.logprobs[start:end])
                rows.append(row)
    return torch.stack(rows)
