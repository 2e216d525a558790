"""What the processes of one engine share on disk: the rows of its tables, and what it was started for.

Rows are in a folder of the scheduler's own. What the engine was started for is in one that the first process makes and
names to those that it starts, by the environment: the front end, which sees no configuration of the engine, reads there
which model it has. Where that is gone or of several engines, requests are checked by the scheduler alone.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path

from ..plans.serving import VARIABLE
from ..utils.files import write_text
from .tables import Structure

#: Names the folder.
FOLDER = "AUSTEER_SHARED"


def shared_folder() -> Path:
    """The folder of this process and of those that it starts, for AUSTEER_SETS as it is."""
    root = os.environ.get(FOLDER)
    if root is None or not Path(root).is_dir():
        root = os.environ[FOLDER] = str(own_folder())
    value = os.environ.get(VARIABLE, "")
    folder = Path(root) / hashlib.sha256(value.encode()).hexdigest()[:12]
    folder.mkdir(exist_ok=True)
    return folder


def own_folder() -> Path:
    """A new folder, which goes when this process ends."""
    folder = tempfile.mkdtemp(prefix="austeer-")
    atexit.register(_remove, folder, os.getpid())
    return Path(folder)


def _remove(root: str, owner: int) -> None:
    if os.getpid() == owner:  # a forked process has the hook as well
        shutil.rmtree(root, ignore_errors=True)


def write_structure(structure: Structure) -> None:
    """Says to the front end what the engine was started for."""
    path = shared_folder() / "structure.json"
    other = _read(path)
    several = other is not None and other.model != structure.model
    write_text(path, json.dumps(None if several else structure.to_json()))


def read_structure() -> Structure | None:
    """What the engine was started for; None where it is not known, as with an engine on another machine."""
    path = shared_folder() / "structure.json"
    try:
        state = path.stat()
    except OSError:
        return None
    return _read_once(path, state.st_ino, state.st_mtime_ns)


@lru_cache(maxsize=4)
def _read_once(path: Path, *state: int) -> Structure | None:
    return _read(path)


def _read(path: Path) -> Structure | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return None if content is None else Structure.from_json(content)
