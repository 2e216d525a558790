"""Which steering stands in which row of the tables, and how many requests run with it."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .tables import Row

#: Files of rows that have gone, at most: a worker that is a step behind may still have to read one.
KEPT = 1024


@dataclass
class _Held:
    row: int
    users: int = 0


class Rows:
    """Rows by the digest of what stands in them. One with users is never given to another.

    Args:
        count: of rows. folder: where their content is kept for the workers, a file each.
    """

    def __init__(self, count: int, folder: Path):
        self._folder = folder
        self._free = list(range(count))[::-1]
        self._rows: OrderedDict[str, _Held] = OrderedDict()  # those without users in the order in which they were left
        self._old: deque[str] = deque()

    def file(self, digest: str) -> Path:
        """Where the content of a row is."""
        return self._folder / f"{digest}.safetensors"

    def take(self, digest: str, make: Callable[[], Row]) -> int | None:
        """A row with this content, one user more; None if all rows have others.

        Args:
            make: makes the content, where it stands in no row.
        """
        held = self._rows.get(digest)
        if held is None:
            row = self._a_free_row()
            if row is None:
                return None
            try:
                make().save(self.file(digest))
            except BaseException:
                self._free.append(row)
                raise
            held = self._rows[digest] = _Held(row)
        held.users += 1
        return held.row

    def give_back(self, digest: str) -> None:
        """One user less; the content stays until the row is needed for another."""
        held = self._rows[digest]
        held.users -= 1
        if not held.users:
            self._rows.move_to_end(digest)

    def _a_free_row(self) -> int | None:
        if self._free:
            return self._free.pop()
        unused = next((digest for digest, held in self._rows.items() if not held.users), None)
        if unused is None:
            return None
        self._old.append(unused)
        while len(self._old) > KEPT:
            if (oldest := self._old.popleft()) not in self._rows and oldest not in self._old:
                self.file(oldest).unlink(missing_ok=True)
        return self._rows.pop(unused).row
