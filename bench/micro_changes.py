"""Two JSON files of pytest-benchmark side by side: what is not alike, and the times that both have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .plain_ways import AGAIN, UNSTEERED

Spread = dict[str, float]


def machine(content: dict[str, Any]) -> dict[str, Any]:
    """What times depend on, as far as pytest-benchmark notes it."""
    info = content["machine_info"]
    cpu = info.get("cpu") or {}
    return {
        "processor": cpu.get("brand_raw") or info.get("processor") or info.get("machine"),
        "cores": cpu.get("count"),
        "python": info.get("python_version"),
    }


def unlike(a: dict[str, Any], b: dict[str, Any]) -> Iterator[str]:
    """Where the two runs' machines differ: then no time is compared."""
    before, after = machine(a), machine(b)
    for key in before:
        if before[key] != after[key]:
            yield f"{key}: {before[key]} -> {after[key]}; times are not compared"


def _by_name(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["fullname"]: row for row in content["benchmarks"]}


def new_and_gone(a: dict[str, Any], b: dict[str, Any]) -> Iterator[str]:
    before, after = _by_name(a), _by_name(b)
    for name in dict.fromkeys([*before, *after]):
        if name not in before or name not in after:
            yield f"{name} is {'new' if name in after else 'gone'}"


@dataclass(frozen=True)
class Pair:
    """One benchmark before and after.

    Attributes:
        name: of the way, or of the benchmark where it is of none.
        unit: "seconds", or "ratio" to the unsteered model of the same group: its machine may be busier than before.
        before, after: median, and the quartiles as low and high. noise: how far the group's A/A pair is apart.
    """

    group: str
    name: str
    unit: str
    before: Spread
    after: Spread
    noise: float


def pairs(a: dict[str, Any], b: dict[str, Any]) -> Iterator[Pair]:
    """What both have; nothing where the machines differ."""
    if machine(a) != machine(b):
        return
    after = _by_name(b)
    for name, row in _by_name(a).items():
        if name not in after or _way(row) == AGAIN:  # which is the noise itself
            continue
        known = row["group"] or "", _way(row) or row["name"]
        found = [_against_unsteered(content, one) for content, one in ((a, row), (b, after[name]))]
        if None in found:
            yield Pair(*known, "seconds", _spread(row, 1.0), _spread(after[name], 1.0), 0.0)
        else:
            (before, noise), (later, more) = found  # type: ignore[misc]
            yield Pair(*known, "ratio", before, later, max(noise, more))


def _against_unsteered(content: dict[str, Any], row: dict[str, Any]) -> tuple[Spread, float] | None:
    """The ratio and the noise; None of the unsteered model itself, and where none is beside it."""
    group = {_way(one): one for one in content["benchmarks"] if one["group"] == row["group"]}
    if _way(row) in (None, UNSTEERED) or not {UNSTEERED, AGAIN} <= set(group):
        return None
    unit = group[UNSTEERED]["stats"]["median"]
    return _spread(row, unit), abs(group[AGAIN]["stats"]["median"] / unit - 1)


def _way(row: dict[str, Any]) -> str | None:
    return row.get("extra_info", {}).get("way")


def _spread(row: dict[str, Any], unit: float) -> Spread:
    stats = row["stats"]
    return {"median": stats["median"] / unit, "low": stats["q1"] / unit, "high": stats["q3"] / unit}
