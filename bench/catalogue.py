"""Every way to steer that can be timed, by name, in the order of tables: plain PyTorch's, ours, other libraries'."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn

import austeer
from austeer import Plan, SteeringError
from austeer.errors import AusteerError
from austeer.models.structure import steered

from . import plain_ways
from .peers.libraries import WAYS as PEERS
from .plain_ways import AGAIN, UNSTEERED
from .steered import Steered, UnavailableError, Way


class Ours(Steered):
    """``austeer.steer`` in one of its modes."""

    def __init__(self, mode: str, model: nn.Module, plan: Plan, alpha: float):
        super().__init__(model)
        try:
            with alone():
                self.steering = austeer.steer(model, plan, alpha, mode=mode, check=False).attach()
        except SteeringError as error:
            raise UnavailableError(str(error)) from error

    def close(self) -> None:
        self.steering.detach()


class InWeights(Ours):
    """What may edit weights, which other models share: on only while this one runs."""

    def __init__(self, mode: str, model: nn.Module, plan: Plan, alpha: float):
        super().__init__(mode, model, plan, alpha)
        self._alpha = alpha
        self.steering.alpha = 0

    @contextmanager
    def active(self) -> Iterator[None]:
        self.steering.alpha = self._alpha
        try:
            yield
        finally:
            self.steering.alpha = 0


@contextmanager
def alone() -> Iterator[None]:
    """As if no twin were steered: weights that twins share are edited only while no other one runs."""
    others = dict(steered)
    steered.clear()
    try:
        yield
    finally:
        steered.update(others)


OURS = (
    *(Way(mode, partial(Ours, mode), ours=True) for mode in ("columns", "fused")),
    *(Way(mode, partial(InWeights, mode), ours=True) for mode in ("fold", "auto")),
)
WAYS = {way.name: way for way in (*plain_ways.WAYS, *OURS, *PEERS)}


def chosen(names: Iterable[str] | None = None) -> dict[str, Way]:
    """The ways of these names, all by default; the unsteered model is always among them, twice.

    Raises:
        AusteerError: an unknown name.
    """
    names = list(WAYS if names is None else names)
    for name in names:
        if name not in WAYS:
            raise AusteerError(f"variants: found {name!r}, expected of: {', '.join(WAYS)}")
    return {name: way for name, way in WAYS.items() if name in (UNSTEERED, AGAIN, *names)}
