"""What steerings do to text that should stay as it is: several as rows of one batch, beside the unsteered model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ..forward.causality import expect_causal, plain_batches
from ..forward.logits import LOGIT_ROWS, log_probabilities
from ..forward.neutral import neutral_ids
from ..forward.tokens import check_vocabulary
from ..models.structure import decoder_of, evaluating, input_device, vocabulary_size

#: Names of a steering's plans, and None for the model as it is: what is scored beside each other.
Names = Sequence[str | None]


class ByRows(Protocol):
    """An attached steering with plans by name (:class:`austeer.Steering`)."""

    def rows(self, rows: Sequence[str | None] | str | None) -> AbstractContextManager[None]: ...


@dataclass(frozen=True)
class SideEffects:
    """What steerings do to text that should stay as it is.

    Attributes:
        kl: float64 [names, texts], KL(unsteered || steered) of the next token, mean over the text's tokens, nats.
        rise: float64 [names, texts], rise of the cross-entropy, nats a token.
        tokens: int64 [texts], how many tokens of each text were scored: the weights of a mean over texts.
    """

    kl: Tensor
    rise: Tensor
    tokens: Tensor

    def mean(self) -> list[tuple[float, float]]:
        """(KL, rise) of each name, nats a token, over all tokens."""
        weight = self.tokens.double() / self.tokens.sum()
        return list(zip((self.kl @ weight).tolist(), (self.rise @ weight).tolist()))


def side_effects(
    model: nn.Module,
    tokenizer,
    texts: Sequence[str],
    steering: ByRows,
    names: Sequence[str],
    *,
    batch_tokens: int = 2048,
    on_batch: Callable[[int], None] = lambda tokens: None,
) -> SideEffects:
    """KL divergence and rise of the cross-entropy on neutral text, for every steering.

    Args:
        steering: attached, with plans by name. names: which of them. on_batch: told the tokens of each forward pass.
    """
    ids = neutral_ids(tokenizer, texts)
    return side_effects_of(model, ids, steering, names, batch_tokens=batch_tokens, on_batch=on_batch)


@torch.no_grad()
def side_effects_of(
    model: nn.Module,
    ids: Sequence[Sequence[int]],
    steering: ByRows,
    names: Sequence[str],
    *,
    batch_tokens: int = 2048,
    on_batch: Callable[[int], None] = lambda tokens: None,
) -> SideEffects:
    """The same on token ids of texts, each of at least two tokens.

    The unsteered model is a row of the same batch, so nothing but the steering differs.
    """
    kl = torch.zeros(len(names), len(ids), dtype=torch.float64, device="cpu")
    rise = torch.zeros_like(kl)
    step = max(1, batch_tokens // max(map(len, ids)) - 1)  # names beside the unsteered row of one text
    for first in range(0, len(names), step):
        part = names[first : first + step]
        for chunk, batch, hidden in hidden_states(
            model, ids, batch_tokens, steering, [None, *part], on_batch, whole=True
        ):
            assert chunk == slice(0, len(part) + 1)
            for row, i in enumerate(batch):
                target = torch.tensor(ids[i][1:], device="cpu")
                kl[first : first + len(part), i], rise[first : first + len(part), i] = _divergence(
                    model, hidden[:, row, : len(target)], target
                )
    return SideEffects(kl, rise, torch.tensor([len(row) - 1 for row in ids], device="cpu"))


def _divergence(model: nn.Module, hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Mean KL and rise of each steered row against row 0: float64 [rows - 1]; hidden [rows, tokens, width]."""
    kl = torch.zeros(len(hidden) - 1, dtype=torch.float64, device="cpu")
    rise = torch.zeros_like(kl)
    step = max(1, LOGIT_ROWS // 2)
    for start in range(0, len(target), step):
        part, wanted = hidden[:, start : start + step], target[start : start + step, None].to(hidden.device)
        base = log_probabilities(model, part[0])
        chance = base.exp()
        for row in range(1, len(part)):
            steered = log_probabilities(model, part[row])
            kl[row - 1] += (chance * (base - steered)).sum(dtype=torch.float64).cpu()
            rise[row - 1] += (base.gather(-1, wanted) - steered.gather(-1, wanted)).sum(dtype=torch.float64).cpu()
    return kl / len(target), rise / len(target)


@torch.no_grad()
def hidden_states(
    model: nn.Module,
    token_ids: Sequence[Sequence[int]],
    batch_tokens: int,
    steering: ByRows | None = None,
    names: Names = (None,),
    on_batch: Callable[[int], None] = lambda tokens: None,
    whole: bool = False,
) -> Iterator[tuple[slice, list[int], Tensor]]:
    """Last hidden states of texts under each steering, batch by batch: which names, which texts, and
    [names, texts, length, hidden], padded on the right.

    Args:
        whole: all names in every batch, though one text of each be more than ``batch_tokens``.
    """
    decoder, device = decoder_of(model), input_device(model)
    accepts = inspect.signature(decoder.forward).parameters
    check_vocabulary(vocabulary_size(model), token_ids)
    expect_causal(model, nullcontext if steering is None else lambda: steering.rows([None]))
    together = len(names) if whole else max(1, min(len(names), batch_tokens // max(map(len, token_ids))))
    for first in range(0, len(names), together):
        part = names[first : first + together]
        for batch in plain_batches(model, token_ids, max(1, batch_tokens // len(part))):
            texts = batch.texts.tolist()
            # Causal attention: what is padded on the right cannot reach what is read.
            lengths = torch.tensor([len(token_ids[i]) for i in texts], device="cpu")
            ids = batch.ids.to(device)
            mask = (torch.arange(ids.shape[1], device="cpu") < lengths[:, None]).long().to(device)
            cache = {"use_cache": False} if "use_cache" in accepts else {}
            rows = nullcontext() if steering is None else steering.rows([name for name in part for _ in texts])
            with evaluating(model), rows:
                output = decoder(input_ids=ids.repeat(len(part), 1), attention_mask=mask.repeat(len(part), 1), **cache)
            on_batch(ids.numel() * len(part))
            hidden = output.last_hidden_state
            yield slice(first, first + len(part)), texts, hidden.view(len(part), len(texts), *hidden.shape[1:])
