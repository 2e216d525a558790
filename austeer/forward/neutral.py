"""The packaged neutral texts: what steering towards something else should leave as it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files

from ..errors import PairsError
from .tokens import encode

#: What they are called.
PACKAGED = "packaged neutral text"


def neutral_texts(part: str = "selection") -> list[str]:
    """Short encyclopaedic paragraphs.

    Args:
        part: "selection", for what is chosen; "heldout", for what is reported.
    """
    lines = (files("austeer") / "data" / "neutral.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["text"] for row in map(json.loads, lines) if row["split"] == part]


def neutral_ids(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of the texts that have a next token to predict; raises PairsError if none has."""
    ids = [row for row in encode(tokenizer, texts) if len(row) > 1]
    if not ids:
        raise PairsError("neutral text: found no text of at least two tokens")
    return ids
