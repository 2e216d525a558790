"""Text that a model writes after a prompt: for the command line and the demo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PairsError
from ..models.structure import input_device, vocabulary_size
from ..pairs.chat import ChatForm, check_chat, options_of, render_chat
from ..pairs.pair import has_lone_surrogate
from .tokens import check_vocabulary, encode


@torch.no_grad()
def continue_prompts(
    model: nn.Module,
    tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 40,
    chat: ChatForm = False,
    temperature: float | None = None,
    seed: int = 0,
    special: bool = True,
    stop: Callable[[str], bool] | None = None,
) -> list[str]:
    """What the model writes after each prompt, without the prompt; one batch, padded on the left.

    Args:
        chat: put the prompts through the tokenizer's chat template, with these options if it is a dictionary
            (:data:`austeer.pairs.chat.ChatForm`). temperature: sample at it; greedy if None.
        special: whether the tokenizer adds its special tokens; a prompt that went through a chat template has them.
        stop: told each text as it grows, token by token; where it says True no more is written.

    Raises:
        PairsError: no prompt, or one without a token; no chat template, or one that ignores an option.
    """
    if not prompts:
        raise PairsError("found no prompt, expected at least one")
    for number, prompt in enumerate(prompts):
        if has_lone_surrogate(prompt):
            raise PairsError(f"prompt {number}: found bytes that are not UTF-8, expected text")
    texts = list(prompts)
    if chat:
        check_chat(tokenizer, options_of(chat))
        texts = [render_chat(tokenizer, prompt, options_of(chat)) for prompt in prompts]
    ids = encode(tokenizer, texts, add_special_tokens=special and not chat)
    for number, tokens in enumerate(ids):
        if not tokens:
            raise PairsError(
                f"prompt {number}: found an empty text, and this tokenizer begins texts with no token of its own; "
                "expected something to continue"
            )
    check_vocabulary(vocabulary_size(model), ids)
    written = continue_ids(
        model, tokenizer, ids, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, stop=stop
    )
    return tokenizer.batch_decode(written, skip_special_tokens=True)


@torch.no_grad()
def continue_ids(
    model: nn.Module,
    tokenizer,
    ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 40,
    temperature: float | None = None,
    seed: int = 0,
    stop: Callable[[str], bool] | None = None,
    **options: Any,
) -> list[list[int]]:
    """The tokens that the model writes after each prompt's, up to the one that ends it; arguments as above.

    Args:
        options: others of ``generate``.
    """
    ends, size = (tokenizer.pad_token_id, tokenizer.eos_token_id), vocabulary_size(model)
    pad = next((i for i in ends if i is not None and i < size), 0)  # a pad token may have been added afterwards
    length = max(map(len, ids))
    device = input_device(model)
    input_ids = torch.tensor([[pad] * (length - len(row)) + [*row] for row in ids], device=device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ids], device=device)
    sampling: dict[str, Any] = {"do_sample": temperature is not None, **options}
    if temperature is not None:
        sampling["temperature"] = temperature
    if stop is not None:
        from transformers import StoppingCriteriaList  # two seconds to import

        def ended(input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
            written = tokenizer.batch_decode(input_ids[:, length:], skip_special_tokens=True)
            return torch.tensor([stop(text) for text in written], device=input_ids.device)

        sampling["stopping_criteria"] = StoppingCriteriaList([ended])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        output = model.generate(  # type: ignore[operator]
            input_ids=input_ids, attention_mask=mask, max_new_tokens=max_new_tokens, pad_token_id=pad, **sampling
        )
    return [_until_the_end(row, _ends(model)) for row in output[:, length:].tolist()]


def _ends(model: nn.Module) -> set[int]:
    """The tokens at which ``generate`` ends a text."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return set() if found is None else {found} if isinstance(found, int) else set(found)


def _until_the_end(tokens: list[int], ends: set[int]) -> list[int]:
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]
