"""Writes what was measured on a device into the kernels' table for it: austeer_kernels/tables/<device>.json."""

from __future__ import annotations

import dataclasses
import glob
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from austeer_kernels import launch


def update(
    file: Path,
    names: tuple[str, str],
    source: str,
    dtype: str,
    shapes: Collection[tuple[int, int]],
    limits: Sequence[launch.Limit],
    entries: Sequence[launch.Entry] = (),
) -> None:
    """Makes or updates a table, and reads it back.

    Args:
        names: the device's, from ``launch.names_of``.
        source: where the numbers come from; earlier sources stay, for the numbers that stay.
        dtype: what was measured. shapes: the weights [n, k] that were; their earlier limits are replaced, also by none.
        entries: the best settings; an earlier one of the same operation, dtypes and shape is replaced.

    Raises:
        ValueError: the file is for other devices.
    """
    architectures, devices = [names[0]], [glob.escape(names[1])]
    content: dict[str, Any] = {"architectures": architectures, "devices": devices, "entries": [], "fused": []}
    if file.exists():
        content = json.loads(file.read_text(encoding="utf-8"))
        if (content["architectures"], content["devices"]) != (architectures, devices):
            raise ValueError(
                f"{file} is for {content['devices']} ({content['architectures']}), expected {devices} ({architectures})"
            )
    sources = [*content.get("source", "").split("; "), source]
    content["source"] = "; ".join(dict.fromkeys(filter(None, sources)))
    kept = [row for row in content.get("fused", []) if row["dtypes"] != [dtype] or (row["n"], row["k"]) not in shapes]
    content["fused"] = sorted(kept + [_row(limit) for limit in limits], key=_key)
    new = [_row(entry) for entry in entries]
    replaced = [_key(row) for row in new]
    content["entries"] = sorted([row for row in content["entries"] if _key(row) not in replaced] + new, key=_key)
    file.write_text(_dumps(content), encoding="utf-8")
    launch.forget()
    launch.tables()  # says where a row does not fit


def _row(of: launch.Entry | launch.Limit) -> dict[str, Any]:
    """A row without what has its default value, the operation first, as the tables are written by hand."""
    values = {f.name: getattr(of, f.name) for f in dataclasses.fields(of)}
    defaults = {f.name: f.default for f in dataclasses.fields(of)}
    kept = {name: value for name, value in values.items() if value != defaults[name]}
    first = [name for name in ("op", "dtypes", "m", "n", "k") if name in kept]
    row = {name: kept[name] for name in first} | kept
    return row | {"dtypes": list(row["dtypes"])}


def _key(row: dict[str, Any]) -> tuple:
    return row.get("op", ""), row["dtypes"], row["n"], row.get("k", 0), row["m"]


def _dumps(content: dict[str, Any]) -> str:
    """JSON with a line for each row."""
    names = ["source", "architectures", "devices"]
    parts = [f'  "{name}": {json.dumps(content[name])}' for name in names]
    for name in ("entries", "fused"):
        rows = ",\n".join(f"    {json.dumps(row)}" for row in content[name])
        parts.append(f'  "{name}": [\n{rows}\n  ]' if rows else f'  "{name}": []')
    return "{\n" + ",\n".join(parts) + "\n}\n"
