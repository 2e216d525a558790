"""Progress of work that takes long, with rate and time left: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
from datetime import timedelta
from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

#: Where there is no terminal, a line is written when so many seconds went by without one, whatever was being done.
EVERY = 30.0

_last_line: float | None = None


class Progress:
    """A context manager; ``advance`` moves it. Shown on standard error, so that results can be piped.

    Args:
        what: what is being done. total: how many units, None if that is not known yet. unit: what they are called.
        show: True (a bar) or False (nothing); by default a bar on a terminal, and lines where there is none.
    """

    def __init__(self, what: str, total: int | None, unit: str, show: bool | None = None):
        terminal = sys.stderr.isatty()
        self._lines = show is None and not terminal
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
            disable=not (terminal if show is None else show),
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
        rate = f"{speed:.1f} {self._unit or 'units'}/s" if speed else ""
        self._bar.update(self._task, rate=f"{rate}, {note}" if rate and note else rate or note)
        if total is not None:
            self._bar.update(self._task, total=total)
        if self._lines:
            self._write_line()

    def _write_line(self) -> None:
        global _last_line  # of the process: a search has many stages, each shorter than the time between lines
        if _last_line is None or monotonic() - _last_line < EVERY:
            return
        _last_line = monotonic()
        task = self._bar.tasks[0]
        parts = [f"{task.completed:.0f}" if task.total is None else f"{task.completed:.0f} of {task.total:.0f}"]
        parts[0] = f"{parts[0]} {self._unit}".rstrip()
        if task.fields["rate"].strip():
            parts.append(task.fields["rate"])
        if task.time_remaining:
            parts.append(f"{timedelta(seconds=round(task.time_remaining))} left")
        print(f"{task.description}: {', '.join(parts)}", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        global _last_line
        if _last_line is None:
            _last_line = monotonic()
        self._bar.start()
        return self

    def __exit__(self, *error) -> None:
        self._bar.stop()
