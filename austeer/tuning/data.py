"""What is measured, what is tuned on and what is only looked at in the end; and text that should stay as it is."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import TaskError
from ..pairs.pairs import Pairs
from ..tasks.task import Task

#: At most so many items to measure, tune and test.
Most = tuple[int | None, int | None, int | None]

#: Fractions of the data.
PARTS = {"measure": 0.5, "tune": 0.25, "test": 0.25}


@dataclass(frozen=True)
class Parts:
    """Disjoint parts of the data; items of one group are in one part.

    Attributes:
        measure: momentum is counted on its pairs; None where there was a momentum already.
        tune: everything is chosen on it. test: it is looked at once, for the figures.
        seed: of the split; None where the parts were given.

    Raises:
        TaskError: items of one group in both ``tune`` and ``test``.
    """

    measure: Pairs | None
    tune: Task
    test: Task
    seed: int | None = None

    def __post_init__(self) -> None:
        shared = {item.group for item in self.tune} & {item.group for item in self.test}
        if shared:
            raise TaskError(
                f"{self.test.source}: found {len(shared)} groups in the test part that are tuned on, first "
                f"{min(shared)[:60]!r}; expected none"
            )

    @property
    def name(self) -> str:
        return self.tune.name

    @property
    def source(self) -> str:
        return self.tune.source

    def to_json(self) -> dict[str, Any]:
        """What anyone needs to tell the parts apart again: sizes and digests."""
        parts = {"tune": self.tune, "test": self.test}
        found: dict[str, Any] = {name: {"items": len(task), "digest": task.digest()} for name, task in parts.items()}
        if self.measure is not None:
            found["measure"] = {"pairs": len(self.measure), "digest": Task.of_pairs(self.measure).digest()}
        return {"seed": self.seed, "grouped_by": self.tune.grouped_by, **found}


def split(
    data: Task | Pairs | Parts,
    *,
    measured: bool = False,
    most: Most = (None, None, None),
    seed: int = 0,
) -> Parts:
    """Parts of the data.

    Args:
        data: pairs, or a task with options; or parts that were made elsewhere, which stay as they are.
        measured: a momentum of other data is there, so none is needed of these.
        most: at most so many items in each part, drawn with the seed.

    Raises:
        TaskError: too few items for the parts. PairsError: fewer than two pairs to measure.
    """
    if isinstance(data, Parts):
        if not measured and data.measure is None:
            raise TaskError(f"{data.source}: found parts without pairs to measure, expected them, or a momentum")
        return data
    task = data if isinstance(data, Task) else Task.of_pairs(data)
    fractions = {name: part for name, part in PARTS.items() if not (measured and name == "measure")}
    total = sum(fractions.values())
    found = task.split({name: part / total for name, part in fractions.items()}, seed)
    limits = dict(zip(PARTS, most))
    cut = {name: part if limits[name] is None else part.take(limits[name] or 0, seed) for name, part in found.items()}
    return Parts(None if measured else cut["measure"].pairs(), cut["tune"], cut["test"], seed)


def digest_of(texts: Sequence[str]) -> str:
    """Tells texts apart, in a record's settings."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
