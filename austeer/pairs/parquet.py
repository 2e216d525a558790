"""Rows of Parquet files and of Hugging Face datasets, as their libraries read them."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import PairsError
from .source import Reading, Row, Source, object_of, require

BATCH = 256  # rows of a Parquet file decoded at once
BUFFER = 2**20  # bytes of a Parquet column read ahead; without it a whole row group is


class ParquetFile(Source):
    """A Parquet file."""

    def __init__(self, path: Path):
        self._parquet = require("pyarrow.parquet", str(path))
        self.name, self.size, self._path = str(path), path.stat().st_size, path

    def _rows(self, reading: Reading) -> Generator[Row, None, None]:
        with _opened(
            self.name, self._parquet.ParquetFile, self._path, buffer_size=BUFFER, page_checksum_verification=True
        ) as file:
            names = _opened(self.name, lambda: file.schema_arrow.names)
            if len(set(names)) < len(names):
                raise PairsError(f"{self.name}: found a column name twice in {', '.join(names)}; expected each once")
            rows = _parquet_rows(file, reading.present(names) or names)
            yield from _counted(rows, self.name, file.metadata.num_rows, reading)


def _parquet_rows(file, columns: list[str]) -> Iterator[Mapping[str, Any]]:
    for batch in file.iter_batches(BATCH, columns=columns):
        values = [batch.column(name) for name in columns]
        for i in range(batch.num_rows):
            yield {name: column[i].as_py() for name, column in zip(columns, values)}


class Dataset(Source):
    """A dataset of Hugging Face's library, or one split of several.

    Args:
        dataset: a ``Dataset`` or ``IterableDataset``, or a dictionary of them by split.
        name: for messages. split: which of several. size: bytes as stored.
        whole: whether an iterable dataset has as many rows as its information says (none has been left out since).
    """

    def __init__(self, dataset, name: str, split: str | None, size: int = 1, whole: bool = False):
        if isinstance(dataset, dict):
            if split is None and len(dataset) == 1:
                (split,) = dataset
            if split not in dataset:
                raise PairsError(
                    f"{name}: found the splits {', '.join(map(str, dataset))}; expected "
                    f"{'one of them' if split is None else f'one of them, not {split!r},'} with split= or --split"
                )
            name, dataset = f"{name}, split {split}", dataset[split]
        elif split is not None:
            raise PairsError(f"{name}: found the split {split!r}, but the dataset has no splits; leave it out")
        self.name, self.size, self._dataset = name, size, dataset
        self._count: int | None = None
        if hasattr(dataset, "__len__"):
            self._count = len(dataset)
        elif whole and split in (dataset.info.splits or {}):
            self._count = dataset.info.splits[split].num_examples or None

    def _rows(self, reading: Reading) -> Generator[Row, None, None]:
        dataset = self._dataset
        names = dataset.column_names
        # A transform may make columns out of others.
        transformed = getattr(dataset, "format", {}).get("type") == "custom"
        chosen = None if names is None or transformed else reading.present(names)
        if chosen is not None:
            dataset = dataset.select_columns(chosen)
        yield from _counted(iter(dataset), self.name, self._count, reading)


def from_folder(path: Path, split: str | None) -> Dataset:
    """The dataset that ``Dataset.save_to_disk`` wrote to a folder."""
    if not (path / "dataset_info.json").is_file() and not (path / "dataset_dict.json").is_file():
        raise PairsError(
            f"{path}: no such file, but a folder that Dataset.save_to_disk did not write; give its files, "
            f"for example {str(path / '*.jsonl')!r}"
        )
    datasets = require("datasets", str(path))
    size = sum(file.stat().st_size for file in path.rglob("*.arrow"))
    return Dataset(_opened(str(path), datasets.load_from_disk, str(path)), str(path), split, size)


def from_hub(source: str, split: str | None) -> Dataset:
    """The dataset of the Hub that ``hf:ORG/NAME`` or ``hf:ORG/NAME:CONFIG`` names, streamed."""
    found = re.fullmatch(r"hf:([\w.-]+(?:/[\w.-]+)?)(?::([^:]+))?", source)
    if found is None:
        raise PairsError(f"{source}: expected hf:ORG/NAME or hf:ORG/NAME:CONFIG")
    datasets = require("datasets", source)
    return Dataset(_opened(source, datasets.load_dataset, *found.groups(), streaming=True), source, split, whole=True)


def is_dataset(source: Any) -> bool:
    """Whether an object is a dataset of Hugging Face's library, or several by split."""
    module = sys.modules.get("datasets")  # who has a dataset has imported it
    kinds = ("Dataset", "IterableDataset", "DatasetDict", "IterableDatasetDict")
    return module is not None and isinstance(source, tuple(getattr(module, kind, ()) for kind in kinds))


def _counted(rows: Iterator[Any], name: str, count: int | None, reading: Reading) -> Generator[Row, None, None]:
    """Rows of a library, with their places; whatever it raises becomes a PairsError."""
    reading.fraction = None if count is None else 0.0
    number = 0
    while True:
        where = f"{name}, row {number}"
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise PairsError(
                f"{where}: cannot be read ({_brief(error)}); if the data is cut off or damaged, copy or make it again"
            ) from error
        number += 1
        if count is not None:
            reading.fraction = min(number / count, 1.0)
        yield where, object_of(row, where)


def _opened(name: str, function: Callable[..., Any], *args, **options) -> Any:
    """What a library's function returns; whatever it raises becomes a PairsError."""
    try:
        return function(*args, **options)
    except Exception as error:
        raise PairsError(
            f"{name}: cannot be opened ({_brief(error)}); check the name, or copy or make the data again"
        ) from error


def _brief(error: Exception) -> str:
    """The kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
