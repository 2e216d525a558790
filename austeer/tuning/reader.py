"""A linear reader: which side of the pairs a text is on, by what the unsteered model makes of it.

A logistic regression on the residual stream behind the middle decoder layer, the mean over the answer's tokens. It
needs no second model, and is trusted as far as it tells answers apart that it was not trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..baselines.probes import Probes, fit
from ..errors import CaptureError
from ..forward.causality import plain_batches
from ..forward.logits import LOGIT_ROWS, log_probabilities
from ..forward.tokens import encode, length_limit
from ..models.sites import Site, find_sites, layers_path
from ..models.structure import decoder_of, evaluating, first_layers, first_tensor, input_device, unwrap
from ..pairs.groups import groups_of
from ..pairs.pairs import Pairs

#: The most pairs that a reader is trained on, and tokens of an answer that it reads: more would cost more than the
#: texts that it is to judge.
PAIRS, TOKENS = 48, 40

#: Parts of the pairs: each is read once by a reader that was trained on the others.
FOLDS = 5

#: The share of held-out answers that a reader puts on their side, from which on it has an opinion.
TRUSTED = 0.7


@dataclass(frozen=True, eq=False)
class Reader:
    """Attributes:
    layer: behind which decoder layer it reads. texts: how many it was trained on.
    accuracy: share of answers, each read by a reader of other groups of pairs, that are put on their side.
    """

    layer: int
    texts: int
    accuracy: float
    center: Tensor
    scale: Tensor
    probe: Probes

    @property
    def is_trusted(self) -> bool:
        return self.accuracy >= TRUSTED

    def logit(self, states: Tensor) -> Tensor:
        """float64 [texts], above zero on the wanted side; states [texts, width]."""
        return self.probe.logit(((states.double() - self.center) / self.scale)[None])[0]


def middle(model: nn.Module) -> Site:
    """Where a reader reads."""
    sites = find_sites(model, "layer")["layer"]
    return sites[len(sites) // 2]


def train_reader(model: nn.Module, tokenizer, pairs: Pairs, most: int | None = None) -> Reader | None:
    """A reader of some of the pairs' answers, of so many pairs at most; None where they are of fewer than two groups,
    so that none can be held out.
    """
    different = [pair for pair in pairs if pair.positive != pair.negative]
    keys = [hashlib.sha256(repr(pair).encode()).digest() for pair in different]
    some = [
        different[i]
        for i in sorted(range(len(keys)), key=keys.__getitem__)[: PAIRS if most is None else min(most, PAIRS)]
    ]
    groups, _ = groups_of([pair.prompt for pair in some], [(pair.positive, pair.negative) for pair in some])
    if len(set(groups)) < 2:
        return None
    special = not pairs.chat_template
    prompts = encode(tokenizer, [pair.prompt for pair in some], special)
    texts = encode(tokenizer, [p.prompt + p.positive for p in some] + [p.prompt + p.negative for p in some], special)
    starts = [min(len(prompts[i % len(some)]), len(ids) - 1) for i, ids in enumerate(texts)]
    limit, site = length_limit(model, None), middle(model)
    cut = [max(0, min(start + TOKENS, len(ids)) - limit) for start, ids in zip(starts, texts)]  # of a long prompt
    texts = [ids[first : start + TOKENS] for first, start, ids in zip(cut, starts, texts)]
    states = read(model, texts, [start - first for first, start in zip(cut, starts)], site)[0].double()
    positive = torch.arange(len(texts), device="cpu") < len(some)
    order = sorted(set(groups), key=lambda group: hashlib.sha256(group.encode()).digest())
    fold = torch.tensor([order.index(group) % FOLDS for group in groups], device="cpu").repeat(2)
    right = 0
    for number in range(min(FOLDS, len(order))):
        held = fold == number
        reader = _fitted(site.layer, states[~held], positive[~held], 0.0)
        right += int(((reader.logit(states[held]) > 0) == positive[held]).sum())
    return _fitted(site.layer, states, positive, right / len(texts))


def _fitted(layer: int, states: Tensor, positive: Tensor, accuracy: float) -> Reader:
    center, scale = states.mean(0), states.std(0).clamp(min=torch.finfo(torch.float32).tiny)
    x = (states - center) / scale
    # The weights lie in the span of the texts, which are fewer than the model is wide: a small problem, and the same.
    basis, coordinates = torch.linalg.qr(x.T)
    found = fit(coordinates.T[None], positive)
    return Reader(layer, len(states), accuracy, center, scale, Probes(found.weight @ basis.T, found.bias))


@torch.no_grad()
def read(
    model: nn.Module,
    ids: Sequence[Sequence[int]],
    starts: Sequence[int],
    site: Site,
    *,
    scored: bool = False,
    batch_tokens: int = 2048,
) -> tuple[Tensor, Tensor]:
    """What the model makes of the end of each text, from the token ``starts`` on.

    Args:
        site: of a decoder layer's output. scored: also run the layers behind it, for the log-probabilities.

    Returns:
        Mean of the site over those tokens, float32 [texts, width], and their mean log-probability, nats, float64
        [texts] (0 where it is not scored).

    Raises:
        CaptureError: the layer did not run.
    """
    decoder, device = decoder_of(model), input_device(model)
    kept: list[Tensor] = []
    hook = (
        unwrap(model)
        .get_submodule(site.path)
        .register_forward_hook(lambda module, args, output: kept.append(first_tensor(output)))
    )
    states: list[Tensor] = [torch.empty(0, device="cpu")] * len(ids)
    log_prob = torch.zeros(len(ids), dtype=torch.float64, device="cpu")
    try:
        for batch in plain_batches(model, [list(row) for row in ids], batch_tokens):
            kept.clear()
            with evaluating(model), first_layers(model, layers_path(model), 10**6 if scored else site.layer + 1):
                output = decoder(input_ids=batch.ids.to(device), use_cache=False)
            if not kept:
                raise CaptureError(f"layer {site.layer} ({site.path}): was not reached, expected it to run")
            for row, i in enumerate(batch.texts.tolist()):
                states[i] = kept[0][row, starts[i] : len(ids[i])].float().mean(0).cpu()
                if scored:
                    log_prob[i] = _mean_log_prob(model, output.last_hidden_state[row], ids[i], starts[i])
    finally:
        hook.remove()
    return torch.stack(states), log_prob


def _mean_log_prob(model: nn.Module, hidden: Tensor, ids: Sequence[int], start: int) -> float:
    first, total = max(start, 1), 0.0  # nothing predicts a first token
    for at in range(first, len(ids), LOGIT_ROWS):
        target = torch.tensor(ids[at : at + LOGIT_ROWS], device=hidden.device)
        chance = log_probabilities(model, hidden[at - 1 : at - 1 + len(target)])
        total += float(chance.gather(-1, target[:, None].to(chance.device)).double().sum())
    return total / max(1, len(ids) - first)
