"""Semantics-Adaptive Dynamic Intervention: the elements that differ most are amplified, whatever they are.

Wang et al., "Semantics-Adaptive Activation Intervention for LLMs via Dynamic Steering Vectors" (ICLR 2025). With D the
mean over pairs of the last-token activations' differences, over all layers, and M = 1 at its K most important elements:

    A <- A + delta * (A * M)

which is ``scale`` with beta = 1 at the masked AUs, and the paper's delta as alpha. Its variants map onto sites: HIDDEN
is "ffn" (its published code reads the MLP's output) or "layer"; NEURON is "neuron", where the code takes the activation
function's output and we its product with the gate; HEAD is "attention", where K counts whole heads, by the mean of D
over a head. Ours differs in that all positions are steered (the paper: the prompt's last), and in that the largest
differences of either sign are taken (the published code: the largest positive ones).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from ..errors import SelectionError, check_count
from ..momentum.selection import plan_of
from ..statistics.ranking import by_difference
from .arm import Arm, Material
from .heads import SITE as HEAD_SITE
from .heads import head_size


def sadi_arms(material: Material, sites: Iterable[str], ks: Sequence[int], heads: Sequence[int]) -> Iterator[Arm]:
    """For each site an arm for each k, or at "attention" for each number of heads that the model has.

    Raises:
        SelectionError: more AUs than a site has, or no number of heads that the model has.
    """
    momentum = material.momentum
    for site in sites:
        counters = momentum.counters(site)
        if site != HEAD_SITE:
            largest = check_count("k", max(ks), counters.positive.numel(), f"AUs of {site!r}", SelectionError)
            plan = plan_of(momentum, site, by_difference(counters)[:largest], "scale", beta=1.0)
            yield from (Arm("sadi", plan, k) for k in ks)
            continue
        size = head_size(material.model, counters.positive.shape[1])
        everywhere = counters.positive.numel() // size
        counts = sorted({count for count in heads if 0 < count <= everywhere})
        if not counts:
            raise SelectionError(f"method 'sadi': found {list(heads)} heads, expected numbers from 1 to {everywhere}")
        means = counters.delta_sum.reshape(-1, size).mean(-1)  # [layers * heads]
        order = torch.argsort(means.abs(), descending=True, stable=True)[: counts[-1]]
        units = (order[:, None] * size + torch.arange(size, device="cpu")).flatten()
        plan = plan_of(momentum, site, units, "scale", beta=1.0)
        for count in counts:
            yield Arm("sadi", plan, count * size, f"{count} head{'s' if count > 1 else ''}")
