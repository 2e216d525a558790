"""Which row of the tables each token of a batch has: an engine's request slots, and the buffer of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..steering.scope import END
from .layers import Tables
from .tables import Row


@dataclass(frozen=True)
class RowOf:
    """The steering of one request, as the scheduler tells it to the workers.

    Attributes:
        row: of the tables. digest: of what has to stand there. file: with that.
        start, stop: the half-open interval of the request's positions that is steered.
    """

    row: int
    digest: str
    file: str
    start: int
    stop: int


class Slots:
    """The steering of each request slot of an engine. A slot without steering has row -1.

    Args:
        count: how many requests the engine runs at once.
    """

    def __init__(self, count: int):
        self._tables: Tables | None = None
        self._files: dict[int, tuple[str, str]] = {}  # what stands in each row: its digest and file
        self._row = np.full(count, -1, dtype=np.int32)
        self._start = np.zeros(count, dtype=np.int64)
        self._stop = np.full(count, END, dtype=np.int64)

    def put(self, slot: int, steering: RowOf | None) -> None:
        """A request comes into a slot; what was there before is forgotten. Fills the row, where that has to be."""
        if steering is None:
            self.clear(slot)
            return
        found = steering.digest, steering.file
        if self._files.get(steering.row) != found:
            if self._tables is not None:
                self._tables.fill(steering.row, Row.load(steering.file))
            self._files[steering.row] = found
        self._row[slot], self._start[slot], self._stop[slot] = steering.row, steering.start, steering.stop

    def fill(self, tables: Tables) -> None:
        """The model has its tables now: those of the requests that came before its first forward pass are filled."""
        self._tables = tables
        for row, (_, file) in self._files.items():
            tables.fill(row, Row.load(file))

    def clear(self, slot: int) -> None:
        self._row[slot] = -1

    def move(self, source: int, target: int, swap: bool) -> None:
        """The request of one slot goes to another, which is free, or whose request takes its place."""
        for values in (self._row, self._start, self._stop):
            values[source], values[target] = values[target], values[source]
        if not swap:
            self.clear(source)

    def rows(self, slots: np.ndarray, lengths: np.ndarray, first: np.ndarray, count: int) -> np.ndarray:
        """The table row of each token of a batch.

        Args:
            slots: int [requests], in the order of the batch. lengths: int [requests], how many tokens each has in it.
            first: int [requests], the position of each one's first token in its sequence.
            count: the length of the result: the batch's tokens and, after them, padding.

        Returns:
            int32 [count], -1 for what is not steered.
        """
        rows = np.full(count, -1, dtype=np.int32)
        if (self._row[slots] >= 0).any():
            begin = np.cumsum(lengths) - lengths
            tokens = int(lengths.sum())
            position = np.arange(tokens) + np.repeat(first - begin, lengths)
            slot = np.repeat(slots, lengths)
            steered = (self._start[slot] <= position) & (position < self._stop[slot])
            rows[:tokens] = np.where(steered, self._row[slot], -1)
        return rows


class RowBuffer:
    """The rows of the running batch on the device, always at one address, so that captured graphs read them.

    Attributes:
        tensor: int32 [count].
    """

    def __init__(self, count: int, device: torch.device):
        with torch.inference_mode(False):  # an inference tensor could not be written outside of that mode
            self.tensor = torch.full((count,), -1, dtype=torch.int32, device=device)
        self._written = np.zeros(0, dtype=np.int32)

    def write(self, rows: np.ndarray) -> None:
        """Sets the first rows, and none for the rest; decoding asks for the same ones again and again, at no cost."""
        if np.array_equal(rows, self._written):
            return
        values = np.full(max(len(rows), len(self._written)), -1, dtype=np.int32)
        values[: len(rows)] = rows
        source = torch.from_numpy(values)
        target: Tensor = self.tensor[: len(values)]
        if target.is_cuda:
            target.copy_(source.pin_memory(), non_blocking=True)
        else:
            target.copy_(source)
        self._written = rows.copy()


_slots: dict[str, Slots] = {}


def slots_of(config: Any) -> Slots:
    """The request slots of a ``VllmConfig``'s engine in this process, shared by its model and its logits processor."""
    if config.instance_id not in _slots:
        _slots[config.instance_id] = Slots(config.scheduler_config.max_num_seqs)
    return _slots[config.instance_id]
