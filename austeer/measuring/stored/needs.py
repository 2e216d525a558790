"""What a count of stored activations takes, found out on its first chunk."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ...utils.machine import read_rate, wait_for
from ..counting import Counts
from .chunks import BUFFERS, Chunks, upload_to
from .folder import StoredActivations

#: Bytes of an AU's counters while counting, and in a file.
COUNTER_BYTES, SAVED_BYTES = 80, 64


@dataclass(frozen=True)
class CountNeeds:
    """Sizes are bytes.

    Attributes:
        shards, rows: how many. columns: AUs of all sites and layers. bytes: of activations, each read once.
        counters: on the device. chunks: in the CPU's memory. device_chunks: on a GPU. result: the momentum file.
        read_rate, count_rate: bytes a second from the shards (what lies in the page cache included), and counted.
        seconds: for all; reading and counting go on side by side.
    """

    shards: int
    rows: int
    columns: int
    bytes: int
    counters: int
    chunks: int
    device_chunks: int
    result: int
    read_rate: float
    count_rate: float
    seconds: float

    @classmethod
    def of(cls, stored: StoredActivations, chunks: Chunks, device: torch.device) -> CountNeeds:
        """Of some of the stored shards; reads and counts their first chunk."""
        columns, rows = stored.columns, sum(shard.rows for shard in chunks.shards)
        total = rows * 2 * columns * stored.shards[0].dtype.itemsize
        reads, counts = read_rate([shard.path for shard in chunks.shards]) or 0.0, count_rate(stored, chunks, device)
        return cls(
            shards=len(chunks.shards),
            rows=rows,
            columns=columns,
            bytes=total,
            counters=COUNTER_BYTES * columns,
            chunks=BUFFERS * chunks.size + chunks.size // 2,
            device_chunks=2 * chunks.size if device.type == "cuda" else 0,
            result=SAVED_BYTES * columns,
            read_rate=reads,
            count_rate=counts,
            seconds=total / max(min(reads, counts), 1.0),
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        gb = 1e9
        gpu = f", {self.device_chunks / gb:.3f} GB of chunks on the GPU" if self.device_chunks else ""
        return [
            f"{self.rows} rows x {self.columns} AUs in {self.shards} shards: {self.bytes / gb:.2f} GB, read once",
            f"memory: {self.counters / gb:.3f} GB of counters, {self.chunks / gb:.3f} GB of chunks{gpu}; "
            f"momentum file {self.result / gb:.3f} GB",
            f"storage gives {self.read_rate / gb:.2f} GB/s, counting takes {self.count_rate / gb:.2f} GB/s: about "
            f"{self.seconds:.0f} s",
        ]


def count_rate(stored: StoredActivations, chunks: Chunks, device: torch.device) -> float:
    """Bytes a second counted, of the first chunk; the better of two tries, the first of which compiles."""
    with closing(chunks.read()) as reading:
        chunk = next(reading, None)
        if chunk is None:
            return 0.0
        upload, half = upload_to(device, chunks.size), chunks.shards[chunk.shard].half(chunk.start, chunk.stop)
        counts, seconds = Counts(stored.shapes, device), []
        for _ in range(2):
            start = time.perf_counter()
            for site, values in chunk.values(upload(chunk)):
                counts.counting[site].add(values, chunk.stop - chunk.start, 0, half=half)
            wait_for(device)
            seconds.append(time.perf_counter() - start)
    return len(chunk.data) / max(min(seconds), 1e-9)
