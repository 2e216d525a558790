"""A search's time: how much of it is gone, and what was left out for lack of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

from .schedule import RESERVE

#: Until which part of the budget the search, two sites together, texts of the best settings, items of the test part,
#: and times of tokens go on: each then ends with the unit of work that it is at.
SEARCH, MIXED, WRITING, HELD_OUT, TIMES = 1 - RESERVE, 0.8, 0.85, 0.9, 1.0


@dataclass(eq=False)
class Budget:
    """Attributes:
    seconds: for all of it; None for as long as it takes. started: by :func:`time.perf_counter`.
    beside: seconds that are not part of it.
    left_out: what was not done for lack of time, in words.
    """

    seconds: float | None = None
    started: float = field(default_factory=lambda: perf_counter())
    beside: float = 0.0
    left_out: list[str] = field(default_factory=list)

    @property
    def spent(self) -> float:
        """Seconds of it that are gone."""
        return self.total - self.beside

    @property
    def total(self) -> float:
        """Seconds since the start."""
        return perf_counter() - self.started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done once, and kept for other searches, is not part of the time of one."""
        before = perf_counter()
        try:
            yield
        finally:
            self.beside += perf_counter() - before

    def is_over(self, part: float) -> bool:
        """Whether this part of the time is gone; never without a budget."""
        return self.seconds is not None and self.spent >= part * self.seconds

    def note(self, what: str, done: int, of: int) -> None:
        """Notes what was done in part only."""
        if done < of:
            self.left_out.append(f"{what}: {done} of {of}")
