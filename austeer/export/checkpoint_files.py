"""The files of a checkpoint beside its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .edits import ExportError
from .output import RECORD
from .tensors import INDEX

#: Of the files beside the weights, those that belong to the model; params.json is of Mistral's own format.
_ALONG = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken")
_LEFT = ("params.json", "adapter_config.json", RECORD)


def along(folder: Path) -> list[Path]:
    """The files beside the weights that belong to the model."""
    here = (*folder.iterdir(), *(folder / "additional_chat_templates").glob("*.jinja"))
    return sorted(
        file
        for file in here
        if file.is_file()
        and (file.suffix in _ALONG or file.name.startswith(("LICENSE", "NOTICE")))
        and file.name not in _LEFT
        and (file.name == INDEX or not file.name.endswith(".index.json"))
    )


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{path}: could not be read ({error}); copy or download it anew") from error


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
