"""Momentum from stored activations: shards that are far bigger than memory together, read once at storage speed."""

from __future__ import annotations

import hashlib
import time
import warnings
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import AusteerError, AusteerWarning, CaptureError, FileFormatError, check_count
from ...models.sites import Fingerprint
from ...momentum.momentum import Momentum
from ...pairs.chat import ChatForm
from ...utils.interrupt import Interruption, MeasurementInterrupted
from ...utils.progress import Progress
from ..checkpoint import Checkpoint
from ..counting import Counts, State
from .chunks import Chunk, Chunks, upload_to
from .folder import StoredActivations
from .needs import SAVED_BYTES, CountNeeds

#: By default a chunk has so many bytes, and at least so many rows: of fewer, going over the counters would cost as
#: much as counting.
CHUNK_BYTES, CHUNK_ROWS = 64 * 2**20, 32

#: Between two looks for NaN (each waits for the device) and two checkpoints: bytes read, and times a checkpoint's size.
_EVERY_BYTES, _EVERY_CHECKPOINTS = 2**30, 100


def momentum_from_activations(
    paths: str | Path | Iterable[str | Path],
    *,
    model: Fingerprint | None = None,
    layers: Sequence[int] | None = None,
    chat_template: ChatForm | None = None,
    device: str | torch.device | None = None,
    chunk_bytes: int | None = None,
    part: tuple[int, int] = (0, 1),
    checkpoint: str | Path | None = None,
    resume: bool = False,
    progress: bool | None = None,
) -> Momentum:
    """Counts activation momentum over stored last-token activations (format: :mod:`austeer.measuring.stored.shards`).

    Example:
        >>> measured = austeer.measure(model, tokenizer, pairs, save_activations="activations")
        >>> momentum = austeer.momentum_from_activations("activations")  # without the model, as often as wanted
        >>> momentum.pairs == measured.pairs
        True

    Args:
        paths: files and folders of shards.
        model: what the activations are of, where the shards do not say. Its ``widths`` may be empty.
        layers: which layers the shards hold; all of the model's by default.
        chat_template: whether the prompts went through a chat template, with its options if it had any.
        device: where to count; by default a GPU if there is one.
        chunk_bytes: how much is read at a time; by default 64 MiB or 32 rows, whichever is more.
        part: (i, n) counts the shards i, i + n, i + 2 n ..., to be merged (:meth:`austeer.Momentum.merge`).
        checkpoint: a file in which the counters are kept every GB or so, and when a shard cannot be read; remove it
            when the result is saved.
        resume: go on from the checkpoint, if it is there, to the identical result.
        progress: on standard error; by default a bar on a terminal, and elsewhere a line now and then.

    Raises:
        FileFormatError: no shard, one that is damaged or covers what another one covers, shards of different models,
            sites, layers or dtypes; or a checkpoint that is damaged, of another run, or there without ``resume``.
        PairsError: no row in any shard.
        CaptureError: an activation is NaN or infinite (site, layer and row are named).
        MeasurementInterrupted: Ctrl-C or SIGTERM, with a checkpoint.
    """
    stored = StoredActivations.open(paths, model=model, layers=layers, chat_template=chat_template)
    return ActivationCount(
        stored,
        device=device,
        chunk_bytes=chunk_bytes,
        part=part,
        checkpoint=checkpoint,
        resume=resume,
        progress=progress,
    ).run()


class ActivationCount:
    """One pass over stored activations; a thread reads the next chunk while one is counted.

    The memory taken is that of the counters (80 bytes an AU) and of three and a half chunks, whatever the shards' size.

    Args:
        stored: what to count.
        Others as of :func:`momentum_from_activations`.

    Attributes:
        report: how it went.

    Raises:
        FileFormatError: the checkpoint is damaged, of another run, or there without ``resume``.
    """

    def __init__(
        self,
        stored: StoredActivations,
        *,
        device: str | torch.device | None = None,
        chunk_bytes: int | None = None,
        part: tuple[int, int] = (0, 1),
        checkpoint: str | Path | None = None,
        resume: bool = False,
        progress: bool | None = None,
    ):
        self.stored, self.device, self.progress = stored, _device(device), progress
        pair = 2 * stored.columns * stored.shards[0].dtype.itemsize
        self.rows = max(CHUNK_ROWS, CHUNK_BYTES // pair)
        if chunk_bytes is not None:
            self.rows = max(1, check_count("chunk_bytes", chunk_bytes, 2**62, "bytes", AusteerError) // pair)
        self.shards = stored.part(*part).shards
        self.report = CountReport()
        self._offsets = [0, *accumulate(shard.rows for shard in self.shards)]
        self._counts = Counts(stored.shapes, self.device)
        self._done = (0, 0)  # the shard and row up to which everything is counted
        self._checkpoint: Checkpoint | None = None
        if checkpoint is not None:
            settings = {
                "model": stored.model.to_json(),
                "layers": stored.layers,
                "chat_template": stored.chat_template,
                "sites": stored.shapes,
                "dtype": str(stored.shards[0].dtype),
                "chunk_rows": self.rows,
            }
            self._checkpoint = Checkpoint(checkpoint, settings, part)
            self._resume(self._checkpoint, resume)
        elif resume:
            raise FileFormatError("resume: found no checkpoint to go on from; name its file with checkpoint=...")

    def _resume(self, checkpoint: Checkpoint, resume: bool) -> None:
        state = checkpoint.earlier(resume)
        if state is None:
            return
        done = (state.block, state.extra["row"])
        if done[0] > len(self.shards) or state.digest != self._digest(done):
            raise FileFormatError(
                f"{checkpoint.path}: found other shards than were counted before; give the same, unchanged (those that "
                "were not reached may differ), or start anew"
            )
        self._counts.restore(state)
        self._done, self.report.resumed = done, self._offsets[done[0]] + done[1]

    def _digest(self, done: tuple[int, int]) -> str:
        """A hash of the names, sizes and headers of all shards that are counted, in whole or in part."""
        digest = hashlib.sha256()
        for shard in self.shards[: done[0] + (done[1] > 0)]:
            digest.update(f"{shard.path.name} {shard.size} {shard.rows} {shard.header}\n".encode())
        return digest.hexdigest()

    def needs(self) -> CountNeeds:
        """What :meth:`run` will take; reads and counts the first chunk, and keeps nothing of it."""
        return CountNeeds.of(self.stored, self._chunks(), self.device)

    def run(self) -> Momentum:
        """Counts everything that is not counted yet; raises what :func:`momentum_from_activations` does meanwhile."""
        begin = time.perf_counter()
        try:
            self._count()
        except FileFormatError as error:
            if not self._save():
                raise
            raise FileFormatError(f"{error}. What was counted before is in {self._place()}: then resume") from error
        self._check()
        counters = self._counts.counters()
        self.report.seconds = time.perf_counter() - begin
        headers = [(shard, shard.header) for shard in self.shards]
        pairs = sum(header.pairs if header else shard.rows for shard, header in headers)
        return Momentum(
            pairs=pairs,
            model=self.stored.model,
            chat_template=self.stored.chat_template,
            cut=sum(header.cut for _, header in headers if header),
            identical=pairs - self._offsets[-1],
            sources=tuple(sorted({header.source if header else str(shard.path.parent) for shard, header in headers})),
            layers=self.stored.layers,
            **counters,
        )

    def _chunks(self) -> Chunks:
        return Chunks(self.shards, self.rows, pinned=self.device.type == "cuda")

    def _count(self) -> None:
        chunks, report = self._chunks(), self.report
        upload = upload_to(self.device, chunks.size)
        every, unsaved = max(_EVERY_BYTES, _EVERY_CHECKPOINTS * SAVED_BYTES * self.stored.columns), 0
        with (
            Progress("counting", self._offsets[-1], "pairs", self.progress) as bar,
            Interruption(self._checkpoint is not None) as interruption,
            closing(chunks.read(*self._done)) as reading,
        ):
            bar.advance(report.resumed)
            while True:
                start = time.perf_counter()
                chunk = next(reading, None)
                now = time.perf_counter()
                report.seconds_wait += now - start
                report.seconds_read = chunks.seconds
                if chunk is None:
                    return
                self._add(chunk, upload(chunk))
                unsaved += len(chunk.data)
                report.seconds_count += time.perf_counter() - now
                speed = report.bytes / (report.seconds_wait + report.seconds_count)
                bar.advance(chunk.stop - chunk.start, f"{speed / 1e9:.2f} GB/s")
                if unsaved >= every or interruption.asked:
                    self._save()
                    unsaved = 0
                if interruption.asked:
                    raise MeasurementInterrupted(
                        f"interrupted; {report.resumed + report.rows} of {self._offsets[-1]} pairs are counted, in "
                        f"{self._place()}: run the same with resume to go on"
                    )

    def _add(self, chunk: Chunk, data: Tensor) -> None:
        rows, shard = chunk.stop - chunk.start, self.shards[chunk.shard]
        half = shard.half(chunk.start, chunk.stop)
        for site, values in chunk.values(data):
            self._counts.counting[site].add(values, rows, self._offsets[chunk.shard] + chunk.start, half=half)
        self._counts.half_pairs += len(half)
        self._done = (chunk.shard + 1, 0) if chunk.stop == shard.rows else (chunk.shard, chunk.stop)
        self.report.rows += rows
        self.report.bytes += len(chunk.data)

    def _save(self) -> bool:
        """Looks for NaN and infinities, then writes the checkpoint; whether there is one now."""
        start = time.perf_counter()
        self._check()
        now = time.perf_counter()
        self.report.seconds_count += now - start
        if self._checkpoint is None:
            return False
        state = State(
            block=self._done[0],
            digest=self._digest(self._done),
            pairs=self.report.resumed + self.report.rows,
            cut=0,
            identical=0,
            extra={"row": self._done[1]},
            **self._counts.counters(),
        )
        try:
            self._checkpoint.save(state)
        except FileFormatError as error:  # a full disk: what is in memory is worth more than stopping
            warnings.warn(
                f"{error}. Counting goes on; an earlier checkpoint there still stands", AusteerWarning, stacklevel=2
            )
            return False
        finally:
            self.report.seconds_save += time.perf_counter() - now
        return True

    def _place(self) -> Path | None:
        return self._checkpoint.path if self._checkpoint else None

    def _check(self) -> None:
        """Raises CaptureError if an activation was NaN or infinite; waits for the device."""
        found = self._counts.nonfinite()
        if found is None:
            return
        value, row_of_layers, au, site = found
        which = bisect_right(self._offsets, value) - 1
        shard, row = self.shards[which], value - self._offsets[which]
        number = shard.number(row)
        raise CaptureError(
            f"{shard.path}, row {row}{'' if number is None else f' (pair {number})'}: site {site!r}, layer "
            f"{self.stored.layers[row_of_layers]}, AU {au}: found NaN or infinity, expected finite activations. Store "
            "them in bfloat16 or float32, or leave the pair out"
        )


def _device(name: str | torch.device | None) -> torch.device:
    here = torch.cuda.is_available()
    try:
        device = torch.device(name or ("cuda" if here else "cpu"))
    except RuntimeError as error:
        raise AusteerError(f"device: found {name!r}, expected cpu, cuda or cuda:0 ...") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not here):
        raise AusteerError(f"device: found {name!r}, which this machine does not have; expected cpu, or a CUDA GPU")
    return device


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
