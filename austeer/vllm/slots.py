"""Which row of the tables each token of a batch has: an engine's request slots, and the buffer of rows."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..steering.markers import Answer, Automaton
from ..steering.scope import END
from .conditions import Batch, Conditions
from .layers import Tables
from .tables import Row


@dataclass(frozen=True)
class RowOf:
    """The steering of one request, as the scheduler tells it to the workers.

    Attributes:
        row: of the tables. digest: of what has to stand there. file: with that.
        start, stop: the half-open interval of the request's positions that is steered. prompt: its tokens.
        answer: of these positions those in an answer alone.
        judgement: the place of its probe's decision, without which it is not steered; None: it has no probe.
    """

    row: int
    digest: str
    file: str
    start: int
    stop: int
    prompt: int = 0
    answer: Answer | None = None
    judgement: int | None = None

    @property
    def conditional(self) -> bool:
        return self.judgement is not None or self.answer is not None


class Slots:
    """The steering of each request slot of an engine. A slot without steering has row -1.

    Args:
        count: how many requests the engine runs at once.
    """

    def __init__(self, count: int):
        self.count = count
        self._tables: Tables | None = None
        self._conditions: Conditions | None = None
        self._files: dict[int, tuple[str, str]] = {}  # what stands in each row: its digest and file
        self._row = np.full(count, -1, dtype=np.int32)
        self._start = np.zeros(count, dtype=np.int64)
        self._stop = np.full(count, END, dtype=np.int64)
        self._conditional: dict[int, _Conditional] = {}

    def put(self, slot: int, steering: RowOf | None, known: Sequence[int] = ()) -> None:
        """A request comes into a slot; what was there before is forgotten. Fills the row, where that has to be.

        Args:
            known: the request's tokens so far, of its prompt and after.
        """
        self.clear(slot)
        if steering is None:
            return
        found = steering.digest, steering.file
        if self._files.get(steering.row) != found:
            if self._tables is not None:
                self._tables.fill(steering.row, Row.load(steering.file))
            self._files[steering.row] = found
        self._row[slot], self._start[slot], self._stop[slot] = steering.row, steering.start, steering.stop
        if steering.conditional:
            self._conditional[slot] = _Conditional(steering, known)
            if self._conditions is not None:
                self._conditions.begin(slot, self._conditional[slot].state)

    def begin(self, tables: Tables, conditions: Conditions) -> None:
        """The model is ready now: what requests brought before its first forward pass is written."""
        self._tables, self._conditions = tables, conditions
        for row, (_, file) in self._files.items():
            tables.fill(row, Row.load(file))
        for slot, found in self._conditional.items():
            conditions.begin(slot, found.state)

    def clear(self, slot: int) -> None:
        self._row[slot] = -1
        self._conditional.pop(slot, None)

    def move(self, source: int, target: int, swap: bool) -> None:
        """The request of one slot goes to another, which is free, or whose request takes its place."""
        for values in (self._row, self._start, self._stop):
            values[source], values[target] = values[target], values[source]
        places = {source: target, target: source}
        self._conditional = {places.get(slot, slot): found for slot, found in self._conditional.items()}
        if self._conditions is not None:
            self._conditions.move(source, target)
        if not swap:
            self.clear(source)

    def answers(self) -> dict[int, Answer]:
        """The answer's markers of each slot that has some."""
        found = {slot: request.steering.answer for slot, request in self._conditional.items()}
        return {slot: answer for slot, answer in found.items() if answer is not None}

    def batch(self, slots: np.ndarray, lengths: np.ndarray, first: np.ndarray, count: int) -> Batch:
        """What is steered of a batch.

        Args:
            slots: int [requests], in the order of the batch. lengths: int [requests], how many tokens each has in it.
            first: int [requests], the position of each one's first token in its sequence.
            count: the batch's tokens and, after them, padding.
        """
        rows = np.full(count, -1, dtype=np.int32)
        found = Batch(rows)
        if not (self._row[slots] >= 0).any():
            return found
        begin = np.cumsum(lengths) - lengths
        tokens = int(lengths.sum())
        position = np.arange(tokens) + np.repeat(first - begin, lengths)
        slot = np.repeat(slots, lengths)
        steered = (self._start[slot] <= position) & (position < self._stop[slot])
        rows[:tokens] = np.where(steered, self._row[slot], -1)
        if self._conditional:
            for one, start, at, length in zip(slots.tolist(), begin.tolist(), first.tolist(), lengths.tolist()):
                if one in self._conditional:
                    self._conditional[one].look(found, one, start, range(at, at + length))
        return found


class _Conditional:
    """A request that is steered where its answer is, or if its probe fires.

    Attributes:
        state: of its answer after the tokens that are known.
    """

    def __init__(self, steering: RowOf, known: Sequence[int]):
        self.steering, self._known, self.state = steering, len(known), 0
        self._inside: list[bool] = []
        if steering.answer is not None:
            automaton = Automaton(steering.answer)
            for token in known:
                self.state = automaton.step(self.state, token)
                self._inside.append(automaton.on[self.state])

    def look(self, batch: Batch, slot: int, start: int, positions: range) -> None:
        """Adds what has to be decided on the device to a batch, in which the request's tokens begin at ``start``."""
        steering = self.steering
        last = steering.prompt - 1
        if steering.judgement is not None and last in positions and self._known <= steering.prompt:
            batch.judged.append((start + last - positions.start, steering.judgement))
            batch.judged_rows.append(steering.row)
        for position in range(max(positions.start, steering.prompt), positions.stop):
            token = start + position - positions.start
            if steering.answer is not None:
                if position >= self._known:
                    batch.unread.append((token, slot))
                elif not self._inside[position]:
                    batch.rows[token] = -1
            if steering.judgement is not None:
                batch.decided.append((token, steering.judgement))


class RowBuffer:
    """The rows of the running batch on the device, always at one address, so that captured graphs read them.

    Attributes:
        tensor: int32 [count].
    """

    def __init__(self, count: int, device: torch.device):
        with torch.inference_mode(False):  # an inference tensor could not be written outside of that mode
            self.tensor = torch.full((count,), -1, dtype=torch.int32, device=device)
        self._written = np.zeros(0, dtype=np.int32)
        self._changed = False

    def change(self) -> Tensor:
        """The tensor, to be changed on the device: what is written next is written in any case."""
        self._changed = True
        return self.tensor

    def write(self, rows: np.ndarray) -> None:
        """Sets the first rows, and none for the rest; decoding asks for the same ones again and again, at no cost."""
        if not self._changed and np.array_equal(rows, self._written):
            return
        self._changed = False
        values = np.full(max(len(rows), len(self._written)), -1, dtype=np.int32)
        values[: len(rows)] = rows
        source = torch.from_numpy(values)
        target: Tensor = self.tensor[: len(values)]
        if target.is_cuda:
            target.copy_(source.pin_memory(), non_blocking=True)
        else:
            target.copy_(source)
        self._written = rows.copy()


def judgements(config: Any) -> int:
    """How many requests with probes are in an engine at once: those that run, and some that wait."""
    return 4 * config.scheduler_config.max_num_seqs


#: As long as an engine's model or logits processor has them.
_slots: weakref.WeakValueDictionary[str, Slots] = weakref.WeakValueDictionary()


def slots_of(config: Any) -> Slots:
    """The request slots of a ``VllmConfig``'s engine in this process, shared by its model and its logits processor."""
    slots = _slots.get(config.instance_id)
    if slots is None:
        slots = _slots[config.instance_id] = Slots(config.scheduler_config.max_num_seqs)
    return slots
