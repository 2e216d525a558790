"""Mergeable counters of activation momentum, and what statistics need to know of a measurement."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(eq=False)
class Counters:
    """The counters of one site; all [layers measured, width].

    Attributes:
        positive, negative: int64, in how many pairs the AU was larger on the positive (negative) text.
        delta_sum, delta_square_sum: float64, sums of m and m * m, where m = positive - negative activation.
    """

    positive: Tensor
    negative: Tensor
    delta_sum: Tensor
    delta_square_sum: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return dict(vars(self))

    def __add__(self, other: Counters) -> Counters:
        return Counters(*(a + b for a, b in zip(self.tensors().values(), other.tensors().values())))

    def __sub__(self, part: Counters) -> Counters:
        """The counters of all pairs but those of ``part``; sums are 0, and not nearly so, where no pair is left."""
        positive, negative, *sums = (a - b for a, b in zip(self.tensors().values(), part.tensors().values()))
        none = (positive == 0) & (negative == 0)
        return Counters(positive, negative, *(t.masked_fill(none, 0.0) for t in sums))


def effect_of(site: str) -> str:
    """The name under which the counters of the effects of a site's AUs are kept beside those of the site."""
    return f"{site}.effect"


def tensors_of(sites: Mapping[str, Counters], half: Mapping[str, Counters] | None = None) -> dict[str, Tensor]:
    """All counters by ``SITE.NAME``, and those of a half by ``half.SITE.NAME``, as files hold them."""
    found = {f"{site}.{name}": t for site, c in sites.items() for name, t in c.tensors().items()}
    return found | {f"half.{name}": t for name, t in tensors_of(half).items()} if half else found


def counters_from(tensors: Mapping[str, Tensor], sites: Iterable[str], half: bool = False) -> dict[str, Counters]:
    """The counters of some sites, or of their halves, from :func:`tensors_of`; raises KeyError where one is missing."""
    names, prefix = Counters.__dataclass_fields__, "half." if half else ""
    return {site: Counters(**{name: tensors[f"{prefix}{site}.{name}"] for name in names}) for site in sites}


class Counted(Protocol):
    """Counters of some sites over one set of pairs; :class:`austeer.Momentum` is one."""

    @property
    def pairs(self) -> int:
        """How many pairs were counted."""

    @property
    def identical(self) -> int:
        """How many of them have two texts of the same tokens."""

    def counters(self, site: str) -> Counters:
        """The counters of a site; raises SelectionError if it was not measured."""

    def halves(self) -> tuple[Counted, Counted]:
        """The same of two disjoint halves of the pairs; raises SelectionError where they are not known."""
