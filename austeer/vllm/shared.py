"""What the processes of one engine share on disk: the rows of its tables, and what it was started for.

A folder for temporary files, made by the first process and named to the others by the environment, from whom they are
started. The front end, which sees no configuration of the engine, reads there which model it has.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import tempfile
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
        root = tempfile.mkdtemp(prefix="austeer-")
        os.environ[FOLDER] = root
        atexit.register(_remove, root, os.getpid())
    value = os.environ.get(VARIABLE, "")
    folder = Path(root) / hashlib.sha256(value.encode()).hexdigest()[:12]
    folder.mkdir(exist_ok=True)
    return folder


def _remove(root: str, owner: int) -> None:
    if os.getpid() == owner:  # a forked process has the hook as well
        shutil.rmtree(root, ignore_errors=True)


def write_structure(structure: Structure) -> None:
    """Says to the front end what the engine was started for."""
    write_text(shared_folder() / "structure.json", json.dumps(structure.to_json()))


def read_structure() -> Structure | None:
    """What the engine was started for; None where it is not known, as with an engine on another machine."""
    path = shared_folder() / "structure.json"
    return Structure.from_json(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None
