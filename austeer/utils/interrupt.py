"""Ctrl-C and termination, put off until a good moment."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class MeasurementInterrupted(KeyboardInterrupt):
    """The measurement was interrupted; its checkpoint holds what was counted. The message says how to go on."""


class Interruption:
    """A context in which the first SIGINT or SIGTERM only sets ``asked``; a second one interrupts at once.

    In a thread other than the main one, where Python allows no handlers, and with ``active=False``, nothing is changed.
    """

    def __init__(self, active: bool = True) -> None:
        self.asked = False
        self._active = active
        self._before: dict[int, object] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __enter__(self) -> Interruption:
        if self._active and threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before.clear()
