"""What a measurement was taken on: device and versions, for every result file."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("austeer", "torch", "triton", "transformers", "accelerate", "numpy")


def environment() -> dict[str, object]:
    """Device name, threads, and the versions of Python and of the packages that matter (None: not installed)."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": versions_of(PACKAGES),
    }


def versions_of(names: Iterable[str]) -> dict[str, str | None]:
    """Of installed packages, by name; None: not installed."""
    # torch's own version also tells the build (+cpu, +cu130), which its metadata may leave out
    return {name: str(torch.__version__) if name == "torch" else _version(name) for name in names}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
