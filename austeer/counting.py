"""Running momentum counters of one site on a device."""

from __future__ import annotations

import torch
from torch import Tensor

from austeer_kernels import NO_PAIR, momentum_counters, momentum_update

from .momentum import Counters


class Counting:
    """Counters of one site, flat over layers and width, fed buffer by buffer.

    Args:
        layers: how many layers are measured. width: AUs a layer. device: where activations come from.
    """

    def __init__(self, layers: int, width: int, device: torch.device | str):
        self.shape = (layers, width)
        *self.totals, self.first_nonfinite = momentum_counters(layers * width, device)

    def add(self, buffer: Tensor, pairs: int, offset: int, row: int | None = None) -> None:
        """One kernel call over a buffer of activations; it does not wait for the device.

        Args:
            buffer: [texts, layers, width]; text r and text r + ``pairs`` are a pair, positive first.
            offset: the number of the first pair, for :meth:`nonfinite`.
            row: the row of the counters that the buffer's one layer belongs to; by default it has all.
        """
        rows = buffer.flatten(1)  # [texts, layers * width]
        width = self.shape[1]
        part = slice(None) if row is None else slice(row * width, (row + 1) * width)
        positive, negative, delta_sum, delta_square_sum = (t[part] for t in self.totals)
        momentum_update(
            rows[:pairs],
            rows[pairs : 2 * pairs],
            positive,
            negative,
            delta_sum,
            delta_square_sum,
            self.first_nonfinite[part],
            offset,
        )

    def nonfinite(self) -> tuple[int, int, int] | None:
        """The first pair with a NaN or an infinity, its row of layers and its AU; waits for the device."""
        pair, column = (int(v) for v in self.first_nonfinite.min(0))
        return None if pair == NO_PAIR else (pair, *divmod(column, self.shape[1]))

    def counters(self) -> Counters:
        """A copy on the CPU, [layers, width]."""
        return Counters(*(t.view(self.shape).clone().cpu() for t in self.totals))

    def restore(self, counters: Counters) -> None:
        """Goes on from earlier counters."""
        for mine, theirs in zip(self.totals, counters.tensors().values()):
            mine.copy_(theirs.flatten())
