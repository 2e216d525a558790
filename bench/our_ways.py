"""This library's paths, as ways that are checked and timed beside others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn

import austeer
from austeer import Plan, SteeringError

from .steered import Steered, UnavailableError, Way


class Ours(Steered):
    """``austeer.steer`` with one path for all layers."""

    def __init__(self, mode: str, model: nn.Module, plan: Plan, alpha: float):
        super().__init__(model)
        try:
            self.steering = austeer.steer(model, plan, alpha, mode=mode, check=False).attach()
        except SteeringError as error:
            raise UnavailableError(str(error)) from error

    def close(self) -> None:
        self.steering.detach()


class Fold(Ours):
    """The weights, which other models share, are edited only while this one runs."""

    def __init__(self, model: nn.Module, plan: Plan, alpha: float):
        super().__init__("fold", model, plan, alpha)
        self._alpha = alpha
        self.steering.alpha = 0

    @contextmanager
    def active(self) -> Iterator[None]:
        self.steering.alpha = self._alpha
        try:
            yield
        finally:
            self.steering.alpha = 0


WAYS = (
    *(Way(mode, partial(Ours, mode), ours=True) for mode in ("columns", "fused")),
    Way("fold", Fold, ours=True),
)
