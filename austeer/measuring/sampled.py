"""Next tokens that a model draws itself, the gradients of their log-probabilities, and what differentiating holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..forward.gradients import ShiftGradients
from ..forward.logits import LOGIT_ROWS, log_probabilities
from ..models.sites import Fingerprint
from ..models.structure import vocabulary_size
from ..momentum.profile import DTYPE

#: Draws of a text whose gradients are held at a time: as much as two layers' activations.
TOGETHER = 32


@torch.no_grad()
def sampled_tokens(model: nn.Module, hidden: Tensor, tokens: Sequence[int], draws: int, seeds: Sequence[int]) -> Tensor:
    """Next tokens y that the model draws itself: int64 [draws, rows, length], 0 where none counts.

    Args:
        hidden: last hidden states [rows, length, width]. tokens: how many of each row's first positions count.
        seeds: one a row, so that its draws do not depend on its batch.
    """
    drawn = torch.zeros(draws, *hidden.shape[:2], dtype=torch.int64, device=hidden.device)
    for row, seed in enumerate(seeds):
        generator = torch.Generator(hidden.device).manual_seed(seed)
        for part in _parts(tokens[row]):
            chance = log_probabilities(model, hidden[row, part]).exp()
            drawn[:, row, part] = torch.multinomial(chance, draws, replacement=True, generator=generator).T
    return drawn


@torch.enable_grad()
def score_gradients(model: nn.Module, hidden: Tensor, tokens: Sequence[int], drawn: Tensor) -> Tensor:
    """d log p(y) / d hidden: [draws, rows, length, width], 0 where none counts.

    Args:
        hidden, tokens: as of :func:`sampled_tokens`. drawn: its answer, or some draws of it.
    """
    found = hidden.new_zeros(len(drawn), *hidden.shape)
    for row, count in enumerate(tokens):
        for part in _parts(count):
            leaf = hidden[row, part].detach().requires_grad_()
            log_p = log_probabilities(model, leaf)
            for draw, chosen in enumerate(drawn[:, row, part]):
                total = log_p.gather(-1, chosen[:, None]).sum()
                (found[draw, row, part],) = torch.autograd.grad(total, leaf, retain_graph=draw + 1 < len(drawn))
    return found


def _parts(count: int) -> Iterator[slice]:
    """Positions whose logits are held at a time."""
    return (slice(start, min(start + LOGIT_ROWS, count)) for start in range(0, count, LOGIT_ROWS))


@dataclass(frozen=True)
class ProfileMemory:
    """What making a profile holds beside the weights, bytes.

    Attributes:
        rows: the profile's own, in the CPU's memory; twice that while a file is written.
        activations: of one batch, kept for its backward passes. gradients: by its last hidden states. logits: of some
            positions. These lie where the model does.
        batch: tokens of the largest batch, padding included.
    """

    rows: int
    activations: int
    gradients: int
    logits: int
    batch: int

    @property
    def device(self) -> int:
        """Where the model is."""
        return self.activations + self.gradients + self.logits


def memory_of(
    gradients: ShiftGradients, model: Fingerprint, text: Sequence[int], batch: int, draws: int, each: int
) -> ProfileMemory:
    """Found by a forward pass of ``text`` whose graph is looked at.

    Args:
        batch: tokens of the largest batch. draws: of all texts together. each: of one.
    """
    known = {p.untyped_storage().data_ptr() for p in gradients.model.parameters() if p.device.type != "meta"}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    ids = torch.tensor([list(text)], device="cpu")
    plain = ShiftGradients(gradients.model, gradients.sites)
    with plain.attached(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        hidden = plain.hidden_states(ids, torch.ones_like(ids))
    size = hidden.shape[-1] * hidden.element_size()  # bytes a token
    activations = sum(kept.values()) / len(text)
    if gradients.recomputed:
        activations = activations / model.layers + len(gradients.recomputed) * size
    units = sum(len(found) * found[0].width for found in gradients.sites.values())
    return ProfileMemory(
        rows=draws * units * DTYPE.itemsize,
        activations=int(activations * batch),
        gradients=min(each, TOGETHER) * batch * size,
        logits=4 * min(LOGIT_ROWS, len(text)) * vocabulary_size(gradients.model) * torch.float32.itemsize,
        batch=batch,
    )
