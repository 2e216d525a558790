"""What an unfinished run has written: whole batches, one a line, behind the settings that made them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import FileFormatError, PairsError
from ..utils import journal
from ..utils.differences import first_difference

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
        head = {"format": FORMAT, "version": VERSION, "settings": self.settings}
        begun = self.path.exists() and (
            journal.is_only_begun(self.path, FORMAT, VERSION)
            or (resume and journal.line(head).startswith(self.path.read_bytes()))
        )
        if begun or not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.unlink(missing_ok=True)
            journal.append(self.path, head)
            return []
        if not resume:
            raise PairsError(
                f"{self.path}: found what an earlier run wrote; go on from it with resume (--resume), or remove it "
                "(--force) to start anew"
            )
        try:
            (first, *batches), length = journal.read(self.path)
            found = first["settings"] if first["format"] == FORMAT and first["version"] == VERSION else None
            right = [batch["batch"] for batch in batches] == list(range(len(batches)))
        except (ValueError, KeyError, TypeError):
            found, right, length = None, False, 0
        if not isinstance(found, dict) or not right:
            raise FileFormatError(f"{self.path}: damaged, or no unfinished run; remove it (--force) to start anew")
        difference = first_difference(found, self.settings)
        if difference is not None:
            raise FileFormatError(
                f"{self.path}: is of another run: found {difference}. Give the same settings, another file, or start "
                "anew (--force)"
            )
        journal.cut(self.path, length)
        return batches

    def add(self, batch: Mapping[str, Any]) -> None:
        """Puts a batch behind the others."""
        journal.append(self.path, batch)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
