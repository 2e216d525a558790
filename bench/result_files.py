"""Reads the result files that can be compared, and says plainly what is wrong with one that cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from austeer.errors import FileFormatError

from .inference import KIND, SCHEMA

#: What pytest-benchmark writes (``--benchmark-json``); its files name no kind.
MICRO = "pytest-benchmark"
_KEYS = {
    KIND: ("environment", "model", "settings", "complete", "series", "cases", "goals"),
    MICRO: ("machine_info", "commit_info", "benchmarks"),
}


def read_result(path: Path | str, kind: str | None = None) -> dict[str, Any]:
    """The content of a result file, checked as far as comparing needs it.

    Args:
        kind: "inference" or "pytest-benchmark"; by default either.

    Raises:
        FileFormatError: no such file, no JSON, another kind, another schema, or parts missing.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileFormatError(f"{path}: found no such file, expected a result; make one with: austeer bench") from error
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{path}: found {error}, expected a result as JSON; measure again") from error
    found = kind_of(content)
    expected = tuple(_KEYS) if kind is None else (kind,)
    if found is None or found not in expected:
        said = "no kind" if found is None else f"kind {found!r}"
        raise FileFormatError(
            f"{path}: found {said}, expected {' or '.join(map(repr, expected))}; give a file that 'austeer bench' wrote"
            + (", or pytest's --benchmark-json" if MICRO in expected else "")
        )
    if found == KIND and content.get("schema") != SCHEMA:
        raise FileFormatError(f"{path}: found schema {content.get('schema')!r}, expected {SCHEMA}: {_age(content)}")
    missing = [key for key in _KEYS[found] if key not in content]
    if missing:
        raise FileFormatError(f"{path}: found no {', '.join(missing)}, expected them in a result; measure again")
    return content


def kind_of(content: Any) -> str | None:
    """Which kind of result this is, by itself; None: none that is known."""
    if not isinstance(content, dict):
        return None
    if "kind" not in content:
        return MICRO if "benchmarks" in content else None
    return str(content["kind"])


def complete(content: dict[str, Any]) -> bool:
    """Whether the measurement came to its end: results are written case by case."""
    return bool(content.get("complete", True))


def _age(content: dict[str, Any]) -> str:
    schema = content.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        return "made by a newer version; update this one, or measure again with it"
    return "made by an older version; measure again with this one"
