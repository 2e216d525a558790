"""Folders and files that are there whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..plans.plan import Plan
from .edits import ExportError

try:
    import fcntl
except ImportError:  # not on Windows; there the leftovers of a killed run stay
    fcntl = None  # type: ignore[assignment]

#: What was exported, beside a model's or an adapter's own files.
RECORD = "austeer.json"
#: What a model writes with the exported plan, for ``austeer verify``.
REPLAY = "austeer_replay.json"


def check_output(out: str | Path, force: bool, needed: int, read: Iterable[Path] = (), *, file: bool = False) -> Path:
    """The folder (or file) to write as a path, if it can be written; nothing is written yet.

    Args:
        force: whether what is there may be replaced.
        needed: bytes.
        read, file: as in :func:`check_replaced`, which is called last.

    Raises:
        ExportError: it exists, its place is not writable, there is too little space, or what is there is none that
            ``force`` may replace.
    """
    out = Path(out)
    if os.path.lexists(out):
        if not force:
            raise ExportError(f"{out}: exists already; give another place, or force=True (--force) to replace it")
        if out.resolve() in (Path.cwd(), *Path.cwd().parents):
            raise ExportError(f"{out}: is the working directory or above it; give another place")
    above = nearest_folder(out)
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ExportError(f"{out}: cannot be written, {above} is no folder or not writable; give another place")
    free = shutil.disk_usage(above).free
    if needed > free:
        raise ExportError(
            f"{out}: needs {gigabytes(needed)} and {above} has {gigabytes(free)} left; give another place"
        )
    check_replaced(out, read, file=file)
    return out


def check_replaced(out: Path, read: Iterable[Path] = (), *, file: bool = False) -> None:
    """Makes sure that what ``force`` would take away is an earlier export, and nothing dearer.

    Args:
        out: as :func:`check_output` gives it; it may not exist.
        read: files and folders that the export is made from.
        file: whether a file is written, and not a folder.

    Raises:
        ExportError: it holds something of ``read``, or a model or folders that were not exported; or is a folder
            where a file is written, or the other way round.
    """
    place = out.resolve()
    if any(path.resolve().is_relative_to(place) for path in read):
        raise ExportError(f"{out}: holds the model that is read; give another place")
    if not os.path.lexists(out) or out.is_symlink():
        return
    try:
        found = _found_file(out) if file else _found_folder(out)
    except OSError as error:
        found = f"something that cannot be read ({error.strerror})"
    if found is not None:
        raise ExportError(
            f"{out}: found {found}, expected an earlier export to replace; remove it yourself, or give another place"
        )


def _found_file(out: Path) -> str | None:
    """What is there instead of a file that was exported."""
    if not out.is_file():
        return "a folder"
    with out.open("rb") as opened:
        return None if b"austeer.version" in opened.read(4096) else "a file that austeer did not write"


def _found_folder(out: Path) -> str | None:
    """What is there instead of a folder that was exported."""
    if not out.is_dir():
        return "a file"
    if (out / RECORD).is_file():
        return None
    dear = sorted(entry.name for entry in out.iterdir() if entry.is_dir() or entry.name == "config.json")
    return f"{dear[0]!r} in it and no {RECORD}" if dear else None


def nearest_folder(out: Path) -> Path:
    """The first of the folders above ``out`` that exists, as far as that can be seen (it may be a file)."""
    out = out.absolute()
    return next((parent for parent in out.parents if os.access(parent, os.F_OK)), Path(out.anchor))


def gigabytes(size: int) -> str:
    """Bytes for people."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


@contextmanager
def staged(out: Path, *, file: bool = False) -> Iterator[Path]:
    """A hidden folder beside ``out`` that takes its name when the context ends well, and is gone otherwise.

    What runs that were killed left for the same ``out`` is removed first.

    Args:
        file: whether ``out`` is a file; the path is then that of a file in the hidden folder, to be written.

    Raises:
        ExportError: the disk is full or the place is not writable.
    """
    staging: Path | None = None
    lock: int | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _sweep(out)
        staging = Path(tempfile.mkdtemp(dir=out.parent, prefix=_prefix(out)))
        lock = _lock(staging)
        made = staging / out.name if file else staging
        yield made
        if not file:
            staging.chmod(0o755)  # mkdtemp's folder is its owner's only
        _replace(made, out)
    except (OSError, SafetensorError) as error:  # safetensors has its own for a full disk
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space" in str(error)
        reason = "no space left on the device" if full else getattr(error, "strerror", None) or error
        raise ExportError(f"{out}: cannot be written ({reason}); give another place") from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _prefix(out: Path) -> str:
    return f".{out.name}.austeer-"


def _sweep(out: Path) -> None:
    """Removes hidden folders of runs that were killed: those that no process holds any more."""
    for folder in out.parent.iterdir():
        if not folder.name.startswith(_prefix(out)) or folder.is_symlink() or not folder.is_dir():
            continue
        if (folder / _OLD).exists() and not out.exists():
            continue  # killed while it was replaced: this is all that is left of it
        lock = _lock(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """Holds a folder until the number is closed or the process ends; None if another process holds it."""
    if fcntl is None:
        return None
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # another run swept it
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


_OLD = "replaced"


def _replace(staging: Path, out: Path) -> None:
    """Puts what is finished in its place; what was there goes last."""
    if not os.path.lexists(out):
        staging.rename(out)
        return
    holder = Path(tempfile.mkdtemp(dir=out.parent, prefix=_prefix(out)))
    lock = _lock(holder)
    old = holder / _OLD
    try:
        out.rename(old)
        try:
            staging.rename(out)
        except OSError:
            old.rename(out)
            raise
    finally:
        if os.path.lexists(out):
            shutil.rmtree(holder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{path}: could not be read ({error}); copy or download it anew") from error


def replay_json(pairs: Sequence[tuple[Plan, float]]) -> str | None:
    """The replay of the one plan that is exported, as JSON; None where it has none of this strength and all tokens."""
    replay = pairs[0][0].replay if len(pairs) == 1 else None
    if replay is None or (replay.alpha, replay.scope) != (pairs[0][1], "all") or replay.digest != pairs[0][0].digest:
        return None
    return json.dumps(replay.to_json(), separators=(",", ":"))


def write_replay(folder: Path, pairs: Sequence[tuple[Plan, float]]) -> None:
    """Puts it into an exported folder, if there is one."""
    text = replay_json(pairs)
    if text is not None:
        (folder / REPLAY).write_text(text + "\n", encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
