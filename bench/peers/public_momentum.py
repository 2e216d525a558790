"""The method's public algorithm, as the paper and a reading of its code describe it; no line of it was copied.

Each text runs alone through the whole model, the prompt of a pair twice. Every position of every layer goes to the
CPU, and all hidden states with it; of the last token a view is kept. Then a Python loop scores one atomic unit (AU)
after the other. Kinder than there: both sites are read in one pass, and texts are not cut.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from austeer import Pair
from austeer.models.structure import input_device

from . import SITES, Counts, reading


@dataclass(frozen=True)
class PublicMomentum:
    """What the public algorithm found, of so many pairs.

    Attributes:
        scored: site -> (share of pairs with a larger positive, with a larger negative activation, the signed larger one
            of both), each [layers, width]. scoring_seconds: of the loop over the AUs; they hardly grow with the pairs.
    """

    scored: dict[str, tuple[Tensor, Tensor, Tensor]]
    pairs: int
    scoring_seconds: float

    def counts(self) -> Counts:
        """The rates as whole numbers of pairs."""
        return {
            site: (torch.round(up * self.pairs).long(), torch.round(down * self.pairs).long())
            for site, (up, down, _) in self.scored.items()
        }


def measure(model: PreTrainedModel, tokenizer, pairs: Sequence[Pair]) -> PublicMomentum:
    """Runs the public algorithm on a Llama, with or without offloaded weights."""
    positive = collect(model, tokenizer, [pair.prompt + pair.positive for pair in pairs])
    negative = collect(model, tokenizer, [pair.prompt + pair.negative for pair in pairs])
    begin = time.perf_counter()
    scored = {site: score(positive[site], negative[site]) for site in SITES}
    return PublicMomentum(scored, len(pairs), time.perf_counter() - begin)


@torch.no_grad()
def collect(model: PreTrainedModel, tokenizer, texts: Sequence[str]) -> dict[str, list[list[Tensor]]]:
    """For each site, text and layer the last token's activations: a view [width] of all positions' on the CPU."""
    device = input_device(model)
    kept: dict[str, list[list[Tensor]]] = {site: [] for site in SITES}
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt").to(device)
        passed: dict[str, list[Tensor]] = {site: [] for site in SITES}
        with reading(model, lambda site, x, passed=passed: passed[site].append(x.detach().cpu())):  # type: ignore[misc]
            hidden = model(**inputs, output_hidden_states=True).hidden_states
        _ = [states.detach().cpu() for states in hidden]  # moved, and not used
        for site in SITES:
            kept[site].append([x[0, -1, :] for x in passed[site]])
    return kept


def score(positive: Sequence[Sequence[Tensor]], negative: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """(positive rate, negative rate, score) of each AU of one site, [layers, width].

    Args:
        positive, negative: for each pair and layer the activations [width].
    """
    layers, width = len(positive[0]), positive[0][0].shape[0]
    rows = []
    for layer in range(layers):
        wanted = torch.stack([text[layer] for text in positive])  # [pairs, width]
        unwanted = torch.stack([text[layer] for text in negative])
        for unit in range(width):
            momentum = wanted[:, unit] - unwanted[:, unit]
            up = (momentum > 0).float().mean()
            down = (momentum < 0).float().mean()
            rows.append(torch.stack([up, down, torch.where(up >= down, up, -down)]))
    up, down, beta = torch.stack(rows).unflatten(0, (layers, width)).unbind(-1)
    return up, down, beta
