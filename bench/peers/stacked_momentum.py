"""Momentum as a careful PyTorch user writes it in an afternoon: hooks, batches, last tokens stacked, counted at once.

Sixteen texts a batch, shortest texts first, padded on the left. The language-model head is not run, no cache is made.
Last tokens stay on the model's device until the end, where two comparisons count every AU of every layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from austeer import Pair
from austeer.models.structure import input_device

from . import SITES, Counts, reading

BATCH = 16


def measure(model: PreTrainedModel, tokenizer, pairs: Sequence[Pair]) -> Counts:
    """Counts both sites of a Llama, with or without offloaded weights."""
    found = {}
    for site, (positive, negative) in activations(model, tokenizer, pairs).items():
        found[site] = ((positive > negative).sum(0).cpu(), (positive < negative).sum(0).cpu())
    return found


@torch.no_grad()
def activations(model: PreTrainedModel, tokenizer, pairs: Sequence[Pair]) -> dict[str, tuple[Tensor, Tensor]]:
    """site -> (positive, negative) last-token activations, each [pairs, layers, width]."""
    device = input_device(model)
    texts = [pair.prompt + answer for pair in pairs for answer in (pair.positive, pair.negative)]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    stacked: dict[str, list[Tensor]] = {site: [] for site in SITES}
    for start in range(0, len(texts), BATCH):
        batch = [texts[i] for i in order[start : start + BATCH]]
        inputs = tokenizer(batch, return_tensors="pt", padding=True, padding_side="left")
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        last: dict[str, list[Tensor]] = {site: [] for site in SITES}
        # A copy: a view would keep every position.
        with reading(model, lambda site, x, last=last: last[site].append(x[:, -1].clone())):  # type: ignore[misc]
            model.get_decoder()(**inputs.to(device), use_cache=False)
        for site in SITES:
            stacked[site].append(torch.stack(last[site], 1))  # [texts, layers, width]
    place = torch.tensor(order).argsort()  # where each text's row is
    joined = {site: torch.cat(rows) for site, rows in stacked.items()}
    return {site: (rows[place[0::2]], rows[place[1::2]]) for site, rows in joined.items()}
