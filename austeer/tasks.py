"""Scoring: what a model thinks of given continuations, and of neutral text."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from .capture import check_vocabulary, evaluating, vocabulary_size
from .errors import PairsError
from .packing import batches
from .pairs import Pairs
from .sites import decoder_of, input_device, text_config, unwrap
from .tokens import encode


@torch.no_grad()
def log_odds(model: nn.Module, tokenizer, pairs: Pairs, *, batch_tokens: int = 2048) -> Tensor:
    """log p(positive | prompt) - log p(negative | prompt) of each pair, in nats: float64 [pairs].

    The log-probability of a continuation is the sum over its tokens. Contexts that begin another one are not run
    again: two one-token continuations of a prompt cost one pass over the prompt.
    """
    special = not pairs.chat_template
    prompts = encode(tokenizer, [p.prompt for p in pairs], special)
    sides = [
        encode(tokenizer, [p.prompt + getattr(p, side) for p in pairs], special) for side in ("positive", "negative")
    ]
    texts = [ids for side in sides for ids in side]
    # Where a token joins prompt and continuation, both sides are scored from before it, so that they compare.
    starts = [
        min(_common_prefix(prompt, positive), _common_prefix(prompt, negative))
        for prompt, positive, negative in zip(prompts, *sides)
    ] * 2
    for i, (start, ids) in enumerate(zip(starts, texts)):
        if not 0 < start < len(ids):
            raise PairsError(f"{pairs.source}, pair {i % len(pairs)}: no token of its own for the continuation")
    score = torch.zeros(len(texts), dtype=torch.float64)
    contexts, owner = _distinct_contexts([ids[:-1] for ids in texts])
    wanted: list[list[int]] = [[] for _ in contexts]  # context -> the texts that read it
    for text, context in enumerate(owner):
        wanted[context].append(text)
    for batch, hidden in _hidden_states(model, contexts, batch_tokens):
        places = [
            (text, hidden[row, position], texts[text][position + 1])
            for row, context in enumerate(batch)
            for text in wanted[context]
            for position in range(starts[text] - 1, len(texts[text]) - 1)
        ]
        logits = _logits(model, torch.stack([h for _, h, _ in places])).double().log_softmax(-1).cpu()
        for row, (text, _, target) in zip(logits, places):
            score[text] += row[target]
    return score[: len(pairs)] - score[len(pairs) :]


@torch.no_grad()
def cross_entropy(model: nn.Module, tokenizer, texts: Sequence[str], *, batch_tokens: int = 2048) -> float:
    """Mean cross-entropy of all tokens of ``texts`` but each text's first, in nats a token."""
    ids = [row for row in encode(tokenizer, texts) if len(row) > 1]
    total, count = 0.0, 0
    for batch, hidden in _hidden_states(model, ids, batch_tokens):
        for row, i in enumerate(batch):
            logits = _logits(model, hidden[row, : len(ids[i]) - 1]).float()
            target = torch.as_tensor(ids[i][1:], device=logits.device)
            total += float(nn.functional.cross_entropy(logits, target, reduction="sum"))
            count += len(target)
    if not count:
        raise PairsError("neutral text: found no text of at least two tokens")
    return total / count


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _distinct_contexts(contexts: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    """The contexts that are no beginning of another, and for each context the number of the one that serves it."""
    order = sorted(range(len(contexts)), key=contexts.__getitem__)
    distinct: list[list[int]] = []
    owner = [0] * len(contexts)
    for i in reversed(order):  # a beginning sorts right before what it begins
        if not distinct or distinct[-1][: len(contexts[i])] != contexts[i]:
            distinct.append(contexts[i])
        owner[i] = len(distinct) - 1
    return distinct, owner


@torch.no_grad()
def _hidden_states(
    model: nn.Module, token_ids: list[list[int]], batch_tokens: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Last hidden states of texts, batch by batch: which texts, and [batch, length, hidden], padded on the right."""
    decoder, device = decoder_of(model), input_device(model)
    accepts = inspect.signature(decoder.forward).parameters
    check_vocabulary(vocabulary_size(model), token_ids)
    for batch in batches(token_ids, batch_tokens, share=False):
        texts = batch.texts.tolist()
        # Causal attention: what is padded on the right cannot reach what is read.
        lengths = torch.tensor([len(token_ids[i]) for i in texts])
        ids = batch.ids.to(device)
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long().to(device)
        cache = {"use_cache": False} if "use_cache" in accepts else {}
        with evaluating(model):
            output = decoder(input_ids=ids, attention_mask=mask, **cache)
        yield texts, output.last_hidden_state


def _logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """Logits as the model makes them: some families scale (Cohere, Granite) or cap (Gemma 2) what the head gives."""
    config = text_config(model)
    logits = unwrap(model).get_output_embeddings()(hidden)  # type: ignore[operator]
    logits = logits * (getattr(config, "logit_scale", None) or 1) / (getattr(config, "logits_scaling", None) or 1)
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap
