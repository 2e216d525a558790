"""What all ways of steering a site have in common; each has a file of its own: fold, bias, columns, fused, dense."""

from __future__ import annotations

from torch import nn

from ..models.sites import Site
from .tables import StrengthTable


class Path:
    """One steered site. ``attach`` and ``detach`` are exact opposites.

    ``detach`` may be called at any time, also after an ``attach`` that was broken off, and again.

    Attributes:
        site, table: what is steered and how strongly. tables: all of them; a second one only where plans with and
            without magnitude meet.
        module: the module that is changed.
        calls: how often it ran in eager mode; None where that is not counted (fold, bias).
        traced: whether it became part of a compiled graph.
    """

    name: str

    def __init__(self, site: Site, table: StrengthTable, module: nn.Module):
        self.site, self.table, self.module = site, table, module
        self.tables: tuple[StrengthTable, ...] = (table,)
        self.calls: int | None = 0
        self.traced = False

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """All modules that are changed."""
        return (self.module,)

    @property
    def tokens(self) -> int | None:
        """How many tokens it steered in eager mode, padding included; None where that is not counted."""
        return None

    def attach(self) -> None:
        raise TypeError(f"{type(self).__name__} is abstract")

    def detach(self) -> None:
        raise TypeError(f"{type(self).__name__} is abstract")
