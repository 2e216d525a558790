"""Inference-Time Intervention: the attention heads that tell the two sides apart best, shifted along their directions.

Li et al., "Inference-Time Intervention: Eliciting Truthful Answers from a Language Model" (NeurIPS 2023). A head's
activations x are its slice of the attention output projection's input. For each head a logistic regression is trained
on the last-token activations of one half of the pairs, and its accuracy on the other half ranks it. For the best K:

    d = mean of x over positive texts - mean over negative ones,   theta = d / |d|
    sigma = standard deviation of theta . x over all texts
    x <- x + alpha * sigma * theta

which is ``shift`` with delta = sigma * theta at the heads' AUs. The mean difference is the paper's best direction
("mass mean shift"); its own setting is K = 48 of 1,024 heads with alpha = 15. Ours differs in that all positions are
shifted, the prompt's too (the paper: the last one while writing), and in that heads of equal accuracy are ordered by
their loss.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import SelectionError
from ..pairs.groups import BY, groups_of
from ..pairs.pairs import Pairs
from ..plans.plan import Plan
from ..statistics import signed_rate
from .arm import Arm, Material
from .heads import SITE, attention_sites, head_size
from .pair_activations import PairActivations, pair_activations
from .probes import fit


@dataclass(frozen=True)
class Ranking:
    """Attributes:
    order: int64 [layers * heads], row of the layer * heads + head, best first.
    accuracy: float64 [layers * heads], of each head's probe on the half that it was not trained on.
    shift: float64 [layers, heads, size], sigma * theta.
    """

    order: Tensor
    accuracy: Tensor
    shift: Tensor


def iti_arms(material: Material, heads: Sequence[int]) -> Iterator[Arm]:
    """An arm for each number of heads; those that the model does not have are left out.

    Needs no counters: the pairs' activations are read anew, and those of all pairs are held while heads are ranked.

    Raises:
        SelectionError: too few pairs to train and check a probe, or no number of heads that the model has.
    """
    momentum = material.momentum
    sites, momentum = attention_sites(material.model, momentum)
    size = head_size(material.model, sites[0].width)
    everywhere = len(sites) * (sites[0].width // size)
    counts = sorted({count for count in heads if 0 < count <= everywhere})
    if not counts:
        raise SelectionError(f"method 'iti': found {list(heads)} heads, expected numbers from 1 to {everywhere}")
    activations = pair_activations(material.model, material.tokenizer, material.pairs, sites)
    found = rank_heads(activations, train_half(material.pairs, activations.number), size)
    chosen = found.order[: counts[-1]]
    # Heads are slices, one behind another.
    order = (chosen[:, None] * size + torch.arange(size, device="cpu")).flatten()
    width = sites[0].width
    beta = signed_rate(activations.counters(), len(material.pairs)).flatten()
    plan = Plan(
        site=(SITE,) * len(order),
        layer=torch.tensor([site.layer for site in sites], device="cpu")[order // width].int(),
        index=(order % width).int(),
        beta=beta[order].float(),
        delta=found.shift.flatten()[order].float(),
        operation="shift",
        model=momentum.model,
        pairs=len(material.pairs),
        chat_template=material.pairs.chat_template,
    )
    for count in counts:
        yield Arm("iti", plan, count * size, f"{count} head{'s' if count > 1 else ''}")


def rank_heads(activations: PairActivations, train: Tensor, size: int) -> Ranking:
    """Probes every head, and works out its shift.

    Args:
        train: bool [pairs], the pairs on which probes are trained; they are checked on the others.
        size: AUs of a head.
    """
    accuracy, loss, shifts = [], [], []
    for row in range(activations.positive.shape[1]):  # layer by layer: float64 of all at once would be large
        sides = (activations.positive[:, row], activations.negative[:, row])
        x, label = _texts(sides, torch.ones_like(train), size)
        direction = x[:, label].mean(1) - x[:, ~label].mean(1)  # [heads, size]
        direction = direction / direction.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        sigma = torch.einsum("hns,hs->hn", x, direction).std(-1, correction=0)
        shifts.append(sigma[:, None] * direction)
        probes = fit(*_texts(sides, train, size))
        check = _texts(sides, ~train, size)
        accuracy.append(probes.accuracy(*check))
        loss.append(probes.loss(*check))
    flat = torch.cat(accuracy)
    keys = [np.arange(len(flat)), torch.cat(loss).numpy(), -flat.numpy()]
    return Ranking(torch.from_numpy(np.lexsort(keys)), flat, torch.stack(shifts))


def train_half(pairs: Pairs, number: Sequence[int]) -> Tensor:
    """Half of the pairs, drawn by a hash of their groups, which stay on one side: bool [len(number)].

    Args:
        number: the pairs of ``pairs`` that are to be divided.

    Raises:
        SelectionError: fewer than two pairs in a half.
    """
    some = [pairs[i] for i in number]
    groups, by = groups_of([pair.prompt for pair in some], [(pair.positive, pair.negative) for pair in some])
    members: dict[str, list[int]] = {}
    for place, group in enumerate(groups):
        members.setdefault(group, []).append(place)
    train = torch.zeros(len(number), dtype=torch.bool, device="cpu")
    for group in sorted(members, key=lambda group: hashlib.sha256(group.encode()).digest()):
        if 2 * int(train.sum()) < len(number):
            train[members[group]] = True
    if min(int(train.sum()), int((~train).sum())) < 2:
        raise SelectionError(
            f"method 'iti': found {len(number)} pairs of different sides in {len(members)} groups ({BY[by]}), too few "
            "to train a probe on two of them and check it on two others; give more pairs"
        )
    return train


def _texts(sides: tuple[Tensor, Tensor], pairs: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """float64 [heads, texts, size] of both sides of some pairs, and bool [texts], which are positive."""
    x = torch.cat([side[pairs] for side in sides]).double()
    label = torch.arange(len(x), device="cpu") < len(x) // 2
    return x.unflatten(-1, (-1, size)).transpose(0, 1), label
