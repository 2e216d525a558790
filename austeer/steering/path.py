"""What all ways of steering a site have in common; each has a file of its own: fold, bias, columns, fused, dense."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..errors import SteeringError
from ..models.sites import Site
from .tables import Table


class Path:
    """One steered site. ``attach`` and ``detach`` are exact opposites.

    ``detach`` may be called at any time, also after an ``attach`` that was broken off, and again.

    Attributes:
        site, table: what is steered and how strongly. tables: all of them; a second one only where plans with and
            without magnitude meet.
        module: the module that is changed.
        calls: how often it ran in eager mode; None where that is not counted (fold, a bias that stays).
        traced: whether it became part of a compiled graph.
        edit: what it writes into weights or a bias: fold and bias themselves, and of a site that also runs the bias
            that is switched on and off; or None.
    """

    name: str

    def __init__(self, site: Site, table: Table, module: nn.Module):
        self.site, self.table, self.module = site, table, module
        self.tables: tuple[Table, ...] = (table,)
        self.calls: int | None = 0
        self.traced = False
        self.edit: Path | None = None

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """All modules that are changed."""
        return (self.module,)

    @property
    def tokens(self) -> int | None:
        """How many tokens it steered in eager mode, padding included; None where that is not counted."""
        return None

    def edited(self) -> list[tuple[nn.Module, list[str]]]:
        """The modules whose parameters or buffers it changes in place, and their names."""
        return []

    def attach(self) -> None:
        raise TypeError(f"{type(self).__name__} is abstract")

    def refresh(self) -> None:
        """Takes up the strengths that the tables have now, where they are not read at each call."""

    def detach(self) -> None:
        raise TypeError(f"{type(self).__name__} is abstract")


def detach_all(paths: Sequence[Path]) -> list[str]:
    """Undoes all, last first; what could not be is returned, each with the reason."""
    failed = []
    for path in reversed(paths):
        try:
            path.detach()
        except Exception as error:  # one module must not keep the others steered
            failed.append(f"{path.site.path} ({error})")
    return failed


def expect_restored(failed: Sequence[str], paths: Sequence[Path]) -> None:
    """Raises SteeringError where ``detach_all`` has failed."""
    if failed:
        raise SteeringError(f"{len(failed)} of {len(paths)} modules could not be restored: {failed[0]}")
