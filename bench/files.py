"""Result files: one JSON a measurement, in a folder for each device, with what it was measured on; written and read."""

from __future__ import annotations

import datetime
import json
import math
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from austeer.errors import AusteerError
from austeer.utils.environment import environment
from austeer.utils.files import write_text

ROOT = Path(__file__).resolve().parents[1]

#: What a file of a kind must have. "kernels" is pytest-benchmark's own (``--benchmark-json``), and names no kind.
KEYS: dict[str, tuple[str, ...]] = {
    "demo": ("model", "pairs", "held_out", "generations", "timings", "environment"),
    "host": ("batches", "sites", "rounds", "environment"),
    "momentum": ("sets", "memory", "offloaded", "large", "kernel", "rounds", "environment"),
    "dispatch": ("rows", "ceilings", "dtype", "environment"),
    "settings": ("forms", "sparse us", "counting", "dtype", "environment"),
    "plans": ("operation", "models", "batch", "rounds", "environment"),
    "inference": ("schema", "model", "settings", "complete", "series", "cases", "environment"),
    "kernels": ("benchmarks", "commit_info", "datetime"),
    "gpu": ("schema", "settings", "parts", "environment"),
    "serving": ("model", "rows", "environment"),
    "served": ("model", "batches", "rounds", "environment"),
    "study": ("model", "methods", "tasks", "trials", "goals", "pairs", "texts", "doses", "seconds", "environment"),
}
SCHEMAS = {"inference": 1, "gpu": 1}


class ResultsError(AusteerError):
    """A result, or a place where one is published, that is not as it has to be."""


def device_slug(device: torch.device) -> str:
    """The device's name for files: ``nvidia-h100-80gb-hbm3``; ``cpu`` for any CPU."""
    return slug(torch.cuda.get_device_name(device)) if device.type == "cuda" else device.type


def slug(name: str) -> str:
    """A device's name in lower-case letters, digits and single hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def new_file(out: Path, device: torch.device, kind: str) -> Path:
    """``<out>/<device>/<kind>-<date>.json``, with a number behind it where that exists: results are never replaced."""
    stem = f"{kind}-{datetime.date.today().isoformat()}"
    names = (stem if number == 1 else f"{stem}-{number}" for number in range(1, 1000))
    return next(p for p in (out / device_slug(device) / f"{name}.json" for name in names) if not p.exists())


def about(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """What a result was measured on, and with which code and command.

    Args:
        commit: the code's commit, where this copy of it has no git folder.
    """
    found: dict[str, Any] = environment()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda or torch.version.hip,
        }
    return found | {
        "system": platform.platform(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or git_commit(),
        "command": " ".join(["python", *sys.orig_argv[1:]]),
    }


def git_commit() -> str | None:
    """The commit of this checkout, with ``-dirty`` behind it where tracked files differ; None outside git."""
    tracked = ["ls-files", "--error-unmatch", "bench/files.py"]  # an installed copy may lie in another's git
    options: dict[str, Any] = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 30, "check": True}
    try:
        subprocess.run(["git", *tracked], **options)
        done = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], **options)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def dumps(content: dict[str, Any]) -> str:
    """JSON with six digits a number, and each innermost object on one line: a result is read as a difference in git."""
    text = json.dumps(_rounded(content), indent=1, allow_nan=False)
    return re.sub(r"\{[^{}\[\]]*\}", lambda found: re.sub(r"\n\s*", " ", found.group()), text)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(one) for one in value]
    if isinstance(value, float):
        # JSON has no infinity, and a wrong way may err by it.
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def write(path: Path, content: dict[str, Any]) -> None:
    """Writes a result, in place of what an earlier call of the same run wrote."""
    write_text(path, dumps(content) + "\n")


def read(path: Path, kind: str) -> dict[str, Any]:
    """The content of a result file, checked for what reports and comparisons need of it.

    Raises:
        ResultsError: no such file, no JSON, another kind or schema, or parts missing.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResultsError(
            f"{path}: cannot be read as JSON ({error}); measure again, or restore it from git"
        ) from error
    found = content.get("kind", kind) if isinstance(content, dict) else type(content).__name__
    if found != kind or not isinstance(content, dict):
        raise ResultsError(
            f"{path}: found a result of kind {found!r}, expected {kind!r}; give one of that kind, or name it as "
            "what it is"
        )
    missing = [key for key in KEYS[kind] if key not in content]
    if missing:
        raise ResultsError(
            f"{path}: found no {', '.join(missing)}, expected {', '.join(KEYS[kind])} in a result of kind {kind!r}; "
            "measure again with this version"
        )
    if kind in SCHEMAS and content["schema"] != SCHEMAS[kind]:
        raise ResultsError(
            f"{path}: found schema {content['schema']!r}, expected {SCHEMAS[kind]}; measure again with this version"
        )
    return content
