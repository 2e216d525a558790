"""Which steering set each token of a batch has: an engine's request slots, and the row of the tables for each token."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..plans.serving import VARIABLE
from ..steering.scope import END, Scope
from .sets import ServingError, parse


class Slots:
    """The steering of each request slot of an engine. A slot without a set has row -1.

    Args:
        scopes: the scope of each set by name, in the order of the tables' rows.
        count: how many requests the engine runs at once.
    """

    def __init__(self, scopes: Mapping[str, Scope], count: int):
        self._scopes = dict(scopes)
        self._numbers = {name: row for row, name in enumerate(scopes)}
        self._row = np.full(count, -1, dtype=np.int32)
        # The half-open interval of the request's positions that is steered.
        self._start = np.zeros(count, dtype=np.int64)
        self._stop = np.full(count, END, dtype=np.int64)

    def put(self, slot: int, name: str | None, prompt: int) -> None:
        """A request comes into a slot; what was there before is forgotten.

        Args:
            name: the request's set; None for none. prompt: the prompt's length in tokens.
        """
        if name is None:
            self.clear(slot)
            return
        if name not in self._numbers:  # the API refuses it: who comes here went around it
            raise ServingError(f"steering set: found {name!r}, expected one of {', '.join(self._numbers)}")
        self._row[slot] = self._numbers[name]
        start, stop = self._scopes[name].interval(prompt, 0, 0)
        self._start[slot], self._stop[slot] = start, stop

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
    """The request slots of a ``VllmConfig``'s engine in this process, which its model and its logits processor share.

    Raises:
        ServingError: AUSTEER_SETS is not set in this process, or cannot be read.
    """
    if config.instance_id not in _slots:
        value = os.environ.get(VARIABLE)
        if value is None:
            raise ServingError(f"{VARIABLE} is not set in a process of the engine; set it for all of them")
        scopes = {name: spec.scope for name, spec in parse(value).items()}
        _slots[config.instance_id] = Slots(scopes, config.scheduler_config.max_num_seqs)
    return _slots[config.instance_id]
