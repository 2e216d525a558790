"""Lines of a text file, compressed or not, and how far it has been read; damage is named by its line."""

from __future__ import annotations

import importlib
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import PairsError
from .pair import has_lone_surrogate

COMPRESSIONS = (".gz", ".zst")
CHUNK = 4096  # bytes of the stored file that are read at once: the fraction read is true to about one of them
LONGEST_LINE = 64 * 2**20  # characters; a file without line ends would otherwise be read whole


class TextFile:
    """A UTF-8 file to be read once, as a context manager.

    Args:
        path: the file. compression: ".gz", ".zst" or "" for none.

    Raises (on entering):
        PairsError: the file cannot be opened.
    """

    def __init__(self, path: Path, compression: str):
        self.path, self._compression = path, compression

    def __enter__(self) -> TextFile:
        try:
            self._stored = _Stored(self.path)
        except OSError as error:
            raise PairsError(f"{self.path}: cannot be opened ({error.strerror}); check the file") from error
        self._reached: _Stored | _Decompressed = self._stored
        return self

    def __exit__(self, *error) -> None:
        self._stored.close()

    @property
    def fraction(self) -> float:
        """How much of the file's bytes, as they are stored, has been read: from 0 to 1."""
        return min(self._reached.position / self._stored.size, 1.0) if self._stored.size else 1.0

    def lines(self, newline: str | None = None, longest: int = LONGEST_LINE) -> Iterator[str]:
        """The lines, each with its end. ``newline`` is as for :func:`open`.

        Raises:
            PairsError: the file is cut off or damaged, has bytes that are not UTF-8, or a line of more than ``longest``
                characters.
        """
        number = 0
        try:
            # A byte that is not UTF-8 becomes a lone surrogate, and so tells its line.
            with io.TextIOWrapper(self._content(), "utf-8-sig", errors="surrogateescape", newline=newline) as text:
                while line := text.readline(longest + 1):
                    number += 1
                    if len(line) > longest:
                        raise PairsError(
                            f"{self.path}, line {number}: found more than {longest} characters; expected a row a line"
                        )
                    if has_lone_surrogate(line):
                        raise PairsError(
                            f"{self.path}, line {number}: found bytes that are not UTF-8; save the file as UTF-8"
                        )
                    yield line
        except (EOFError, OSError) as error:
            where = f"{self.path}, after line {number}" if number else str(self.path)
            raise PairsError(f"{where}: the file is cut off or damaged ({error}); copy or make it again") from error

    def text(self) -> str:
        """The whole text; errors as in :meth:`lines`."""
        return "".join(self.lines(longest=2**62))

    def _content(self) -> io.BufferedReader:
        """The file's bytes, decompressed."""
        if self._compression:
            if not self._stored.size:
                raise EOFError("it is empty")
            self._reached = _Decompressed(self._stored, self._compression)
        return io.BufferedReader(self._reached, CHUNK)


class _Stored(io.FileIO):
    """A file read in small chunks, with the place that is reached."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.size = path.stat().st_size
        self.position = 0

    def readinto(self, buffer) -> int:
        count = super().readinto(memoryview(buffer)[:CHUNK]) or 0
        self.position += count
        return count

    def read(self, size=-1):
        return io.RawIOBase.read(self, size)  # by way of readinto


class _Decompressed(io.RawIOBase):
    """The content of a file that holds one or more compressed streams, each of which must come to its end.

    The libraries' own readers do not do: zstandard's takes a file that is cut off for a whole one, and both decompress
    so far ahead that the place in a small file says nothing.
    """

    def __init__(self, stored: _Stored, compression: str):
        self._stored = stored
        self._begin: Callable[[], Any] = lambda: zlib.decompressobj(wbits=31)  # gzip's header and check sum
        self._error: type[Exception] = zlib.error
        if compression == ".zst":
            zstandard = importlib.import_module("zstandard")
            self._begin = lambda: zstandard.ZstdDecompressor().decompressobj()
            self._error = zstandard.ZstdError
        self._stream: Any = None  # where none has begun, None
        self._rest = b""  # stored bytes behind the end of the last stream
        self._content = memoryview(b"")
        self._given = 0  # bytes of it that have been read from here
        self._before = 0  # the place in the stored file behind which it begins

    @property
    def position(self) -> float:
        """The place in the stored file up to where its content has been read from here."""
        ahead = self._stored.position - self._before
        return self._before + ahead * self._given / len(self._content) if self._content else self._before

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        if self._given == len(self._content):
            self._before = self._stored.position
            self._content, self._given = memoryview(self._next()), 0
        count = min(len(buffer), len(self._content) - self._given)
        buffer[:count] = self._content[self._given : self._given + count]
        self._given += count
        return count

    def _next(self) -> bytes:
        """The next piece of content; empty at the end."""
        while stored := self._rest or self._stored.read(CHUNK):
            if self._stream is None:
                self._stream = self._begin()
            try:
                content = self._stream.decompress(stored)
            except self._error as error:
                raise OSError(str(error)) from error
            self._rest = self._stream.unused_data
            if self._stream.eof:
                self._stream = None
            if content:
                return content
        if self._stream is not None:
            raise EOFError("it ends in the middle of a compressed stream")
        return b""
