"""Safetensors files with a JSON header: the one format of everything that austeer writes. Never pickle."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import FileFormatError


def write(path: Path, kind: str, version: int, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Writes atomically: the file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"format": kind, "version": str(version), "header": json.dumps(header, allow_nan=False)}
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, metadata=metadata)
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read(path: Path, kind: str, version: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and tensors of a file written by :func:`write`.

    Raises:
        FileFormatError: no such file, not safetensors, truncated, another kind of file, or a newer version.
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
            header = json.loads(metadata["header"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError, KeyError, OSError) as error:
        raise FileFormatError(
            f"{path}: damaged or not {_article(kind)} file ({error}); make it anew, or copy it whole"
        ) from error
    if not isinstance(header, dict):
        raise FileFormatError(f"{path}: found a header that is no object; make the file anew")
    return header, tensors


def _article(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"
