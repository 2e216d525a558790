"""The kernels' table of a device, written from what was measured of their settings (results of kind "settings").

A table is a function of its results alone: of settings measured twice the later file's count. Settings found for one
16-bit dtype are entries for both, since the kernels differ only in the names of their instructions; a limit is written
for the dtype that was measured alone.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from austeer_kernels import launch

from . import files

KIND = "settings"
#: Devices with the same multiprocessors, which use a device's table until one of their own is measured.
RELATIVES = {"NVIDIA H200": ("NVIDIA H100*",)}
#: Sums are split no further at other shapes than those that were measured.
MOST_SPLITS = 16
_HALF = ("bfloat16", "float16")


def write(paths: Sequence[Path]) -> Path:
    """Writes the table of the device that some results are of, in their order, and reads it back.

    Raises:
        ResultsError: a file that is no such result, or is of another device than the first.
    """
    contents = [files.read(path, KIND) for path in paths]
    first = contents[0]["environment"]
    for path, content in zip(paths, contents):
        found = content["environment"]["device"]
        if found != first["device"]:
            raise files.ResultsError(
                f"{path}: found settings measured on {found}, expected {first['device']}, as in {paths[0]}; "
                "write a table for each device"
            )
    measured = {content["dtype"] for content in contents}
    entries: dict[tuple, launch.Entry] = {}
    limits: dict[tuple, launch.Limit] = {}
    for content in contents:
        alike = [d for d in _HALF if content["dtype"] in _HALF and d not in measured]
        for entry in entries_of(content, (content["dtype"], *alike)):
            entries[entry.op, entry.dtypes, entry.m, entry.n, entry.k] = entry
        for limit in limits_of(content["forms"], content["dtype"]):
            limits[limit.op, limit.dtypes, limit.n, limit.k] = limit
    others = RELATIVES.get(first["device"], ())
    sources = [_source(path, content["environment"]) for path, content in zip(paths, contents)]
    head = {
        "source": "; ".join([*sources, *(f"not measured on {other}" for other in others)]),
        "architectures": [first["architecture"]],
        "devices": [re.sub(r"([\[*?])", r"[\1]", first["device"]), *others],
    }
    parts = [f'  "{name}": {json.dumps(value)}' for name, value in head.items()]
    for name, rows in (("entries", entries), ("fused", limits)):
        lines = ",\n".join(f"    {json.dumps(_given(rows[key]))}" for key in sorted(rows))
        parts.append(f'  "{name}": [\n{lines}\n  ]')
    file = launch.TABLES / f"{files.slug(first['device'])}.json"
    file.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    launch.forget()
    launch.tables()  # says where a row does not fit
    return file


def _source(path: Path, environment: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {environment['packages'][name]}" for name in ("torch", "triton"))
    commit = environment["commit"] or "unknown"
    return f"{path.name}: measured on {environment['device']}, {environment['date'][:10]}, commit {commit}, {versions}"


def _given(row: launch.Entry | launch.Limit) -> dict[str, Any]:
    """A row without what is as it is by default."""
    return {f.name: value for f in dataclasses.fields(row) if (value := getattr(row, f.name)) != f.default}


def entries_of(content: dict[str, Any], dtypes: tuple[str, ...]) -> list[launch.Entry]:
    """The best settings found for each kernel and shape."""
    processors = content["environment"]["multiprocessors"]
    found = [form_entry(row, row["best"], dtypes, processors) for row in content["forms"]]
    return found + _columns_entries(content["sparse us"], dtypes) + _counting_entries(content, dtypes)


def form_entry(
    shape: dict[str, Any], settings: dict[str, Any], dtypes: tuple[str, ...], processors: int
) -> launch.Entry:
    """An entry that gives a projection's shape these settings, its number of splits included.

    Args:
        shape: n, k, m, at_input, rows. settings: block_m, block_n, block_k, num_warps, num_stages, splits.
        processors: the device's multiprocessors.
    """
    blocks = {name: settings[name] for name in ("block_m", "block_n", "block_k", "num_warps", "num_stages")}
    programs = math.ceil(shape["n"] / blocks["block_n"]) * math.ceil(shape["m"] / blocks["block_m"])
    return launch.Entry(
        op=launch.form(shape["at_input"], shape["rows"]),
        dtypes=dtypes,
        **{size: shape[size] for size in ("m", "n", "k")},
        **blocks,
        programs_per_processor=round(settings["splits"] * programs / processors, 4),
        max_splits=max(MOST_SPLITS, settings["splits"]),
    )


def columns_entry(tokens: int, count: int, block_m: int, block_n: int, warps: int, dtypes: tuple[str, ...]):
    """An entry of ``steer_columns_``."""
    return launch.Entry("steer_columns_", dtypes, tokens, count, block_m, block_n, warps)


def counting_entry(rows: int, columns: int, numbers: Sequence[int], dtypes: tuple[str, ...]) -> launch.Entry:
    """An entry of ``momentum_update``; ``numbers``: block_m, block_n, warps, stages, programs a multiprocessor."""
    block_m, block_n, warps, stages, programs = numbers
    return launch.Entry(
        *("momentum_update", dtypes, rows, columns, block_m, block_n, warps),
        num_stages=stages,
        programs_per_processor=programs,
        max_splits=64,
    )


def _columns_entries(found: dict[str, dict[str, float]], dtypes: tuple[str, ...]) -> list[launch.Entry]:
    """Of settings timed at several widths, by which no entry is chosen, those with the least product of times."""
    times: dict[tuple[int, int], list[dict[tuple[int, ...], float]]] = {}
    for name, row in found.items():
        _, tokens, count = _numbers(r"w(\d+) m(\d+) k(\d+)", name)
        named = {_numbers(r"(\d+) (\d+) w(\d+)", text): us for text, us in row.items() if text[:1].isdigit()}
        times.setdefault((tokens, count), []).append(named)
    entries = []
    for (tokens, count), rows in times.items():
        everywhere = set.intersection(*map(set, rows))
        best = min(everywhere, key=lambda numbers: math.prod(row[numbers] for row in rows))
        entries.append(columns_entry(tokens, count, *best, dtypes))
    return entries


def _counting_entries(content: dict[str, Any], dtypes: tuple[str, ...]) -> list[launch.Entry]:
    found = {name: row["us"] for name, row in content["counting"].items() if name[:1].isdigit()}
    if not found:
        return []
    best = _numbers(r"(\d+)x(\d+) w(\d+) s(\d+) p(\d+)", min(found, key=lambda name: found[name]))
    rows, columns = content["counting shape"]
    return [counting_entry(rows, columns, best, dtypes)]


def _numbers(pattern: str, text: str) -> tuple[int, ...]:
    found = re.fullmatch(pattern, text)
    if found is None:
        raise files.ResultsError(f"settings: found {text!r}, expected a name as {pattern}; measure again")
    return tuple(map(int, found.groups()))


def limits_of(forms: Sequence[dict[str, Any]], dtype: str) -> list[launch.Limit]:
    """For each form and shape the most tokens up to which it was never slower than product and columns; else 0."""
    found: dict[tuple[str, int, int], int] = {}
    stopped = set()
    for row in sorted(forms, key=lambda row: row["m"]):
        key = launch.form(row["at_input"], row["rows"]), row["n"], row["k"]
        found.setdefault(key, 0)
        if row["best us"] > row["columns us"]:
            stopped.add(key)
        elif key not in stopped:
            found[key] = row["m"]
    return [launch.Limit(op, (dtype,), n, k, m) for (op, n, k), m in found.items()]
