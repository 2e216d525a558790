"""Momentum of differences that a test makes up."""

import numpy as np
import torch

from austeer import Momentum
from austeer.measuring.counting import Counting
from austeer.models.sites import Fingerprint


def momentum_of(delta, half=None):
    """Momentum of given differences [pairs, layers, width]; the half is every other pair by default."""
    pairs, layers, width = delta.shape
    counting, half = Counting(layers, width, "cpu"), torch.arange(0, pairs, 2) if half is None else half
    counting.add(torch.cat([delta, torch.zeros_like(delta)]), pairs, 0, half=half)
    model = Fingerprint("llama", layers, {"ffn": width}, "made up", None)
    return Momentum(
        {"ffn": counting.counters()}, pairs, model, half={"ffn": counting.half_counters()}, half_pairs=len(half)
    )


def signal(pairs, strength, seed=0, layers=10, width=400):
    """Differences with a mean of its own for each AU, [pairs, layers, width]; its spread is ``strength``."""
    generator = np.random.default_rng(seed)
    mean = np.random.default_rng(99).normal(size=(layers, width)) * strength
    return torch.from_numpy(generator.normal(size=(pairs, layers, width)) + mean)
