"""Safetensors files with a JSON header: the one format of everything that austeer writes. Never pickle."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import FileFormatError
from ..version import __version__
from .unique_keys import unique_keys

#: Makes a header of one version that of the next; raises ValueError where it is none of its version.
Migration = Callable[[dict[str, Any]], dict[str, Any]]

#: Bytes of a safetensors header: the format's own limit.
LARGEST_HEADER = 100_000_000


def write(path: Path, kind: str, version: int, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Writes atomically: the file is there whole or not at all. Raises FileFormatError where it cannot be written."""
    try:
        _write(path, kind, version, header, tensors)
    except (OSError, SafetensorError) as error:  # safetensors has its own for a full disk
        reason = getattr(error, "strerror", None) or error
        raise FileFormatError(f"{path}: cannot be written ({reason}); give another place") from error


def _write(path: Path, kind: str, version: int, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.contiguous().clone() for name, t in tensors.items()}  # safetensors refuses shared memory
    text = json.dumps(header, allow_nan=False)
    metadata = {"format": kind, "version": str(version), "header": text, "checksum": _checksum(text, tensors)}
    metadata["austeer"] = __version__  # for people, and for the error that asks for a newer one
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata=metadata)
        _sort_metadata(Path(temporary))
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a text atomically; an interrupted write leaves an earlier file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _sort_metadata(path: Path) -> None:
    """The same content is the same file: safetensors writes metadata in an order that changes from call to call."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(size)
        if len(text) == size:
            file.seek(8)
            file.write(text)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _checksum(header: str, tensors: dict[str, Tensor]) -> str:
    """Safetensors has none of its own, and a flipped bit in a strength would pass every other check."""
    digest = hashlib.sha256(header.encode())
    for name, t in sorted(tensors.items()):
        digest.update(f"{name} {t.dtype} {list(t.shape)}".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def kind_of(path: Path) -> str | None:
    """What kind of file this is; None if it is none of ours."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format")
    except (SafetensorError, OSError, RuntimeError):  # the last: too large to be mapped
        return None


def read(
    path: Path,
    kind: str,
    version: int,
    *,
    migrations: Mapping[int, Migration] | None = None,
    largest: int | None = None,
    largest_header: int = LARGEST_HEADER,
    check: Callable[[dict[str, tuple[str, tuple[int, ...]]]], None] = lambda tensors: None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and tensors of a file written by :func:`write`.

    Args:
        migrations: for each older version that is still read, what makes its header that of the next version.
        largest, largest_header: bytes of the file and of its header, looked at before anything is read.
        check: given each tensor's dtype (safetensors' name for it) and shape before any is read; raises what it likes.

    Raises:
        FileFormatError: no such file, not safetensors, too large, truncated or altered, another kind of file, or
            another version.
    """
    if not path.is_file():
        raise FileFormatError(f"{path}: no such file; expected {_article(kind)} file")
    try:
        _check_outside(path, largest, largest_header)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            found = metadata.get("format")
            if found != kind:
                raise FileFormatError(f"{path}: found a file of format {_short(found)}, expected {kind!r}")
            steps = _steps(path, metadata, version, migrations or {})
            text = metadata["header"]
            header = parse_json(text)
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            check({name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()})
            tensors = {name: file.get_tensor(name) for name in slices}
    except (SafetensorError, ValueError, KeyError, OSError, RuntimeError) as error:
        raise FileFormatError(
            f"{path}: damaged or not {_article(kind)} file ({error}); make it anew, or copy it whole"
        ) from error
    if metadata.get("checksum") != _checksum(text, tensors):
        raise FileFormatError(f"{path}: its content does not match its checksum; make it anew, or copy it whole")
    if not isinstance(header, dict):
        raise FileFormatError(f"{path}: found a header that is no object; make the file anew")
    try:
        for step in steps:
            header = step(header)
    except ValueError as error:
        raise FileFormatError(f"{path}: inconsistent content ({error}); make it anew") from error
    return header, tensors


def _check_outside(path: Path, largest: int | None, largest_header: int) -> None:
    """Sizes, and a header in which no name stands twice: readers could differ in which of the two they take."""
    size = path.stat().st_size
    if largest is not None and size > largest:
        raise ValueError(f"found {size} bytes, expected at most {largest}")
    with path.open("rb") as file:
        claimed = int.from_bytes(file.read(8), "little")
        if claimed > min(size - 8, largest_header):
            raise ValueError(f"its header claims {claimed} bytes, expected at most {min(size - 8, largest_header)}")
        parse_json(file.read(claimed).decode())


def parse_json(text: str) -> Any:
    """Strict JSON: no name twice in one object, no NaN or infinity, nothing nested beyond reason. Raises ValueError."""

    def refuse(constant: str) -> None:
        raise ValueError(f"found {constant}, which is not JSON")

    try:
        return json.loads(text, object_pairs_hook=unique_keys, parse_constant=refuse)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None


def _steps(path: Path, metadata: dict[str, str], version: int, migrations: Mapping[int, Migration]) -> list[Migration]:
    """What brings a file's header up to ``version``."""
    text = metadata.get("version", "")
    found = int(text) if re.fullmatch("[0-9]{1,9}", text) else None
    if found is not None and found <= version and all(old in migrations for old in range(found, version)):
        return [migrations[old] for old in range(found, version)]
    writer = metadata.get("austeer", "")
    which = f"austeer {writer}, " if re.fullmatch("[0-9A-Za-z.+!-]{1,40}", writer) else ""
    upgrade = f" ({which}pip install --upgrade austeer)" if found is not None and found > version else ""
    raise FileFormatError(
        f"{path}: found version {_short(metadata.get('version'))}, expected {version}; use the austeer "
        f"that wrote it{upgrade}, or make the file anew"
    )


def _short(text: str | None) -> str:
    """A file's own text as an error shows it."""
    return repr(text and text[:40])


def _article(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"
