"""What an unfinished run has written: whole batches, one a line, behind the settings that made them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import FileFormatError, PairsError

FORMAT, VERSION = "austeer-pairs-partial", 1


def partial_path(out: Path) -> Path:
    """Where the unfinished run of a result is."""
    return out.with_name(f"{out.name}.partial")


class Partial:
    """The file ``OUT.partial``. A line that was being written when the run stopped does not count.

    Args:
        out: the result's file.
        settings: what a run must have in common with the one that it goes on from (JSON).
    """

    def __init__(self, out: Path, settings: Mapping[str, Any]):
        self.path = partial_path(out)
        self.settings = json.loads(json.dumps(settings))

    def open(self, resume: bool) -> list[dict[str, Any]]:
        """The batches that are there, in order; a new file if there are none.

        Raises:
            PairsError: there are some, and ``resume`` was not asked for.
            FileFormatError: they are damaged, or of a run with other settings (one is named).
        """
        head = _line({"format": FORMAT, "version": VERSION, "settings": self.settings})
        if not self.path.exists() or (resume and head.startswith(self.path.read_bytes())):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.unlink(missing_ok=True)
            self._append(head)
            return []
        if not resume:
            raise PairsError(
                f"{self.path}: found what an earlier run wrote; go on from it with resume (--resume), or remove it "
                "(--force) to start anew"
            )
        raw = self.path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        try:
            first, *batches = map(json.loads, whole.decode().splitlines())
            found = first["settings"] if first["format"] == FORMAT and first["version"] == VERSION else None
            right = [batch["batch"] for batch in batches] == list(range(len(batches)))
        except (ValueError, KeyError, TypeError):
            found, right = None, False
        if not isinstance(found, dict) or not right:
            raise FileFormatError(f"{self.path}: damaged, or no unfinished run; remove it (--force) to start anew")
        for name, expected in self.settings.items():
            if found.get(name) != expected:
                raise FileFormatError(
                    f"{self.path}: is of another run: found {name} {str(found.get(name))[:60]!r}, expected "
                    f"{str(expected)[:60]!r}. Give the same settings, another file, or start anew (--force)"
                )
        if len(whole) < len(raw):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        return batches

    def add(self, batch: Mapping[str, Any]) -> None:
        """Puts a batch behind the others."""
        self._append(_line(batch))

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def _append(self, line: bytes) -> None:
        # One write of a whole line, which is on the disk before the next batch begins.
        with self.path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"
