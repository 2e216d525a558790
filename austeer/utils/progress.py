"""A progress bar with rate and time left, for work that takes long."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """A context manager; ``advance`` moves it. Shown on standard error, so that results can be piped.

    Args:
        what: what is being done. total: how many units, None if that is not known yet. unit: what they are called.
        show: True or False; by default it is shown if standard error is a terminal.
    """

    def __init__(self, what: str, total: int | None, unit: str, show: bool | None = None):
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True, force_terminal=show or None),
            disable=not (sys.stderr.isatty() if show is None else show),
            transient=True,
        )
        self._unit = unit
        self._task = self._bar.add_task(what, total=total, rate="")

    def advance(self, by: int = 1, note: str = "", total: int | None = None) -> None:
        """Moves on by so many units.

        Args:
            note: shown behind the rate. total: a better estimate of all units, if there is one.
        """
        self._bar.advance(self._task, by)
        speed = self._bar.tasks[0].finished_speed or self._bar.tasks[0].speed
        rate = f"{speed:.1f} {self._unit}/s" if speed else ""
        self._bar.update(self._task, rate=f"{rate}, {note}" if rate and note else rate or note)
        if total is not None:
            self._bar.update(self._task, total=total)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *error) -> None:
        self._bar.stop()
