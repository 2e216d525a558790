"""What the benchmarks print: progress on stderr; results on stdout, as the sections of the published page."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

#: Set where the output is to be JSON alone.
quiet = False


def say(text: str) -> None:
    """A line of progress."""
    if not quiet:
        print(text, file=sys.stderr, flush=True)


def wide_console() -> Console:
    """As wide as the terminal, or wide enough for every table where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=180)


def show(path: Path, content: dict[str, Any]) -> None:
    """A result, without figures."""
    from .published.efficiency import section
    from .published.load import Result

    text = section(Result(path, path.parent.name, content["kind"], ("", 1), content))
    console = wide_console()
    console.print(Markdown(re.sub(r"^!\[.*\n\n?", "", text, flags=re.M)))
    if content.get("quick"):
        console.print("[bold]--quick: these times mean nothing[/]")
