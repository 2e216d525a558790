"""Safetensors files with a JSON header: the one format of everything that austeer writes. Never pickle."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import FileFormatError


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
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata=metadata)
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


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
    except (SafetensorError, OSError):
        return None


def read(path: Path, kind: str, version: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and tensors of a file written by :func:`write`.

    Raises:
        FileFormatError: no such file, not safetensors, truncated or altered, another kind of file, or another version.
    """
    if not path.is_file():
        raise FileFormatError(f"{path}: no such file; expected {_article(kind)} file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            found = metadata.get("format")
            if found != kind:
                raise FileFormatError(f"{path}: found a file of format {found!r}, expected {kind!r}")
            if metadata.get("version") != str(version):
                raise FileFormatError(
                    f"{path}: found version {metadata.get('version')!r}, expected {version}; use the austeer "
                    "that wrote it, or make the file anew"
                )
            text = metadata["header"]
            header = json.loads(text)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError, KeyError, OSError) as error:
        raise FileFormatError(
            f"{path}: damaged or not {_article(kind)} file ({error}); make it anew, or copy it whole"
        ) from error
    if metadata.get("checksum") != _checksum(text, tensors):
        raise FileFormatError(f"{path}: its content does not match its checksum; make it anew, or copy it whole")
    if not isinstance(header, dict):
        raise FileFormatError(f"{path}: found a header that is no object; make the file anew")
    return header, tensors


def _article(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"
