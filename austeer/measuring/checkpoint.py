"""Checkpoints of a measurement: counters on disk every so many blocks, to go on from after any interruption."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..counters import counters_from, tensors_of
from ..errors import FileFormatError
from ..utils import files
from ..utils.differences import first_difference
from .counting import State
from .layerwise import hidden_states as hidden

FORMAT, VERSION = "austeer-checkpoint", 3

#: What a checkpoint does not say that was written before there was a choice.
UNSAID = {"effects": False}


class Checkpoint:
    """One file, written whole or not at all.

    Args:
        path: the file; each of several processes has its own, with its number behind the name.
        settings: what a run must have in common with the one that it goes on from (JSON).
        part: this process' number, and how many there are.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any], part: tuple[int, int] = (0, 1)):
        check_path(path)
        self.base, self.path = Path(path), Path(path)
        if part[1] > 1:
            self.path = self.path.with_name(f"{self.path.name}.{part[0]}-of-{part[1]}")
        self.settings = json.loads(json.dumps({**settings, "processes": part[1], "process": part[0]}))

    def save(self, state: State) -> None:
        """Raises FileFormatError where the file cannot be written; what it held before is still there."""
        header = {name: value for name, value in vars(state).items() if name not in ("sites", "half")}
        header |= {"settings": self.settings, "sites": list(state.sites)}
        files.write(self.path, FORMAT, VERSION, header, tensors_of(state.sites, state.half))

    def earlier(self, resume: bool) -> State | None:
        """What an earlier run has kept, None if nothing; raises FileFormatError as ``load``, or without ``resume``."""
        if not self.path.exists():
            return None
        if not resume:
            raise FileFormatError(
                f"{self.path}: found the checkpoint of an earlier run; go on from it with resume (--resume), or remove "
                "it (--force) to start anew"
            )
        return self.load()

    def load(self) -> State:
        """Raises FileFormatError if the file is missing, damaged, or of a run with other settings (one is named)."""
        header, tensors = files.read(self.path, FORMAT, VERSION)
        settings = header.get("settings")
        if not isinstance(settings, dict):
            raise FileFormatError(f"{self.path}: found no settings; start anew, without resuming")
        difference = first_difference({**UNSAID, **settings}, self.settings)
        if difference is not None:
            raise FileFormatError(
                f"{self.path}: is of another run: found {difference}. Give the same model, pairs and options, or "
                "another file, or start anew (--force)"
            )
        try:
            sites, half = (counters_from(tensors, header["sites"], half=part) for part in (False, True))
            rest = {name: header[name] for name in State.__dataclass_fields__ if name not in ("sites", "half")}
            return State(sites=sites, half=half, **rest)
        except (KeyError, TypeError) as error:
            raise FileFormatError(f"{self.path}: inconsistent content ({error}); start anew") from error

    def others(self) -> list[Path]:
        """Checkpoints of the same name by another number of processes."""
        mine = self.path.name.removeprefix(self.base.name).rpartition("-")[2]
        return [p for p in written(self.base) if p.name.removeprefix(self.base.name).rpartition("-")[2] != mine]


def check_path(path: str | Path) -> None:
    """Raises FileFormatError where a checkpoint cannot be a file."""
    if not Path(path).name or Path(path).is_dir():
        raise FileFormatError(f"checkpoint: found the folder {str(path)!r}, expected a file name")


def written(path: str | Path) -> list[Path]:
    """The checkpoints of a name that are there: one, or one of each process."""
    path = Path(path)
    form = re.compile(re.escape(path.name) + r"(\.\d+-of-\d+)?")
    if not path.parent.is_dir():
        return []
    found = [entry for entry in path.parent.iterdir() if form.fullmatch(entry.name) and entry.is_file()]
    return sorted(entry for entry in found if files.kind_of(entry) == FORMAT)


def remove(path: str | Path, scratch: str | Path | None = None) -> None:
    """Removes the checkpoints of a name, and their hidden states (in ``scratch``, or beside them); nothing else."""
    for file in written(path):
        hidden.remove(Path(scratch or file.parent, f"{file.name}.hidden"))
        file.unlink()
