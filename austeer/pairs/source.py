"""What rows are read from: a source, and one pass over it."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Generator, Iterator, Mapping
from types import ModuleType
from typing import Any

from ..errors import PairsError

Row = tuple[str, Mapping[str, Any]]


class Reading(Iterator[Row]):
    """One pass over the rows of a source. Each row comes with its place, for messages.

    A place is the source and the line (from 1; in CSV the row's last), the entry of a JSON list (from 1), or the row
    of Parquet and of datasets (from 0, as in ``dataset[0]``).

    Attributes:
        fraction: how much has been read, from 0 to 1: of a file's bytes as they are stored, of the entries of a JSON
            list, of the rows of Parquet and datasets; None if it cannot be known before the end.
    """

    def __init__(self, source: Source, columns: Collection[str], optional: Collection[str] = ()):
        self.columns, self.optional = columns, optional
        self.fraction: float | None = 0.0
        self._rows = source._rows(self)

    def __next__(self) -> Row:
        try:
            return next(self._rows)
        except StopIteration:
            self.fraction = 1.0
            raise

    def close(self) -> None:
        self._rows.close()

    def present(self, names: Collection[str]) -> list[str] | None:
        """Which of a source's columns are read: None for all, if it lacks one of those that are needed."""
        if not set(self.columns) <= set(names):
            return None
        return [*self.columns, *(name for name in self.optional if name in names and name not in self.columns)]


class Source(ABC):
    """What rows are read from, as often as wanted.

    Attributes:
        name: for messages and provenance.
        size: bytes as stored: the weight of a source among several.
    """

    name: str
    size: int

    def read(self, columns: Collection[str], optional: Collection[str] = ()) -> Reading:
        """A new pass over the rows, from the first.

        What stores columns apart reads only ``columns``, if it has all, and those of ``optional`` that it has.

        Raises (while reading):
            PairsError: the source is gone, damaged, cut off, or not what its name says.
        """
        return Reading(self, columns, optional)

    @abstractmethod
    def _rows(self, reading: Reading) -> Generator[Row, None, None]: ...


def object_of(row: Any, where: str) -> Mapping[str, Any]:
    """``row`` if it is an object; otherwise raises PairsError."""
    if not isinstance(row, Mapping):
        raise PairsError(f"{where}: found {type(row).__name__}, expected an object with the pair's fields")
    return row


def require(package: str, source: str) -> ModuleType:
    """An optional package, imported; PairsError tells how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise PairsError(
            f"{source}: the package {package.split('.')[0]} that reads it is not installed ({error}); "
            "pip install 'austeer[data]'"
        ) from error
