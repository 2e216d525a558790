"""Strength tables: the device buffers that say how strongly each AU of one site and layer is steered.

A change of alpha or k refills them in place, so no hook, compiled graph or captured graph has to be made anew.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor


class StrengthTable:
    """gamma and shift of the AUs of one (site, layer), on the device of the activations.

    The steered activation is x + gamma * (|x| if magnitude else x) + shift, with

    ========= ============= ============= =========
    operation gamma         shift         magnitude
    ========= ============= ============= =========
    scale     alpha * beta  0             False
    push      alpha * beta  0             True
    shift     0             alpha * delta False
    ========= ============= ============= =========

    Attributes:
        index: int64 [count], the AUs, distinct.
        gamma, shift: float32 [1, count].
        dense_gamma, dense_shift: float32 [1, width], the same with zeros for the other AUs.
        rank: int64 [count], each AU's place in its plan, from 0; AUs from k on get gamma = shift = 0.
    """

    def __init__(
        self, index: Tensor, beta: Tensor, delta: Tensor, rank: Tensor, width: int, operation: str, device: torch.device
    ):
        self._beta, self._delta, self.rank = beta, delta, rank  # on the CPU, where alpha and k are set
        self.operation = operation
        self.magnitude = operation == "push"
        self.width = width
        self.device = device
        zeros = partial(torch.zeros, dtype=torch.float32, device=device)
        with torch.inference_mode(False):  # inference tensors could not be refilled outside of that mode
            self.index = index.long().clone().to(device)
            self.gamma, self.shift = zeros(1, len(index)), zeros(1, len(index))
            self.dense_gamma, self.dense_shift = zeros(1, width), zeros(1, width)

    @torch.no_grad()
    def fill(self, alpha: float, k: int) -> None:
        """Writes the strengths for ``alpha`` and the first ``k`` AUs of the plan."""
        strength = torch.where(self.rank < k, torch.tensor(alpha, dtype=torch.float32), 0.0)
        zero = torch.zeros_like(strength)
        gamma = zero if self.operation == "shift" else strength * self._beta
        shift = strength * self._delta if self.operation == "shift" else zero
        self.gamma.copy_(gamma[None])
        self.shift.copy_(shift[None])
        self.dense_gamma.index_copy_(1, self.index, self.gamma)
        self.dense_shift.index_copy_(1, self.index, self.shift)

    def to(self, device: torch.device) -> None:
        """Moves the buffers, once, where activations turn out to be on another device than was expected."""
        for name in ("index", "gamma", "shift", "dense_gamma", "dense_shift"):
            setattr(self, name, getattr(self, name).to(device))
        self.device = device
