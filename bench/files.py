"""Result files: one JSON a measurement, in a folder for each device, with what it was measured on."""

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

from austeer.utils.environment import environment

ROOT = Path(__file__).resolve().parents[1]


def device_slug(device: torch.device) -> str:
    """The device's name for files: ``nvidia-h100-80gb-hbm3``; ``cpu`` for any CPU."""
    if device.type != "cuda":
        return device.type
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


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
    tracked = ["git", "ls-files", "--error-unmatch", "bench/files.py"]  # an installed copy may lie in another's git
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        subprocess.run(tracked, cwd=ROOT, capture_output=True, timeout=30, check=True)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
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
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    new.write_text(dumps(content) + "\n", encoding="utf-8")
    new.replace(path)  # an interrupted write leaves the earlier one whole
