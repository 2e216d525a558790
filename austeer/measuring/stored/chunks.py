"""Reads shards of activations in chunks of rows, ahead of what is done with them, into a few buffers that are reused.

Plain reads and not a memory map: the memory taken is that of the buffers alone, a buffer can be page-locked (a GPU
copies from it at full speed), and a disk's error is an error here and no crash. They are as fast.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from itertools import cycle
from math import prod

import torch
from torch import Tensor

from ...errors import FileFormatError
from ...utils.background import ahead
from .shards import Shard

#: Buffers in turn: one is counted, one waits, one is being filled.
BUFFERS = 3


@dataclass(frozen=True)
class Chunk:
    """Rows ``start`` to ``stop - 1`` of a shard, all sites; valid until the next chunk is asked for.

    Attributes:
        shard: its place in the list of shards.
        data: bytes of all sites, one after the other.
        shapes: site -> [2 * (stop - start), layers, width], positive rows first, in the order of ``data``.
        copied: on a GPU, recorded when ``data`` is there, and the buffer may be filled again.
    """

    shard: int
    start: int
    stop: int
    data: Tensor
    shapes: Mapping[str, tuple[int, int, int]]
    dtype: torch.dtype
    copied: torch.cuda.Event | None

    def values(self, data: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Each site's activations, as views of ``data`` or of a copy of it."""
        parts = data.view(self.dtype).split([prod(shape) for shape in self.shapes.values()])
        for (site, shape), part in zip(self.shapes.items(), parts):
            yield site, part.view(shape)


class Chunks:
    """All chunks of shards, in order.

    Args:
        shards: of the same sites, layers and dtype.
        rows: of a chunk. pinned: read into page-locked memory, for a GPU.

    Attributes:
        size: bytes of the largest chunk, and of each of the ``BUFFERS`` buffers.
        seconds: what has been spent in reads.
    """

    def __init__(self, shards: Sequence[Shard], rows: int, pinned: bool = False):
        self.shards, self.rows = shards, rows
        largest = min(rows, max((shard.rows for shard in shards), default=0))
        self.size = 2 * largest * sum(shards[0].row_bytes(site) for site in shards[0].shapes) if shards else 0
        self.seconds = 0.0
        self._buffers = [
            (
                torch.empty(self.size, dtype=torch.uint8, pin_memory=pinned, device="cpu"),
                torch.cuda.Event() if pinned else None,
            )
            for _ in range(BUFFERS)
        ]

    def read(self, shard: int = 0, row: int = 0) -> Generator[Chunk, None, None]:
        """The chunks from a row of a shard on, a multiple of ``rows``. A thread reads the next ones ahead.

        Raises (while reading):
            FileFormatError: a shard is gone, cut off, or cannot be read; it is named.
        """
        yield from ahead(self._chunks(shard, row), BUFFERS - 2)

    def _chunks(self, first: int, row: int) -> Iterator[Chunk]:
        buffers = cycle(self._buffers)
        for number in range(first, len(self.shards)):
            shard = self.shards[number]
            try:
                with shard.path.open("rb") as file:
                    for start in range(row if number == first else 0, shard.rows, self.rows):
                        buffer, copied = next(buffers)
                        if copied is not None:
                            copied.synchronize()
                        stop = min(start + self.rows, shard.rows)
                        data = self._fill(file, shard, start, stop, buffer)
                        shapes = {site: (2 * (stop - start), *shape) for site, shape in shard.shapes.items()}
                        yield Chunk(number, start, stop, data, shapes, shard.dtype, copied)
            except OSError as error:
                raise FileFormatError(
                    f"{shard.path}: cannot be read ({error.strerror or error}); copy the shard whole, make it anew, or "
                    "leave it out"
                ) from error

    def _fill(self, file: BufferedReader, shard: Shard, start: int, stop: int, buffer: Tensor) -> Tensor:
        """Some rows of all sites and sides, read into ``buffer``; the part of it that they fill."""
        begin, place = time.perf_counter(), 0
        for site in shard.shapes:
            size = (stop - start) * shard.row_bytes(site)
            for side in ("positive", "negative"):
                file.seek(shard.starts[f"{site}.{side}"] + start * shard.row_bytes(site))
                if file.readinto(buffer[place : place + size].numpy().data) < size:
                    raise FileFormatError(
                        f"{shard.path}: cut off while it was read, in rows {start} to {stop - 1}; copy the shard "
                        "whole, make it anew, or leave it out"
                    )
                place += size
        self.seconds += time.perf_counter() - begin
        return buffer[:place]


class Upload:
    """Copies chunks of at most ``size`` bytes to a GPU, beside the work on the one before."""

    def __init__(self, device: torch.device, size: int):
        self._device, self._stream = device, torch.cuda.Stream(device)
        buffers = [(torch.empty(size, dtype=torch.uint8, device=device), torch.cuda.Event()) for _ in range(2)]
        self._buffers = cycle(buffers)
        self._worked: torch.cuda.Event | None = None

    def __call__(self, chunk: Chunk) -> Tensor:
        """``chunk.data`` on the device, for work on the current stream; valid until the next call but one."""
        work = torch.cuda.current_stream(self._device)
        if self._worked is not None:
            self._worked.record(work)  # after all that was done with the chunk before
        buffer, self._worked = next(self._buffers)
        self._stream.wait_event(self._worked)
        data = buffer[: len(chunk.data)]
        with torch.cuda.stream(self._stream):
            data.copy_(chunk.data, non_blocking=True)
            assert chunk.copied is not None
            chunk.copied.record(self._stream)
        work.wait_event(chunk.copied)
        return data


def upload_to(device: torch.device, size: int) -> Callable[[Chunk], Tensor]:
    """What brings the data of chunks, of at most so many bytes, to the device; on the CPU they are there."""
    return Upload(device, size) if device.type == "cuda" else lambda chunk: chunk.data
