"""The tables of ``--help`` with everything whole at 80 columns: typer's own cut what is longer than its column."""

from __future__ import annotations

from typing import Any

import typer.rich_utils
from rich.columns import Columns
from rich.console import Group
from rich.table import Table
from rich.text import Text


class HelpTable(Table):
    """Of options: "--no-..." stands under its option, names are never broken, and other words only if they must be."""

    def add_row(self, *cells: Any, **options: Any) -> None:
        if len(cells) > 5:  # of a command's there are two
            *required, long, short, no_long, no_short, types, about = cells
            names = [Text("\n").join(part for part in pair if part) for pair in ((long, no_long), (short, no_short))]
            cells = (*required, *names, types, Group(*about.renderables) if isinstance(about, Columns) else about)
        super().add_row(*cells, **options)
        for column in self.columns:
            column.overflow = "fold"
        for column in self.columns[:-2]:  # the last two are an option's type and what it is
            column.no_wrap = True


def install() -> None:
    """Has typer draw with it; there is no setting for that."""
    typer.rich_utils.Table = HelpTable  # type: ignore[misc]
