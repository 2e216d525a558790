"""GGUF files, as llama.cpp reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ..plan import Plan
from .edits import ExportError, describe


def writer_of(path: Path, architecture: str, name: str, pairs: list[tuple[Plan, float]]) -> Any:
    """A ``GGUFWriter`` that says what it was made of."""
    from gguf import GGUFWriter

    from .. import __version__

    writer = GGUFWriter(path, architecture)
    writer.add_string("austeer.version", __version__)
    writer.add_string("austeer.model", name)
    writer.add_string("austeer.plans", json.dumps(describe(pairs)))
    return writer


def add(writer: Any, name: str, value: Tensor) -> None:
    """Raises ExportError where a value is not finite."""
    if not value.isfinite().all():
        raise ExportError(f"{name}: found a value that is no finite {value.dtype} number; take a smaller alpha")
    writer.add_tensor(name, value.contiguous().numpy())


def finish(writer: Any) -> None:
    """Writes the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
