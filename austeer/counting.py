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

    Attributes:
        totals: the counters of all pairs. half: those of one half of them (:mod:`austeer.halves`).
    """

    def __init__(self, layers: int, width: int, device: torch.device | str):
        self.shape = (layers, width)
        *self.totals, self.first_nonfinite = momentum_counters(layers * width, device)
        *self.half, self._ignored = momentum_counters(layers * width, device)  # of NaN the totals know

    def add(self, buffer: Tensor, pairs: int, offset: int, row: int | None = None, half: Tensor | None = None) -> None:
        """A kernel call over a buffer of activations, and one over the rows of a half; none waits for the device.

        Args:
            buffer: [texts, layers, width]; text r and text r + ``pairs`` are a pair, positive first.
            offset: the number of the first pair, for :meth:`nonfinite`.
            row: the row of the counters that the buffer's one layer belongs to; by default it has all.
            half: which of the pairs are in the half, int64, from 0; on the CPU. None of them by default.
        """
        rows = buffer.flatten(1)  # [texts, layers * width]
        positive, negative = rows[:pairs], rows[pairs : 2 * pairs]
        width = self.shape[1]
        part = slice(None) if row is None else slice(row * width, (row + 1) * width)
        self._update(self.totals, self.first_nonfinite, positive, negative, part, offset)
        if half is not None and len(half):
            chosen = half.to(rows.device, non_blocking=True)
            positive, negative = positive.index_select(0, chosen), negative.index_select(0, chosen)
            self._update(self.half, self._ignored, positive, negative, part, offset)

    @staticmethod
    def _update(
        counters: list[Tensor], first_nonfinite: Tensor, positive: Tensor, negative: Tensor, part: slice, offset: int
    ) -> None:
        wins, losses, delta_sum, delta_square_sum = (t[part] for t in counters)
        momentum_update(positive, negative, wins, losses, delta_sum, delta_square_sum, first_nonfinite[part], offset)

    def nonfinite(self) -> tuple[int, int, int] | None:
        """The first pair with a NaN or an infinity, its row of layers and its AU; waits for the device."""
        pair, column = (int(v) for v in self.first_nonfinite.min(0))
        return None if pair == NO_PAIR else (pair, *divmod(column, self.shape[1]))

    def counters(self) -> Counters:
        """A copy on the CPU, [layers, width]."""
        return Counters(*(t.view(self.shape).clone().cpu() for t in self.totals))

    def half_counters(self) -> Counters:
        """A copy of those of the half on the CPU, [layers, width]."""
        return Counters(*(t.view(self.shape).clone().cpu() for t in self.half))

    def restore(self, counters: Counters, half: Counters) -> None:
        """Goes on from earlier counters."""
        for kept, earlier in ((self.totals, counters), (self.half, half)):
            for mine, theirs in zip(kept, earlier.tensors().values()):
                mine.copy_(theirs.flatten())
