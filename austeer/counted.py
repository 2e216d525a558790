"""How a count of stored activations went, and what one takes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class CountReport:
    """How a count went.

    Attributes:
        rows: pairs counted, ``resumed`` ones besides. bytes: of activations read.
        seconds_read: in reads, by a thread. seconds_wait: waited for them. seconds_count: counting.
        seconds_save: checkpoints. seconds: all together.
    """

    rows: int = 0
    resumed: int = 0
    bytes: int = 0
    seconds_read: float = 0.0
    seconds_wait: float = 0.0
    seconds_count: float = 0.0
    seconds_save: float = 0.0
    seconds: float = 0.0

    @property
    def bytes_per_second(self) -> float:
        return self.bytes / self.seconds if self.seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"bytes_per_second": self.bytes_per_second}

    def line(self) -> str:
        """For people: how much, how fast, and where the time went."""
        return (
            f"{self.rows} rows, {self.bytes / 1e9:.2f} GB in {self.seconds:.1f} s, {self.bytes_per_second / 1e9:.2f} "
            f"GB/s; waiting for storage {self.seconds_wait:.1f} s, counting {self.seconds_count:.1f} s, checkpoints "
            f"{self.seconds_save:.1f} s (reading, beside it, {self.seconds_read:.1f} s)"
        )


@dataclass(frozen=True)
class CountNeeds:
    """What a count takes, found out on the first chunk. Sizes are bytes.

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
