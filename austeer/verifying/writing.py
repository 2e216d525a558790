"""What a Transformers model writes after prompts, greedily, with the likeliest tokens at each step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..models.structure import base_of, evaluating, input_device
from ..plans.replay import Answer

#: Tokens written after each prompt, and how many of the likeliest are kept at each.
TOKENS, LIKELIEST = 6, 4
#: Decimals of a log-probability: less than engines differ by in float32.
DECIMALS = 4


@torch.no_grad()
def written(model: nn.Module, prompts: Sequence[Sequence[int]]) -> tuple[Answer, ...] | None:
    """One answer a prompt, up to a token that ends it; None where the model gives what is no number.

    Each prompt runs by itself: padding is not without effect in every model. What the model's own configuration of
    ``generate`` forbids, forces or repeats does not count: a server may not know of it.
    """
    answers = []
    with evaluating(model), _plain_generation(model):
        for ids in prompts:
            rows = torch.tensor([ids], device=input_device(model))
            output = model.generate(  # type: ignore[operator]
                input_ids=rows,
                attention_mask=torch.ones_like(rows),
                max_new_tokens=TOKENS,
                output_logits=True,
                return_dict_in_generate=True,
            )
            tokens = output.sequences[0, rows.shape[1] :].tolist()
            steps = []
            for token, logits in zip(tokens, output.logits):
                likely = logits[0].float().log_softmax(-1)
                if not likely.isfinite().any() or likely.isnan().any():
                    return None
                best = likely.topk(min(LIKELIEST, len(likely)))
                found = dict(zip(best.indices.tolist(), best.values.tolist()))
                found[token] = likely[token].item()
                # Of two that are equally likely the one that was taken comes first; what cannot be (-inf) is left out.
                order = sorted(found, key=lambda one: (one != token, -found[one]))[:LIKELIEST]
                steps.append(tuple((one, round(found[one], DECIMALS)) for one in order if found[one] > -1e4))
            answers.append(tuple(steps))
    return tuple(answers)


@contextmanager
def _plain_generation(model: nn.Module) -> Iterator[None]:
    """Greedy ``generate``, up to the model's own end; its call takes what it leaves open from the configuration."""
    from transformers import GenerationConfig

    owner = base_of(model)
    own = owner.generation_config
    plain = GenerationConfig(do_sample=False, num_beams=1, pad_token_id=0)
    plain.eos_token_id = own.eos_token_id  # type: ignore[union-attr]
    owner.generation_config = plain  # type: ignore[assignment]
    try:
        yield
    finally:
        owner.generation_config = own
