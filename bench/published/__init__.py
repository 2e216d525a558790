"""Writes what is published of the results: docs/efficiency.md, its figures, and all measured numbers of other pages."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path

from ..files import ResultsError
from . import figures, numbers
from .load import load
from .spans import fill

#: docs/efficiency.md is made of this as a whole; other pages are written by hand, but for their spans.
FRAME = Path(__file__).with_name("efficiency.md")
MADE = '<!-- Made by "austeer bench report" from bench/results and bench/published/efficiency.md: edit those. -->\n\n'

__all__ = ["ResultsError", "write"]


def write(results: Path, docs: Path, readme: Path, check: bool = False) -> list[str]:
    """Brings the pages and figures up to the results.

    Args:
        results: the folder of results, a folder for each device in it. docs: the folder of pages, and of ``figures``.
        check: change nothing, only say what has drifted.

    Returns:
        One line for each file that was changed, or would have to be; none when all is as it should be.

    Raises:
        AusteerError: a result or a span that cannot be read, or matplotlib is not installed.
    """
    found = load(results)
    values = numbers.values(found)
    pages = {docs / FRAME.name: MADE + fill(_read(FRAME), values, str(FRAME), "../", keep=False)}
    for path in sorted({*docs.glob("*.md"), readme} - set(pages)):
        pages[path] = fill(_read(path), values, str(path), "" if path == readme else "../")
    changed = []
    for path, text in pages.items():
        old = _read(path) if path.exists() else None
        if old == text:
            continue
        changed.append(f"{path}: {_first_difference(old, text)}")
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return changed + figures.write(figures.figures(found), docs / "figures", check)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ResultsError(f"{path}: cannot be read ({error.strerror}), expected a page of the repository") from error


def _first_difference(old: str | None, new: str) -> str:
    lines = zip_longest((old or "").splitlines(), new.splitlines(), fillvalue="")
    number, (a, b) = next(((i, pair) for i, pair in enumerate(lines, 1) if pair[0] != pair[1]), (0, ("", "")))
    return "is missing" if old is None else f"line {number} differs from the results: found {a!r}, expected {b!r}"
