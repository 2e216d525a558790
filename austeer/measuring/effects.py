"""Effects: what shifting an AU does to the log-odds of the wanted answer, by gradient, pair by pair.

    effect[i] = d (log p(positive | prompt) - log p(negative | prompt)) / d s[i]   at s = 0,

s a shift of the AU at every position: nats a unit of the AU. Momentum says which AUs differ between good and bad texts,
the effect which ones do something about it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..counters import Counters
from ..errors import PairsError
from ..forward.gradients import ShiftGradients
from ..forward.logits import LOGIT_ROWS, log_probabilities
from ..forward.packing import batches, common_prefix
from ..forward.tokens import check_vocabulary, encode, length_limit, tokenise
from ..models.sites import Layout, find_sites
from ..models.structure import vocabulary_size
from ..pairs.halves import half_rows
from ..pairs.pairs import Pairs
from ..utils.progress import Progress


def effects(
    model: nn.Module,
    tokenizer,
    pairs: Pairs,
    sites: str | Sequence[str] = ("attention", "ffn"),
    *,
    batch_tokens: int = 1024,
    max_length: int | None = None,
    layout: Layout | None = None,
    progress: bool | None = None,
) -> tuple[dict[str, Counters], dict[str, Counters], int]:
    """Counters of the effect of every AU over pairs, those of one half, and how many pairs that half has."""
    found = find_sites(model, sites, layout)
    gradients = ShiftGradients(model, found)
    special = not pairs.chat_template
    tokens = tokenise(tokenizer, list(pairs), length_limit(model, max_length), special=special, source=pairs.source)
    check_vocabulary(vocabulary_size(model), tokens.positive + tokens.negative)
    prompts = encode(tokenizer, [pairs[i].prompt for i in tokens.number], special)
    half = set(half_rows([pairs[i].prompt for i in tokens.number]).tolist())
    shapes = {name: (len(all_), all_[0].width) for name, all_ in found.items()}
    totals = {name: _none(shape) for name, shape in shapes.items()}
    halves = {name: _none(shape) for name, shape in shapes.items()}
    texts, starts = [], []
    for prompt, positive, negative in zip(prompts, tokens.positive, tokens.negative):
        # Where a token joins prompt and answer, both are scored from before it, so that they compare.
        start = min(common_prefix(prompt, positive), common_prefix(prompt, negative))
        start = min(start, len(positive) - 1, len(negative) - 1)
        texts += [positive, negative]
        starts += [start, start]
    if min(starts, default=1) < 1:
        raise PairsError(f"{pairs.source}: found a pair without a token before its answer, expected a prompt")
    waiting: dict[int, dict[str, Tensor]] = {}
    with gradients.attached(), Progress("effects", len(tokens.number), "pairs", progress) as bar:
        for batch in batches(texts, batch_tokens, share=False):
            numbers = batch.texts.tolist()
            signs = [1 if number % 2 == 0 else -1 for number in numbers]
            part = _gradients(gradients, batch.ids, [texts[n] for n in numbers], [starts[n] for n in numbers], signs)
            for row, number in enumerate(numbers):
                mine = {name: values[row] for name, values in part.items()}
                other = waiting.pop(number // 2, None)
                if other is None:
                    waiting[number // 2] = {name: values.clone() for name, values in mine.items()}
                    continue
                for name in mine:
                    effect = (mine[name] + other[name]).double()
                    _add(totals[name], effect)
                    if number // 2 in half:
                        _add(halves[name], effect)
                bar.advance(1)
    return totals, halves, len(half)


def _gradients(gradients: ShiftGradients, ids: Tensor, texts, starts, signs) -> dict[str, Tensor]:
    """The gradient of each text's answer's log-probability, times its sign."""
    lengths = torch.tensor([len(text) for text in texts])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    hidden = gradients.hidden_states(ids, mask)
    place = [(row, p) for row, text in enumerate(texts) for p in range(starts[row] - 1, len(text) - 1)]
    target = torch.tensor([texts[row][p + 1] for row, p in place], device=hidden.device)
    sign = torch.tensor([float(signs[row]) for row, _ in place], device=hidden.device)
    rows, columns = (torch.tensor(n, device=hidden.device) for n in zip(*place))
    outward = torch.zeros_like(hidden)
    for start in range(0, len(place), LOGIT_ROWS):
        chosen = slice(start, start + LOGIT_ROWS)
        with torch.inference_mode(False), torch.enable_grad():
            leaf = hidden.detach()[rows[chosen], columns[chosen]].requires_grad_()
            log_p = log_probabilities(gradients.model, leaf).gather(-1, target[chosen, None])[:, 0]
            (outward[rows[chosen], columns[chosen]],) = torch.autograd.grad((log_p * sign[chosen]).sum(), leaf)
    return gradients.backward(hidden, outward)


def _none(shape: tuple[int, int]) -> Counters:
    counts = [torch.zeros(shape, dtype=torch.int64) for _ in range(2)]
    return Counters(*counts, *(torch.zeros(shape, dtype=torch.float64) for _ in range(2)))


def _add(counters: Counters, effect: Tensor) -> None:
    counters.positive += effect > 0
    counters.negative += effect < 0
    counters.delta_sum += effect
    counters.delta_square_sum += effect.square()
