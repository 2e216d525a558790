"""Every way to steer that can be timed, by name, in the order of tables."""

from __future__ import annotations

from collections.abc import Iterable

from austeer.errors import AusteerError

from . import our_ways, plain_ways
from .peers.libraries import WAYS as PEERS
from .plain_ways import AGAIN, UNSTEERED
from .steered import Way

WAYS = {way.name: way for way in (*plain_ways.WAYS, *our_ways.WAYS, *PEERS)}


def chosen(names: Iterable[str] | None = None) -> dict[str, Way]:
    """The ways of these names, all by default; the unsteered model is always among them, twice.

    Raises:
        AusteerError: an unknown name.
    """
    names = list(WAYS if names is None else names)
    for name in names:
        if name not in WAYS:
            raise AusteerError(f"variants: found {name!r}, expected of: {', '.join(WAYS)}")
    return {name: way for name, way in WAYS.items() if name in (UNSTEERED, AGAIN, *names)}
