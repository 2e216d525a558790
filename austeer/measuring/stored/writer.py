"""Writes the last-token activations of a measurement, to be counted again later without the model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ...errors import FileFormatError
from ...models.sites import Fingerprint
from ...pairs.chat import ChatForm
from ...utils import files
from .shards import COMPLETE, FORMAT, VERSION, ShardHeader, read_shard


class ActivationWriter:
    """One shard a block of pairs, in the format of :mod:`austeer.measuring.stored.shards`; each is there whole or not
    at all.

    A block that is written again (after a resume) replaces its shard.

    Args:
        folder: where to; made if it is not there.
        model, layers, chat_template: as in :class:`austeer.momentum.momentum.Momentum`. source: where the pairs come
        from.
        resume: allow a folder with shards of the same run: it goes on, or another process writes into it, too.

    Raises:
        FileFormatError: the folder has shards, or those of another run, or cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        model: Fingerprint,
        *,
        layers: Sequence[int],
        chat_template: ChatForm = False,
        source: str = "memory",
        resume: bool = False,
    ):
        self.folder = Path(folder)
        self._header = ShardHeader(model, tuple(layers), chat_template, source, first=0, pairs=0, cut=0)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            present = sorted(self.folder.glob("*.safetensors"))
            if present:
                self._check(present, resume)
            (self.folder / COMPLETE).unlink(missing_ok=True)
        except OSError as error:
            raise FileFormatError(f"{folder}: cannot be written ({error.strerror or error}); give another") from error

    def _check(self, present: list[Path], resume: bool) -> None:
        if not resume:
            raise FileFormatError(
                f"{self.folder}: found {len(present)} shards, expected an empty folder; resume the run that wrote "
                "them, give another folder, or remove them"
            )
        header = read_shard(present[0]).header
        if header is None or replace(header, first=0, pairs=0, cut=0) != self._header:
            raise FileFormatError(f"{present[0]}: is of another run; give another folder, or remove what is there")

    def add(
        self,
        buffers: Mapping[str, Tensor],
        numbers: Sequence[int],
        *,
        first: int,
        pairs: int,
        cut: int = 0,
        half: Tensor | None = None,
    ) -> Path:
        """Writes a block.

        Args:
            buffers: site -> [at least 2 m, layers, width] on any device; row r and row r + m are a pair, positive
                first, with m = len(numbers).
            numbers: the place of each of the m pairs among all pairs.
            first, pairs: the block is pairs ``first`` to ``first + pairs - 1``; those without a row have equal texts.
            cut: how many texts were cut.
            half: which of the m pairs are in the half that is counted by itself (:mod:`austeer.pairs.halves`), int64,
                if their texts are known.

        Returns:
            The shard's path.

        Raises:
            FileFormatError: it cannot be written.
        """
        m = len(numbers)
        tensors = {"numbers": torch.tensor(list(numbers), dtype=torch.int64, device="cpu")}
        if half is not None:
            tensors["half"] = torch.zeros(m, dtype=torch.uint8, device="cpu").index_fill_(0, half, 1)
        for site, buffer in buffers.items():
            tensors[f"{site}.positive"], tensors[f"{site}.negative"] = buffer[:m].cpu(), buffer[m : 2 * m].cpu()
        path = self.folder / f"{first:012d}.safetensors"
        header = replace(self._header, first=first, pairs=pairs, cut=cut)
        files.write(path, FORMAT, VERSION, header.to_json(), tensors)
        return path

    def finish(self, pairs: int) -> None:
        """Marks the folder as whole; called once, when all processes have written.

        Args:
            pairs: how many all shards cover.

        Raises:
            FileFormatError: the mark cannot be written.
        """
        path = self.folder / COMPLETE
        temporary = path.with_suffix(".new")
        try:
            temporary.write_text(json.dumps({"format": FORMAT, "version": VERSION, "pairs": pairs}), encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            raise FileFormatError(f"{path}: cannot be written ({error.strerror or error}); make room") from error
