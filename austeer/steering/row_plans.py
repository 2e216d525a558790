"""Which plan each row of a batch has: the choice, and its copy on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import SteeringError

NO_NAMES = 'rows: found one plan for all rows, expected plans with names; use steer(model, {"name": plan, ...})'


class Rows:
    """A plan's number for each row, -1 for none.

    Args:
        plans: the plans' names, in the order of the strength tables' rows.
        device: where the model's inputs are.

    Attributes:
        version: how often the choice, or a plan's strength, was changed.
        everywhere: the number of the one plan that is for all rows of any batch; None where each row has its own.
    """

    def __init__(self, plans: Sequence[str], device: torch.device):
        self.plans = list(plans)
        self.everywhere: int | None = None
        self.version = 0
        self._device = device
        self._numbers: list[int] | None = None
        self._buffer: Tensor | None = None  # int32 [rows], the same on the device, refilled in place
        self._expanded: tuple[int, Tensor] | None = None

    @property
    def chosen(self) -> list[str | None] | str | None:
        """As it was chosen: one name or None for each row, one name for all, or None for no choice."""
        if self.everywhere is not None:
            return self.plans[self.everywhere]
        if self._numbers is None:
            return None
        return [None if number < 0 else self.plans[number] for number in self._numbers]

    def choose(self, rows: Sequence[str | None] | str | None) -> None:
        """Sets each row's plan; None takes the choice back.

        Raises:
            SteeringError: an unknown name, or no list of names.
        """
        if rows is None or isinstance(rows, str):
            names: list[str | None] = [] if rows is None else [rows]
        elif isinstance(rows, Sequence) and rows:
            names = list(rows)
        else:
            raise SteeringError(f"rows: found {rows!r}, expected a list with a plan's name or None for each row")
        known = {name: number for number, name in enumerate(self.plans)}
        for name in names:
            if name is not None and (not isinstance(name, str) or name not in known):
                raise SteeringError(f"rows: found {name!r}, expected one of {', '.join(map(repr, known))}, or None")
        numbers = [-1 if name is None else known[name] for name in names]
        self.everywhere = numbers[0] if isinstance(rows, str) else None
        self._numbers = None if rows is None or isinstance(rows, str) else numbers
        self._expanded = None
        self.version += 1
        if not numbers:
            return
        with torch.inference_mode(False):  # an inference tensor could not be refilled outside of that mode
            new = torch.tensor(numbers, dtype=torch.int32, device="cpu")
            if self._buffer is not None and self._buffer.shape == new.shape:
                self._buffer.copy_(new)  # in place: a captured graph reads it
            else:
                self._buffer = new.to(self._device)

    def renew(self) -> None:
        """Says that a plan's strength was changed."""
        self.version += 1

    def expect(self, batch: int) -> None:
        """Raises SteeringError where the choice is for another number of rows."""
        if self._numbers is not None and len(self._numbers) != batch:
            raise SteeringError(
                f"rows: found {len(self._numbers)} entries and a batch of {batch}, expected one entry for each row of "
                "the batch as it is given to generate (beams and return sequences follow), or of a direct call"
            )

    def steered(self, batch: int) -> int:
        """How many rows of ``batch`` have a plan."""
        if self._numbers is None:
            return batch
        return batch // len(self._numbers) * sum(number >= 0 for number in self._numbers)

    def of(self, batch: int, given: int | None, on_device: bool) -> Tensor:
        """int32 [batch], each row's plan.

        Args:
            given: how many rows ``generate`` was given, of which the batch may have several each; None outside it.
            on_device: take what the device's buffer will hold when the operations run (compiled or captured).

        Raises:
            SteeringError: there is no choice, or it is for another number of rows.
        """
        if self._buffer is None or (self._numbers is None and self.everywhere is None):
            raise SteeringError(
                "rows: found no choice, expected steering.rows([...]) with a plan's name or None for each row, or one "
                f"name for all (plans: {', '.join(map(repr, self.plans))})"
            )
        if self._numbers is None:
            return self._buffer.expand(batch)
        times = batch // given if given and batch % given == 0 else 1
        self.expect(batch // times)
        if times == 1:
            return self._buffer
        if on_device:
            return self._buffer.repeat_interleave(times)
        if self._expanded is None or self._expanded[0] != batch:
            self._expanded = (batch, self._buffer.repeat_interleave(times))
        return self._expanded[1]
