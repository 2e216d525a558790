"""Whose turn it is to run a model of which one pass at a time can be steered."""

from __future__ import annotations

import sys
import threading

from .errors import SteeringError

#: In place of a frame: held until it is given back, whatever happens inside.
_SURE = 0


class Turn:
    """One thread at a time; held by a whole ``generate``, or by one forward pass.

    A forward pass that fails cannot give its turn back, so another thread may take it once that pass's frame is gone.
    """

    def __init__(self) -> None:
        # A dictionary, because its setdefault is atomic and, unlike a lock, it can be copied with a model.
        self._holder: dict[str, tuple[int, int]] = {}

    def take_for_generate(self) -> bool:
        """Whether it has to be given back: not if this thread has it for another ``generate`` around this one.

        Raises:
            SteeringError: another thread is running the model.
        """
        return self._take(_SURE)

    def take_for_forward(self) -> bool:
        """The same for one forward pass; to be called from inside accelerate's ``new_forward``."""
        frame = sys._getframe()
        while frame.f_back is not None and frame.f_code.co_name != "new_forward":
            frame = frame.f_back
        return self._take(id(frame))

    def give_back(self) -> None:
        self._holder.clear()

    def _take(self, frame: int) -> bool:
        mine = (threading.get_ident(), frame)
        found = self._holder.setdefault("turn", mine)
        if found is mine:
            return True
        thread, held_by = found
        if thread == mine[0] and held_by == _SURE:
            return False
        if thread != mine[0] and (held_by == _SURE or _is_running(thread, held_by)):
            raise SteeringError(
                "two threads run the model at once, expected one: a scope, or rows with plans of their own, belong to "
                "the forward pass at hand; use one plan with scope='all', or a lock"
            )
        self._holder["turn"] = mine  # what was there is left of a pass that failed
        return True


def _is_running(thread: int, frame: int) -> bool:
    found = sys._current_frames().get(thread)
    while found is not None:
        if id(found) == frame:
            return True
        found = found.f_back
    return False
