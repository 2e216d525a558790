"""Hidden states of a whole sample set between two layers: on the device, in memory or in a file, and kept for a resume.

One flat buffer holds every batch. A layer reads a batch and writes it back in place, so the size is that of the sample
set and not of the model. To survive a kill there are two files in turn: a layer reads one and writes the other, so the
input of the newest layer is whole until its output is.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from ...errors import AusteerError
from ...utils.machine import free_memory

try:
    import fcntl
except ImportError:  # not on Windows; there nothing guards against two runs in one folder
    fcntl = None  # type: ignore[assignment]

_FORMAT, _VERSION = "austeer hidden states", 1
_HEADER, _FILES = "hidden-states.json", ("hidden-states-0.bin", "hidden-states-1.bin")


class ScratchError(AusteerError):
    """Hidden states that cannot be kept, or are not those of this run."""


class HiddenStates:
    """The hidden states of every batch, in the model's dtype.

    Args:
        shapes: [rows, length] of each batch, at least one. width, dtype: of the residual stream.
        device: where they are computed. If that is no CPU and ``room`` is enough, they stay there.
        room: bytes free for them on the device.
        memory: bytes of the CPU's memory that they may take; a file if they need more. None: half of what is free.
        folder: for files; by default a temporary one. persistent: whether the files stay until :meth:`delete`.
        digest: of the sample set and the model, which must agree on a resume.
        resume: goes on from what an earlier run left in ``folder``.

    Attributes:
        size: bytes. place: where they are, for reports: "device", "memory" or "file".
        forms: how the layers so far returned their output; the caller's, kept for a resume.

    Raises:
        ScratchError: no space, a folder that is in use, or nothing of this run in it.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        width: int,
        dtype: torch.dtype,
        *,
        device: torch.device,
        room: int = 0,
        memory: int | None = None,
        folder: Path | None = None,
        persistent: bool = False,
        digest: str = "",
        resume: bool = False,
    ):
        self._shapes = [(rows, length, width) for rows, length in shapes]
        self._starts = [0, *accumulate(map(prod, self._shapes))]
        self._dtype, self._digest, self._persistent = dtype, digest, persistent
        self._copy = self._starts[-1] * dtype.itemsize
        self.size = self._copy * (2 if persistent else 1)
        self.forms: list[int] = []
        self._holds: list[int | None] = [None, None]  # after which layer each copy is; -1: after the embedding
        self._from = self._to = 0
        self._maps: list[mmap.mmap] = []
        self._folder = folder
        self._lock: int | None = None
        self._copies: list[Tensor] = []
        try:
            self.place = self._make(device, room, memory, resume)
        except BaseException:
            self.close()
            raise

    def _make(self, device: torch.device, room: int, memory: int | None, resume: bool) -> str:
        count = self._starts[-1]
        if self._persistent:
            assert self._folder is not None
            self._take(self._folder)
            if resume:
                self._know_again(self._folder)
            else:
                (self._folder / _HEADER).unlink(missing_ok=True)  # before its files are written over
            try:
                for name in _FILES:
                    self._open(self._folder, name, resume)
            except ScratchError:
                if not resume:
                    self.delete()
                raise
            return "file"
        if device.type != "cpu" and self.size <= room:
            self._copies = [torch.empty(count, dtype=self._dtype, device=device)]
            return "device"
        if self.size <= (free_memory(torch.device("cpu")) // 2 if memory is None else memory):
            self._copies = [torch.empty(count, dtype=self._dtype, device="cpu")]
            return "memory"
        folder = self._folder or Path(tempfile.gettempdir())
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:  # the mapping lives on, and a kill leaves nothing behind
                self._map(file, folder)
        except OSError as error:
            raise _unwritable(folder, error) from error
        return "file"

    def _take(self, folder: Path) -> None:
        """Makes the folder this process's, until it ends."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder, os.O_RDONLY)
            if fcntl is not None:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ScratchError(
                f"{folder}: another run keeps its hidden states here; give each run and process a folder of its own"
            ) from error
        except OSError as error:
            raise _unwritable(folder, error) from error

    def _open(self, folder: Path, name: str, resume: bool) -> None:
        try:
            with (folder / name).open("r+b" if resume else "w+b") as file:
                self._map(file, folder)
        except OSError as error:
            raise _unwritable(folder, error) from error

    def _map(self, file: IO[bytes], folder: Path) -> None:
        """Maps a file whose space is reserved: a disk that fills up later would end the process without a word."""
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, self._copy)
            else:
                file.truncate(self._copy)
            self._maps.append(mmap.mmap(file.fileno(), self._copy))
        except OSError as error:
            file.truncate(0)  # what could be reserved
            free = shutil.disk_usage(folder).free
            raise ScratchError(
                f"{folder}: the hidden states of the sample set need {_size(self.size)}, and {_size(free)} are "
                f"free ({error.strerror}); give a folder on a larger disk, or run fewer pairs at a time and merge"
            ) from error
        self._copies.append(torch.frombuffer(self._maps[-1], dtype=self._dtype, count=self._starts[-1]))

    def _know_again(self, folder: Path) -> None:
        again = "; start anew without resume"
        try:
            header = json.loads((folder / _HEADER).read_text())
        except FileNotFoundError as error:
            raise ScratchError(f"{folder}: found no hidden states to go on from{again}") from error
        except (OSError, ValueError) as error:
            raise ScratchError(f"{folder / _HEADER}: damaged ({error}){again}") from error
        if not isinstance(header, dict) or (header.get("format"), header.get("version")) != (_FORMAT, _VERSION):
            raise ScratchError(f"{folder / _HEADER}: found another format or version, expected {_VERSION}{again}")
        if header.get("digest") != self._digest:
            raise ScratchError(f"{folder}: found hidden states of other pairs, batches or another model{again}")
        for name in _FILES:
            found = (folder / name).stat().st_size if (folder / name).is_file() else None
            if found != self._copy:
                raise ScratchError(f"{folder / name}: found {found} bytes, expected {self._copy}{again}")
        self._holds, self.forms = list(header["holds"]), list(header["forms"])

    def begin(self, layer: int) -> None:
        """Before a layer is run (-1: the embedding): its input is what the layer below left, its output is open.

        Raises:
            ScratchError: the output of the layer below is not here.
        """
        if not self._persistent:
            return
        if layer >= 0 and layer - 1 not in self._holds:
            held = ", ".join(str(n) for n in self._holds if n is not None) or "none"
            raise ScratchError(
                f"{self._folder}: found the hidden states after layer {held}, expected those after layer {layer - 1} "
                "(-1: the embedding); start anew without resume"
            )
        self._from = self._holds.index(layer - 1) if layer >= 0 else 1
        self._to = 1 - self._from
        self._holds[self._to] = None
        self._write_header()

    def complete(self, layer: int) -> None:
        """After a layer was run over every batch; a run that is killed from here on can go on behind it."""
        if not self._persistent:
            return
        self._maps[self._to].flush()
        self._holds[self._to] = layer
        self._write_header()

    def _write_header(self) -> None:
        assert self._folder is not None
        header = {"format": _FORMAT, "version": _VERSION, "digest": self._digest}
        text = json.dumps(header | {"holds": self._holds, "forms": self.forms})
        new = self._folder / f".{_HEADER}.new"
        try:
            with new.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            new.replace(self._folder / _HEADER)
        except OSError as error:
            raise _unwritable(self._folder, error) from error

    def read(self, batch: int, rows: slice, device: torch.device) -> Tensor:
        """A copy of the hidden states of a batch's rows, [rows, length, width]."""
        return self._view(self._from, batch)[rows].to(device, copy=True)

    def write(self, batch: int, hidden: Tensor, rows: slice = slice(None)) -> None:
        """Raises ScratchError where ``hidden`` is not what the buffer was made for."""
        there = self._view(self._to, batch)[rows]
        if hidden.shape != there.shape or hidden.dtype != there.dtype:
            raise ScratchError(
                f"found hidden states {list(hidden.shape)} in {hidden.dtype}, expected {list(there.shape)} in "
                f"{there.dtype}; measure with strategy='resident'"
            )
        there.copy_(hidden)

    def _view(self, copy: int, batch: int) -> Tensor:
        return self._copies[copy][self._starts[batch] : self._starts[batch + 1]].view(self._shapes[batch])

    def close(self) -> None:
        """Gives the memory back; files that are to stay do."""
        self._copies.clear()
        self._maps.clear()  # not closed: that fails as long as anyone holds a view
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def delete(self) -> None:
        """After the last layer: files that were to stay are not needed any more."""
        self.close()
        if self._persistent and self._folder is not None:
            remove(self._folder)


def remove(folder: Path) -> None:
    """Removes the hidden states in a folder, and the folder if nothing else is in it."""
    if not folder.is_dir():
        return
    for name in (_HEADER, *_FILES, f".{_HEADER}.new"):
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # not empty: the rest is not ours
        folder.rmdir()


def _unwritable(folder: Path, error: OSError) -> ScratchError:
    return ScratchError(f"{folder}: cannot be written ({error.strerror or error}); give another scratch folder")


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
