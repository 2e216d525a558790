"""Pairs that were made, what was left out of them, and their file."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import PairsError
from ..pairs.pair import LEAD, Pair
from ..pairs.pairs import Pairs

#: Suffixes of files in which pairs are written, one object a line.
SUFFIXES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Made:
    """Pairs, and how they came about.

    Attributes:
        pairs: at least 2.
        dropped: why pairs were left out, and how many.
        notes: what a user should know of them, one line each.
    """

    pairs: Pairs
    dropped: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def check_out(path: str | Path) -> Path:
    """Raises PairsError if a file of this name could not be read as pairs afterwards."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise PairsError(f"{path}: found the suffix {path.suffix!r}, expected {' or '.join(SUFFIXES)} for pairs")
    return path


def write_pairs(path: str | Path, pairs: Iterable[Pair]) -> Path:
    """Writes pairs as JSONL; the file is there whole or not at all.

    Raises:
        PairsError: another suffix, or a place that cannot be written.
    """
    path = check_out(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                for pair in pairs:
                    # A lead is an exception: pairs without one have the fields that everybody's pairs have.
                    row = {name: value for name, value in vars(pair).items() if value or name != LEAD}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
            mask = os.umask(0)
            os.umask(mask)
            Path(temporary).chmod(0o666 & ~mask)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise PairsError(f"{path}: cannot be written ({error.strerror}); give another place") from error
    return path
