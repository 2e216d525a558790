"""JSON objects in which no name stands twice: Python's reader would take the last in silence."""

from __future__ import annotations

from typing import Any


class DuplicateKey(ValueError):
    """A name that stands twice in one JSON object."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For ``json.loads(object_pairs_hook=...)``; raises DuplicateKey."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DuplicateKey(f"found the field {twice!r:.60} twice in one object, expected each once")
    return found
