"""Work done ahead of its consumer, in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable
from typing import TypeVar

T = TypeVar("T")


def ahead(items: Iterable[T], depth: int = 2) -> Generator[T, None, None]:
    """The items of an iterable, made by a thread up to ``depth`` ahead. Its errors are raised where they are reached.

    The thread ends when the items do, or when the generator is closed: use ``contextlib.closing``, for a traceback
    holds on to one that an error has left.
    """
    ready: queue.Queue[tuple[bool, object]] = queue.Queue(max(depth, 1))
    closed = threading.Event()

    def put(entry: tuple[bool, object]) -> bool:
        while not closed.is_set():
            try:
                ready.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((True, item)):
                    return
            put((False, None))
        except BaseException as error:
            put((False, error))

    thread = threading.Thread(target=work, name="austeer-ahead", daemon=True)
    thread.start()
    try:
        while True:
            more, item = ready.get()
            if not more:
                if item is not None:
                    raise item  # type: ignore[misc]
                return
            yield item  # type: ignore[misc]
    finally:
        closed.set()
        thread.join()
