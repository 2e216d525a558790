"""Rows of files and Hugging Face datasets, one after another: a source of any length takes little memory."""

from __future__ import annotations

import csv
import glob
import json
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..errors import PairsError
from ..utils.unique_keys import DuplicateKey, unique_keys
from .parquet import Dataset, ParquetFile, from_folder, from_hub, is_dataset
from .source import Reading, Row, Source, object_of, require
from .text_file import COMPRESSIONS, TextFile


def open_source(source, split: str | None = None) -> Source:
    """The source that a path, a pattern, several paths, ``hf:ORG/NAME`` or a dataset names; see ``stream_pairs``.

    Raises:
        PairsError: no such file or dataset, a format that is not known, a package that is not installed, or a split
            that is not named or does not exist.
    """
    if isinstance(source, str) and source.startswith("hf:"):
        return from_hub(source, split)
    if is_dataset(source):
        return Dataset(source, "dataset", split)
    try:
        if isinstance(source, (str, Path)):
            pattern = str(source)
            if not re.search(r"[*?[]", pattern) or Path(pattern).exists():
                return _from_path(Path(source), split)
            found = glob.glob(pattern, recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
            return Several(pattern, found, split)
        if isinstance(source, Sequence) and source and all(isinstance(path, (str, Path)) for path in source):
            first = min(map(str, source))
            return Several(f"{first} and {len(source) - 1} more" if len(source) > 1 else first, source, split)
    except OSError as error:
        raise PairsError(f"{str(source)[:200]}: cannot be looked up ({error.strerror}); check the path") from error
    raise PairsError(
        f"pairs: found {type(source).__name__}, expected a path, a pattern, several paths, hf:ORG/NAME or a dataset; "
        "pairs in memory go through Pairs.of"
    )


def _from_path(path: Path, split: str | None) -> Source:
    if path.is_dir():
        return from_folder(path, split)
    name = path.name.lower()
    compression = next((suffix for suffix in COMPRESSIONS if name.endswith(suffix)), "")
    suffix = Path(name.removesuffix(compression)).suffix
    if not (suffix in TEXT_FORMATS or (suffix == ".parquet" and not compression)):
        raise PairsError(
            f"{path}: found the suffix {path.suffix!r}, expected one of {', '.join(TEXT_FORMATS)} (and "
            f"{' or '.join(COMPRESSIONS)} after it) or .parquet"
        )
    if not path.is_file():
        raise PairsError(f"{path}: no such file; give the path of a file of pairs")
    if split is not None:
        raise PairsError(f"{path}: found the split {split!r}, but a file has no splits; choose its rows with where=")
    return ParquetFile(path) if suffix == ".parquet" else Text(path, compression, TEXT_FORMATS[suffix])


class Several(Source):
    """Sources as one, in the order of their paths."""

    def __init__(self, name: str, paths: Iterable[str | Path], split: str | None):
        ordered = sorted(map(Path, paths), key=str)
        if not ordered:
            raise PairsError(f"{name}: no file matches this pattern; give the path of a file of pairs")
        for path, following in pairwise(ordered):
            if path == following:
                raise PairsError(f"{path}: found twice among the paths; its pairs would count twice")
        self.name = name
        self._parts = [_from_path(path, split) for path in ordered]
        self.size = sum(part.size for part in self._parts)

    def _rows(self, reading: Reading) -> Generator[Row, None, None]:
        before = 0
        for part in self._parts:
            with closing(part.read(reading.columns, reading.optional)) as rows:
                for row in rows:
                    if rows.fraction is not None:
                        reading.fraction = (before + rows.fraction * part.size) / self.size
                    yield row
            before += part.size


class Text(Source):
    """A file of JSONL, JSON or CSV, which may be compressed."""

    def __init__(self, path: Path, compression: str, rows: Callable[[TextFile, Reading], Iterator[Row]]):
        if compression == ".zst":
            require("zstandard", str(path))
        self.name, self.size = str(path), path.stat().st_size
        self._path, self._compression, self._rows_of = path, compression, rows

    def _rows(self, reading: Reading) -> Generator[Row, None, None]:
        with TextFile(self._path, self._compression) as file:
            yield from self._rows_of(file, reading)


def _jsonl(file: TextFile, reading: Reading) -> Iterator[Row]:
    for number, line in enumerate(file.lines(), 1):
        if line.strip():
            reading.fraction = file.fraction
            where = f"{file.path}, line {number}"
            yield where, object_of(_parsed(line, file.path, number), where)


def _json(file: TextFile, reading: Reading) -> Iterator[Row]:
    rows = _parsed(file.text(), file.path)
    if not isinstance(rows, list):
        raise PairsError(f"{file.path}: found {type(rows).__name__} at the top, expected a list of objects")
    for number, row in enumerate(rows, 1):
        reading.fraction = number / len(rows)
        where = f"{file.path}, entry {number}"
        yield where, object_of(row, where)


def _csv(file: TextFile, reading: Reading) -> Iterator[Row]:
    # strict: a quote that is never closed would swallow the rows behind it.
    rows = csv.DictReader(file.lines(newline=""), strict=True)
    try:
        names = rows.fieldnames or []
        if len(set(names)) < len(names):
            raise PairsError(f"{file.path}: found a column name twice in {', '.join(names)}; expected each once")
        for row in rows:
            where = f"{file.path}, line {rows.line_num}"
            if None in row:  # where DictReader puts what has no column
                raise PairsError(f"{where}: found more than {len(names)} fields; put text that holds a comma in quotes")
            given = len(names) - sum(value is None for value in row.values())  # DictReader fills a short row up
            if given < len(names):
                raise PairsError(
                    f"{where}: found {given} fields, expected {len(names)} ({', '.join(names)}); the row is cut off "
                    "or lacks a comma: fill it up"
                )
            reading.fraction = file.fraction
            yield where, row
    except csv.Error as error:
        # rows.line_num is still the end of the row before, and a quote that stays open is best found at its beginning.
        raise PairsError(
            f"{file.path}, line {rows.line_num + 1}: not readable as CSV ({error}); check the quoting, or use JSONL"
        ) from error


TEXT_FORMATS = {".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv}


def _parsed(text: str, path: Path, line: int | None = None) -> Any:
    """The JSON value of a file's text, or of one of its lines."""
    where = f"{path}, line {line}" if line else str(path)
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except DuplicateKey as error:
        raise PairsError(f"{where}: {error}; remove one") from error
    except json.JSONDecodeError as error:
        place = where if line else f"{path}, line {error.lineno}"
        remedy = "; expected one object a line" if line else ""
        raise PairsError(f"{place}: not valid JSON ({error.msg}){remedy}") from error
    except RecursionError as error:
        raise PairsError(f"{where}: found JSON nested too deep; expected objects with the pair's fields") from error
    except ValueError as error:
        raise PairsError(f"{where}: found a number that cannot be read ({error})") from error
