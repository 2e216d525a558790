"""What the benchmarks print: progress on stderr; results on stdout, as the sections of the published page."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import Markdown, TableElement

from austeer.utils.tables import NARROW, console, fitting

#: Set where the output is to be JSON alone.
quiet = False


def say(text: str) -> None:
    """A line of progress."""
    if not quiet:
        print(text, file=sys.stderr, flush=True)


class _WholeTable(TableElement):
    """A table that keeps every name and value whole; a column with a cell longer than a value's is one of words."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        assert self.header is not None and self.header.row is not None
        headings = [cell.content.plain for cell in self.header.row.cells]
        rows = [[cell.content for cell in row.cells] for row in (self.body.rows if self.body else ())]
        words = {at for row in rows for at, cell in enumerate(row) if cell.cell_len > NARROW + 4}
        for number, part in enumerate(fitting(headings, rows, options.max_width, prose=words)):
            if number:
                yield ""
            yield part


class _Page(Markdown):
    elements: ClassVar = {**Markdown.elements, "table_open": _WholeTable}


def show_markdown(text: str, on: Console = console) -> None:
    """Prints Markdown as wide as the terminal is, or 80 characters where there is none."""
    on.print(_Page(text), soft_wrap=False)


def show(path: Path, content: dict[str, Any]) -> None:
    """A result, without figures."""
    from .published.efficiency import section
    from .published.load import Result

    text = section(Result(path, path.parent.name, content["kind"], ("", 1), content))
    show_markdown(re.sub(r"^!\[.*\n\n?", "", text, flags=re.M))
    if content.get("quick"):
        console.print("[bold]--quick: these times mean nothing[/]")
