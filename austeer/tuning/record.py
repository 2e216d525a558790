"""What a search has measured so far, line by line in a file, so that an interrupted one goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import FileFormatError
from ..utils import journal
from ..utils.differences import first_difference

FORMAT, VERSION = "austeer-search", 2


class Record:
    """A JSONL file: a header with what the search is of, then one line for each thing measured.

    A line is written whole and at once; one that was cut off by an interruption is dropped when the file is read.

    Args:
        path: the file, or None to remember in memory only.
        settings: what a search must have in common with the one that it goes on from (JSON).

    Raises:
        FileFormatError: the file is none of these, of another version or search, or cannot be written.
    """

    def __init__(self, path: str | Path | None, settings: Mapping[str, Any]):
        self._path = None if path is None else Path(path)
        self._known: dict[str, Any] = {}
        header = {"format": FORMAT, "version": VERSION, "settings": json.loads(json.dumps(settings))}
        if self._path is None:
            return
        try:
            if self._path.exists() and not _is_only_begun(self._path):
                self._read(self._path, header)
            else:
                self._path.unlink(missing_ok=True)
                self._path.parent.mkdir(parents=True, exist_ok=True)
                journal.append(self._path, header)
        except OSError as error:
            raise FileFormatError(f"{self._path}: cannot be used ({error.strerror}); give another place") from error

    def _read(self, path: Path, header: dict[str, Any]) -> None:
        try:
            (first, *rest), length = journal.read(path)
            found = {name: first.get(name) for name in ("format", "version")}
        except (ValueError, AttributeError) as error:
            raise FileFormatError(f"{path}: not the record of a search ({error}); remove it, or --force") from error
        if found != {"format": FORMAT, "version": VERSION}:
            raise FileFormatError(f"{path}: found {found}, expected {FORMAT!r} version {VERSION}; start anew (--force)")
        difference = first_difference(first.get("settings") or {}, header["settings"])
        if difference is not None:
            raise FileFormatError(
                f"{path}: is of another search: found {difference}. Give the same model, data and options, another "
                "--out, or --force to start anew"
            )
        try:
            for line in rest:
                self._take(line)
        except (KeyError, TypeError, AttributeError) as error:
            raise FileFormatError(f"{path}: inconsistent content ({error}); remove it, or --force") from error
        journal.cut(path, length)

    def get(self, key: str) -> Any:
        """What was written under ``key``; None if nothing was."""
        return self._known.get(key)

    def put(self, key: str, value: Any) -> None:
        """Writes a value."""
        self._write({"key": key, "value": value})

    def add(self, key: str, cells: Mapping[str, Any]) -> None:
        """Writes more cells of a value that is a dictionary."""
        self._write({"key": key, "cells": dict(cells)})

    def _take(self, line: dict[str, Any]) -> None:
        if "cells" in line:
            self._known.setdefault(line["key"], {}).update(line["cells"])
        else:
            self._known[line["key"]] = line["value"]

    def _write(self, line: dict[str, Any]) -> None:
        self._take(line)
        if self._path is not None:
            try:
                journal.append(self._path, line)
            except OSError as error:
                raise FileFormatError(f"{self._path}: cannot be written ({error.strerror})") from error


def _is_only_begun(path: Path) -> bool:
    """Whether a search stopped before it measured anything, for example at its options: no reason to refuse others."""
    beside = (entry for entry in path.parent.iterdir() if entry.name.startswith("momentum."))
    return journal.is_only_begun(path, FORMAT, VERSION) and not any(beside)
