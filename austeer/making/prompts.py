"""Prompts that a model answers to make pairs: from a file, or those that come with the package."""

from __future__ import annotations

from contextlib import closing
from importlib.resources import as_file, files
from pathlib import Path

from ..errors import PairsError
from ..pairs.readers import open_source
from ..pairs.text_file import TextFile


def read_prompts(source: str | Path | None = None, *, field: str = "prompt", limit: int | None = None) -> list[str]:
    """Prompts, each once, in their order.

    Args:
        source: a text file (``.txt``) with one a line, or whatever :func:`austeer.stream_pairs` reads, with a field of
            that name; None for the package's own: short, of everyday matters, neutral in tone.
        limit: the first so many.

    Raises:
        PairsError: no such file, bytes that are not UTF-8, a row without the field, or no prompt.
    """
    if limit is not None and limit < 1:
        raise PairsError(f"limit: found {limit}, expected at least 1 prompt")
    if source is None:
        with as_file(files("austeer") / "data" / "prompts.jsonl") as path:
            return read_prompts(path, limit=limit)
    if str(source).lower().endswith(".txt"):
        with TextFile(Path(source), "") as file:
            found = [line.strip() for line in file.lines()]
    else:
        found = []
        with closing(open_source(source).read({field})) as rows:
            for place, row in rows:
                prompt = row.get(field)
                if not isinstance(prompt, str) or not prompt.strip():
                    raise PairsError(
                        f"{place}: found {prompt!r:.40} in the field {field!r}, expected text; the row has "
                        f"{', '.join(map(str, row)) or 'no field'} (name the prompt's with --prompt-field)"
                    )
                found.append(prompt)
    prompts = [prompt for prompt in dict.fromkeys(found) if prompt.strip()][:limit]
    if not prompts:
        raise PairsError(f"{source}: found no prompt, expected at least one")
    return prompts
