"""A safetensors file written anew, one tensor in memory at a time.

The library writes a file from all of its tensors at once; a shard of a large model has gigabytes. The format is a
length, a JSON header and the tensors' bytes, and bytes of tensors that stay need not be understood.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from .edits import ExportError

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
DTYPES = {name: dtype for dtype, name in _NAMES.items()}

_PART = 16 << 20  # bytes copied at a time


@dataclass(frozen=True)
class TensorEntry:
    """A tensor to be written.

    Attributes:
        shape, dtype: of what ``make`` gives, which is called when its turn comes.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True)
class SafetensorsHeader:
    """Of a safetensors file.

    Attributes:
        entries: a tensor's name -> its dtype, shape and data_offsets.
        metadata: strings. start: the first byte of the data.
    """

    entries: dict[str, dict[str, Any]]
    metadata: dict[str, str]
    start: int


def read_header(file: Path) -> SafetensorsHeader:
    """Raises ExportError where the file is no safetensors file, or is cut off."""
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            content = json.loads(opened.read(length))
        metadata = content.pop("__metadata__", {})
        ends = max((entry["data_offsets"][1] for entry in content.values()), default=0)
        if file.stat().st_size != 8 + length + ends:
            raise ValueError(f"{file.stat().st_size} bytes, its header names {8 + length + ends}")
        return SafetensorsHeader(content, metadata, 8 + length)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError, struct.error) as e:
        raise ExportError(f"{file}: could not be read as safetensors ({e}); copy or download it anew") from e


def rewrite(source: Path | None, target: Path, entries: Mapping[str, TensorEntry], metadata: Mapping[str, str]) -> None:
    """Writes ``target``: the tensors of ``source`` with those of ``entries`` in their place, or behind them if new.

    Args:
        source: None for a file that has the new tensors alone.
        metadata: added to the source's own.
    """
    old = SafetensorsHeader({}, {}, 0) if source is None else read_header(source)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **old.metadata, **metadata}}
    end = 0
    for key in dict.fromkeys([*old.entries, *entries]):
        if key in entries:
            new, size = entries[key], entries[key].bytes
            header[key] = {"dtype": _NAMES[new.dtype], "shape": list(new.shape)}
        else:
            header[key] = dict(old.entries[key])
            first, last = header[key]["data_offsets"]
            size = last - first
        header[key]["data_offsets"] = [end, end + size]
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    with target.open("wb") as to:
        to.write(struct.pack("<Q", len(text)) + text)
        if source is not None:
            with source.open("rb") as opened:
                for key, entry in old.entries.items():
                    if key in entries:
                        _write(to, key, entries[key])
                    else:
                        _copy(opened, to, old.start, *entry["data_offsets"])
        for key, new in entries.items():
            if key not in old.entries:
                _write(to, key, new)
    with safe_open(target, framework="pt") as written:  # the library's own checks
        assert set(written.keys()) == header.keys() - {"__metadata__"}


def _write(to: BinaryIO, key: str, entry: TensorEntry) -> None:
    tensor = entry.make()
    assert tuple(tensor.shape) == entry.shape and tensor.dtype == entry.dtype, key
    to.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _copy(source: BinaryIO, to: BinaryIO, start: int, first: int, last: int) -> None:
    source.seek(start + first)
    left = last - first
    while left:
        part = source.read(min(left, _PART))
        if not part:
            raise OSError(f"{source.name} became shorter while it was read")
        to.write(part)
        left -= len(part)


def link_or_copy(source: Path, target: Path, link: bool) -> None:
    """Puts a file at ``target``, without taking space if it can."""
    source = source.resolve()  # the Hub's cache keeps links to its files
    if link:
        try:
            target.hardlink_to(source)
            return
        except OSError:  # another disk, someone else's file, or a file system without links
            pass
    shutil.copyfile(source, target)
