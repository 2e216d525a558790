"""Files of JSON lines that grow line by line: what an interrupted run has finished. A line counts once it is whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def line(entry: Any) -> bytes:
    """An entry as it stands in the file."""
    return json.dumps(entry).encode() + b"\n"


def append(path: Path, entry: Any) -> None:
    """Puts an entry behind the others: one write of a whole line, which is on the disk when this returns."""
    with path.open("ab") as file:
        file.write(line(entry))
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> tuple[list[Any], int]:
    """The entries of all whole lines, and the bytes that they take; nothing is changed.

    Raises:
        ValueError: a whole line that is not JSON in UTF-8.
    """
    raw = path.read_bytes()
    length = raw.rfind(b"\n") + 1
    return [json.loads(text) for text in raw[:length].decode().splitlines()], length


def cut(path: Path, length: int) -> None:
    """Drops what is behind ``length`` bytes: a line that was being written when the run stopped."""
    if path.stat().st_size > length:
        with path.open("r+b") as file:
            file.truncate(length)


def is_only_begun(path: Path, form: str, version: int) -> bool:
    """Whether a journal holds its header alone: a run stopped before it had anything, and is in nobody's way."""
    try:
        entries, _ = read(path)
        return len(entries) == 1 and (entries[0]["format"], entries[0]["version"]) == (form, version)
    except (ValueError, KeyError, TypeError):
        return False
