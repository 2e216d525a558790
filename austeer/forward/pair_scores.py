"""The log-odds of the two texts of pairs, and their gradients by shifts of AUs: the effect of an AU.

    effect[i] = d (log p(positive | prompt) - log p(negative | prompt)) / d s[i]   at s = 0,

s a shift of the AU at every position; nats a unit of the AU. What the two texts begin with alike is not scored: its
log-probability is the same in both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .gradients import ShiftGradients
from .logits import LOGIT_ROWS, log_probabilities
from .packing import Batch, common_prefix, pair_batches
from .tree_masks import masks


@dataclass(frozen=True)
class PairBatch:
    """Both texts of some pairs, ready for one pass, on the CPU.

    Attributes:
        batch: their rows, each of one pair. pairs: int64 [pairs], their numbers, ascending.
        pair_of: int64 [rows], the place in ``pairs`` of each row's.
        before: int64 [scored], row * length + column of the token before each one that is scored.
        targets: int64 [scored], the tokens that are scored. signs: float32 [scored], 1 of a positive, -1 of a negative.
    """

    batch: Batch
    pairs: Tensor
    pair_of: Tensor
    before: Tensor
    targets: Tensor
    signs: Tensor


def scored_batches(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]], tokens: int, share: bool = True, apart: int | None = None
) -> Iterator[PairBatch]:
    """Batches of pairs (positive, negative) of token ids that begin with one token at least alike; see pair_batches."""
    starts = [common_prefix(*pair) for pair in pairs]
    for batch in pair_batches(pairs, tokens, share, apart):
        length = batch.ids.shape[1]
        before: list[Tensor] = []
        targets: list[Tensor] = []
        signs: list[Tensor] = []
        row_pairs = torch.zeros(len(batch.ids), dtype=torch.int64, device="cpu")
        for text, end in zip(batch.texts.tolist(), batch.ends.tolist()):
            row, column = divmod(end, length)
            sees = None if batch.sees is None else batch.sees[row, column]
            path = torch.arange(column + 1, device="cpu") if sees is None else sees.nonzero()[:, 0]
            own = path[starts[text // 2] :]
            before.append(row * length + path[starts[text // 2] - 1 : -1])
            targets.append(batch.ids[row, own])
            signs.append(torch.full((len(own),), 1.0 if text % 2 == 0 else -1.0, device="cpu"))
            row_pairs[row] = text // 2
        numbers, pair_of = row_pairs.unique(return_inverse=True)
        yield PairBatch(batch, numbers, pair_of, *map(torch.cat, (before, targets, signs)))


def effects_of(gradients: ShiftGradients, found: PairBatch, form: str | None) -> dict[str, Tensor]:
    """The effect of every AU on each pair: for each site float32 [pairs, layers, width], on the CPU.

    Args:
        gradients: attached. form: how the model takes trees, :data:`austeer.forward.tree_masks.FORMS`.
    """
    batch, device = found.batch, gradients.device
    with torch.inference_mode(False):  # what is made under it cannot be followed back
        mask = None if batch.sees is None or form is None else masks(gradients.model, batch, device, form)
    hidden = gradients.hidden_states(batch.ids, mask, None if mask is None else batch.positions)
    by_row = gradients.backward(hidden, _outward(gradients.model, hidden, found))
    return {
        name: values.new_zeros(len(found.pairs), *values.shape[1:]).index_add_(0, found.pair_of, values)
        for name, values in by_row.items()
    }


def _outward(model: nn.Module, hidden: Tensor, found: PairBatch) -> Tensor:
    """The gradient of the log-odds by the last hidden states."""
    outward = torch.zeros_like(hidden)
    flat, kept = outward.view(-1, outward.shape[-1]), hidden.detach().view(-1, hidden.shape[-1])
    for start in range(0, len(found.before), LOGIT_ROWS):
        chosen = slice(start, start + LOGIT_ROWS)
        before, targets, signs = (t[chosen].to(hidden.device) for t in (found.before, found.targets, found.signs))
        with torch.inference_mode(False), torch.enable_grad():
            leaf = kept[before].requires_grad_()
            chance = log_probabilities(model, leaf).gather(-1, targets[:, None])[:, 0]
            (gradient,) = torch.autograd.grad((chance * signs).sum(), leaf)
        flat.index_add_(0, before, gradient)  # in a tree both texts follow the same token
    return outward
