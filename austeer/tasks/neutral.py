"""The packaged neutral texts: what steering towards something else should leave as it is."""

from __future__ import annotations

import json
from importlib.resources import files


def neutral_texts(part: str = "selection") -> list[str]:
    """Short encyclopaedic paragraphs.

    Args:
        part: "selection", for what is chosen; "heldout", for what is reported.
    """
    lines = (files("austeer") / "data" / "neutral.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["text"] for row in map(json.loads, lines) if row["split"] == part]
