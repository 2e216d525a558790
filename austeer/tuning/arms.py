"""What a search chooses among: arms (a method's plan with a number of AUs), and arms at a strength."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import nn

from ..momentum import Momentum
from ..pairs import Pairs
from ..plan import Plan


@dataclass(frozen=True)
class Material:
    """What methods make their plans from: the pairs that were measured, and what was measured on them.

    Attributes:
        pairs: those that ``momentum`` was counted on, for methods that need more than counters.
    """

    model: nn.Module
    tokenizer: object
    pairs: Pairs
    momentum: Momentum


@dataclass(frozen=True)
class Arm:
    """A plan of which the first k AUs are used; its strength is not chosen yet.

    Attributes:
        method: "momentum", or a baseline's name. plan: nested: several arms may share one, each with its k.
        detail: what tells arms of one method, site, operation and k apart, for example "layer 12" or "seed 1".
    """

    method: str
    plan: Plan
    k: int
    detail: str = ""

    @cached_property
    def site(self) -> str:
        return "+".join(self.plan.sites)

    @property
    def operation(self) -> str:
        return self.plan.operation

    @cached_property
    def name(self) -> str:
        detail = f", {self.detail}" if self.detail else ""
        return f"{self.method}: {self.operation} of {self.k} at {self.site}{detail}"
