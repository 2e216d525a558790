"""Where two settings of a run differ: the one entry, and not the dictionary that it is in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def first_difference(found: Any, expected: Any, name: str = "") -> str | None:
    """The first entry that is not as expected, as ``data.seed 0, expected 3``, for a message; None if all are.

    Entries that only ``found`` has do not count.
    """
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        names = {key: f"{name}.{key}".lstrip(".") for key in expected}
        entries = (first_difference(found.get(key), value, names[key]) for key, value in expected.items())
        return next((entry for entry in entries if entry is not None), None)
    return None if found == expected else f"{name} {found!r:.120}, expected {expected!r:.120}"
