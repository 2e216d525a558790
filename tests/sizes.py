"""Holds the sizes of the code: no function over 80 lines without its docstring, no file over 400 lines.

Run by ``make lint``.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

FUNCTION, FILE = 80, 400
FOLDERS = ("austeer", "kernels", "bench", "tests")


def too_long(path: Path) -> Iterator[str]:
    """What is too long in a file, a line each, with its place."""
    text = path.read_text(encoding="utf-8")
    lines = len(text.splitlines())
    if lines > FILE:
        yield f"{path}:1: found {lines} lines, expected at most {FILE}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = _lines(node) - (_lines(node.body[0]) if ast.get_docstring(node, clean=False) else 0)
            if lines > FUNCTION:
                yield f"{path}:{node.lineno}: found {lines} lines in {node.name}, expected at most {FUNCTION}"


def _lines(node: ast.stmt) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


if __name__ == "__main__":
    found = [line for folder in FOLDERS for path in sorted(Path(folder).rglob("*.py")) for line in too_long(path)]
    print("\n".join(found) or "sizes: all within limits")
    sys.exit(bool(found))
