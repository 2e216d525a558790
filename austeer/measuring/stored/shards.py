"""Shards of stored last-token activations: their format, and what is checked before they are read.

A shard is a safetensors file. For every site it holds two tensors, ``"{site}.positive"`` and ``"{site}.negative"``,
[rows, layers, width] (or [rows, width], one layer), float16, bfloat16 or float32; row j of both is a contrastive pair.
Files with no more than that can be read when the model is named by hand.
:class:`austeer.measuring.stored.writer.ActivationWriter` adds:

- the int64 tensor ``"numbers"`` [rows]: the place of each row's pair among all pairs;
- the uint8 tensor ``"half"`` [rows]: 1 where its prompt puts a pair into the half that is counted by itself
  (:mod:`austeer.pairs.halves`); shards without it have blocks of rows for halves;
- metadata ``format`` ("austeer-activations"), ``version`` ("1") and ``header``, a JSON object: ``model`` (a
  :class:`austeer.models.sites.Fingerprint`), ``layers`` (which ones the tensors hold), ``chat_template``, ``source``
  (where the pairs come from), ``first`` and ``pairs`` (the shard covers pairs ``first`` to ``first + pairs - 1``;
  those whose two texts are equal have no row), ``cut`` (texts cut to fit the model).

A folder of shards is whole when it has the file ``activations.json``, {"pairs": their sum}.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import FileFormatError
from ...models.sites import SITE_NAMES, Fingerprint
from ...momentum.momentum import ascending
from ...pairs.chat import ChatForm, check_chat_form
from ...pairs.halves import half_rows_without_texts

FORMAT, VERSION = "austeer-activations", 1
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
COMPLETE = "activations.json"

_LARGEST_HEADER = 100_000_000  # bytes; safetensors' own limit


@dataclass(frozen=True)
class ShardHeader:
    """What a shard says of itself.

    Attributes:
        model, layers, chat_template, source: as in :class:`austeer.momentum.momentum.Momentum`; one source.
        first: the number of the first pair. pairs: how many it covers. cut: texts that were cut.
    """

    model: Fingerprint
    layers: tuple[int, ...]
    chat_template: ChatForm
    source: str
    first: int
    pairs: int
    cut: int

    def to_json(self) -> dict[str, Any]:
        return vars(self) | {"model": self.model.to_json(), "layers": list(self.layers)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ShardHeader:
        """Raises KeyError, TypeError or ValueError where ``data`` is no header."""
        model = Fingerprint.from_json(data["model"])
        header = cls(**{**data, "model": model, "layers": ascending(data["layers"], model.layers)})
        if not all(type(n) is int and n >= 0 for n in (header.first, header.pairs, header.cut)):
            raise ValueError("first, pairs and cut must be whole numbers")
        check_chat_form(header.chat_template)
        if not isinstance(header.source, str):
            raise ValueError("source must be a text")
        return header


@dataclass(frozen=True)
class Shard:
    """One file, of which only the header has been read.

    Attributes:
        size: bytes. rows: contrastive pairs. dtype: of the activations.
        shapes: site -> layers and width. starts: name of a tensor -> place of its first byte in the file.
        header: what the shard says of itself, if austeer wrote it.
    """

    path: Path
    size: int
    rows: int
    dtype: torch.dtype
    shapes: Mapping[str, tuple[int, int]]
    starts: Mapping[str, int] = field(repr=False)
    header: ShardHeader | None

    def row_bytes(self, site: str) -> int:
        """Bytes of one side of a pair."""
        layers, width = self.shapes[site]
        return layers * width * self.dtype.itemsize

    def number(self, row: int) -> int | None:
        """The place of a row's pair among all pairs, if the shard knows it."""
        if "numbers" not in self.starts:
            return None
        with self.path.open("rb") as file:
            file.seek(self.starts["numbers"] + 8 * row)
            return int.from_bytes(file.read(8), "little")

    def half(self, start: int, stop: int) -> Tensor:
        """Which of the rows ``start`` to ``stop - 1`` are in the half that is counted by itself: int64, from 0."""
        if self.header is None or "half" not in self.starts:
            return half_rows_without_texts(self.path.name, start, stop)
        try:
            with self.path.open("rb") as file:
                file.seek(self.starts["half"] + start)
                flags = file.read(stop - start)
        except OSError as error:
            raise FileFormatError(f"{self.path}: cannot be read ({error.strerror or error})") from error
        if len(flags) < stop - start:
            raise FileFormatError(f"{self.path}: cut off while it was read; copy the shard whole, or make it anew")
        return torch.tensor([i for i, flag in enumerate(flags) if flag], dtype=torch.int64, device="cpu")


def read_shard(path: Path) -> Shard:
    """The header of a shard, checked against the file's size.

    Raises:
        FileFormatError: no such file, damaged or cut off, no activations in it, or tensors that do not fit together.
    """
    tensors, metadata, start, size = _read_header(path)
    header = None
    if str(metadata.get("format")).startswith("austeer"):
        if metadata["format"] != FORMAT or metadata.get("version") != str(VERSION):
            found = f"{metadata['format']!r} version {metadata.get('version')!r}"
            raise FileFormatError(f"{path}: found a file of format {found}, expected {FORMAT!r} version {VERSION}")
        try:
            header = ShardHeader.from_json(json.loads(metadata["header"]))
        except (KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"{path}: damaged header ({error}); copy the shard whole, or make it anew") from error
    shapes: dict[str, tuple[int, int]] = {}
    rows, dtypes = set(), set()
    for name in sorted(name for name in tensors if name.endswith((".positive", ".negative"))):
        site = name.rpartition(".")[0]
        shape = _shape(path, name, tensors)
        rows.add(shape[0])
        dtypes.add(tensors[name]["dtype"])
        if shapes.setdefault(site, shape[1:]) != shape[1:]:
            raise FileFormatError(
                f"{path}: {site}.positive has {shape[1]} layers of {shape[2]} AUs and {site}.negative "
                f"{shapes[site][0]} of {shapes[site][1]}; expected the same of both"
            )
        if len(rows) > 1:
            raise FileFormatError(
                f"{path}: found tensors of {' and '.join(map(str, sorted(rows)))} rows, expected one number: row j of "
                "every site and side is pair j. Write the shard anew"
            )
    if not shapes:
        raise FileFormatError(
            f'{path}: found no activations ({", ".join(tensors) or "no tensor"}), expected "SITE.positive" and '
            f'"SITE.negative" with SITE one of {", ".join(SITE_NAMES)}'
        )
    if len({layers for layers, _ in shapes.values()}) > 1 or len(dtypes) > 1:
        found = ", ".join(f"{site} {n} layers" for site, (n, _) in shapes.items()) + f" in {', '.join(sorted(dtypes))}"
        raise FileFormatError(f"{path}: found {found}; expected the same layers and one dtype for all sites")
    shard = Shard(
        path=path,
        size=size,
        rows=rows.pop(),
        dtype=DTYPES[dtypes.pop()],
        shapes=shapes,
        starts={name: start + entry["data_offsets"][0] for name, entry in tensors.items()},
        header=header,
    )
    _check_against_header(shard, tensors)
    return shard


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, str], int, int]:
    """Entries of all tensors, metadata, where the data begins, and the size of the file."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(_LARGEST_HEADER, size - 8):
                raise ValueError(f"no header in its {size} bytes")
            entries = json.loads(file.read(length))
        metadata = dict(entries.pop("__metadata__", {}))
        end = 0
        for name, entry in entries.items():
            first, last = entry["data_offsets"]
            sizes = (first, last - first, *entry["shape"])
            if not all(type(n) is int and n >= 0 for n in sizes) or not isinstance(entry["dtype"], str):
                raise ValueError(f"tensor {name!r} has no place, shape or dtype")
            end = max(end, last)
    except FileNotFoundError as error:
        raise FileFormatError(f"{path}: no such file; expected a shard of activations") from error
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileFormatError(
            f"{path}: damaged, or not a safetensors file ({error}); copy the shard whole, make it anew, or leave it out"
        ) from error
    if size != 8 + length + end:
        raise FileFormatError(
            f"{path}: {'cut off' if size < 8 + length + end else 'damaged'}: found {size} bytes, expected "
            f"{8 + length + end}; copy the shard whole, make it anew, or leave it out"
        )
    return entries, metadata, 8 + length, size


def _shape(path: Path, name: str, tensors: Mapping[str, Any]) -> tuple[int, int, int]:
    """[rows, layers, width] of a tensor of activations; raises FileFormatError if it is none, or without the other."""
    site, _, side = name.rpartition(".")
    other = f"{site}.{'negative' if side == 'positive' else 'positive'}"
    if site not in SITE_NAMES:
        raise FileFormatError(
            f"{path}: site {site!r} of tensor {name!r} is not known; expected one of {', '.join(SITE_NAMES)}"
        )
    if other not in tensors:
        raise FileFormatError(f"{path}: found {name!r} without {other!r}; expected both sides of every pair")
    dtype, shape = tensors[name]["dtype"], tensors[name]["shape"]
    if dtype not in DTYPES or dtype != tensors[other]["dtype"]:
        raise FileFormatError(
            f"{path}: {name!r} is {dtype} and {other!r} {tensors[other]['dtype']}; expected F16, BF16 or F32, the same "
            "for both"
        )
    if len(shape) not in (2, 3) or 0 in shape[1:]:
        raise FileFormatError(f"{path}: {name!r} is {shape}, expected [rows, layers, width] or [rows, width]")
    rows, layers, width = shape if len(shape) == 3 else (shape[0], 1, shape[1])
    first, last = tensors[name]["data_offsets"]
    if last - first != rows * layers * width * DTYPES[dtype].itemsize:
        raise FileFormatError(f"{path}: damaged: {name!r} is {shape} and takes {last - first} bytes; make it anew")
    return rows, layers, width


def _check_against_header(shard: Shard, tensors: Mapping[str, Any]) -> None:
    header = shard.header
    if header is None:
        return
    expected = {site: (len(header.layers), header.model.widths.get(site)) for site in shard.shapes}
    numbers, half = tensors.get("numbers", {}), tensors.get("half")
    if (
        dict(shard.shapes) != expected
        or shard.rows > header.pairs
        or (numbers.get("dtype"), numbers.get("shape")) != ("I64", [shard.rows])
        or (half is not None and (half["dtype"], half["shape"]) != ("U8", [shard.rows]))
    ):
        raise FileFormatError(
            f"{shard.path}: its tensors are not those that its header tells of; copy the shard whole, or make it anew"
        )


def find_shards(paths: str | Path | Iterable[str | Path]) -> list[Shard]:
    """The shards of files and folders, in the order of their pairs.

    Raises:
        FileFormatError: none is found, one is given twice or covers pairs that another one covers, a folder is not
            whole, or anything of :func:`read_shard`.
    """
    found: list[Shard] = []
    for path in map(Path, [paths] if isinstance(paths, (str, Path)) else paths):
        if not path.is_dir():
            found.append(read_shard(path))
            continue
        inside = [read_shard(file) for file in sorted(path.glob("*.safetensors"))]
        if not inside:
            raise FileFormatError(f"{path}: found no *.safetensors in this folder, expected shards of activations")
        _check_whole(path, inside)
        found += inside
    if not found:
        raise FileFormatError("found no shard, expected files or folders of activations")
    seen: dict[Path, Path] = {}
    for shard in found:
        place = shard.path.resolve()
        if place in seen:
            raise FileFormatError(f"{shard.path}: given twice (as {seen[place]}); its pairs would count twice")
        seen[place] = shard.path
    told = sorted(((s.header, s) for s in found if s.header), key=lambda pair: (pair[0].source, pair[0].first))
    for (a, one), (b, other) in pairwise(told):
        if a.source == b.source and b.first < a.first + a.pairs:
            raise FileFormatError(
                f"{other.path}: covers pairs of {b.source} from {b.first}, and {one.path} covers up to "
                f"{a.first + a.pairs - 1}: they would count twice. Leave one out"
            )
    return [shard for _, shard in told] + [shard for shard in found if shard.header is None]


def _check_whole(folder: Path, shards: list[Shard]) -> None:
    covered = sum(shard.header.pairs for shard in shards if shard.header)
    if all(shard.header is None for shard in shards):
        return
    try:
        expected = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))["pairs"]
    except FileNotFoundError:
        raise FileFormatError(
            f"{folder}: found shards of {covered} pairs and no {COMPLETE}: the measurement that writes them has not "
            f"finished. Resume it, or count what is there by naming the shards: {folder}/*.safetensors"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise FileFormatError(f"{folder / COMPLETE}: damaged ({error}); name the shards themselves") from error
    if covered != expected:
        raise FileFormatError(
            f"{folder}: found shards of {covered} pairs, expected {expected}; copy the folder whole, or count what is "
            f"there by naming the shards: {folder}/*.safetensors"
        )
