"""The batch that a model is about to run: its rows, ready on the device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from .conditions import Conditions
from .layers import install
from .slots import RowBuffer, Slots
from .tables import Structure


class Running:
    """Rows, probes' scores and conditions of a model, on its device.

    Attributes:
        scores: float32 [tokens], what probes made of the tokens that they judged in the last forward pass.

    Args:
        slots: of its engine. layers, part: of this process, as :func:`install` takes them.
        tokens: of a batch, at most. vocabulary: how many tokens the model has.
        judgements: places of probes' decisions.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        slots: Slots,
        layers: range,
        part: tuple[int, int],
        tokens: int,
        vocabulary: int,
        judgements: int,
        device: torch.device,
    ):
        self._slots, self._has_probes = slots, bool(structure.probes)
        self.rows, self._judged = RowBuffer(tokens, device), RowBuffer(tokens, device)
        with torch.inference_mode(False):
            self.scores = torch.zeros(tokens, device=device)
        self._conditions = Conditions(slots.count, judgements, self.scores, vocabulary)
        tables = install(model, structure, layers, self.rows.tensor, part, (self._judged.tensor, self.scores))
        slots.begin(tables, self._conditions)

    def prepare(
        self, slots: np.ndarray, lengths: np.ndarray, first: np.ndarray, count: int, ids: Tensor | None
    ) -> None:
        """Makes ready for a forward pass; the arguments are those of :meth:`Slots.batch`.

        Args:
            ids: the batch's tokens; None where no request of it has an answer's scope.
        """
        with torch.inference_mode():
            batch = self._slots.batch(slots, lengths, first, count)
            self._conditions.settle(batch.judged)
            self.rows.write(batch.rows)
            if batch.unread:
                assert ids is not None
                self._conditions.read(self.rows.change(), batch.unread, self._slots.answers(), ids)
            if batch.decided:
                self._conditions.decide(self.rows.change(), batch.decided)
            if self._has_probes:
                judged = np.full(count, -1, dtype=np.int32)
                for (token, _), row in zip(batch.judged, batch.judged_rows):
                    judged[token] = row
                self._judged.write(judged)
