"""What a search chooses among: arms (a method's plan with a number of AUs), and arms at a strength."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from ..errors import SelectionError
from ..momentum.momentum import Momentum
from ..momentum.profile import Profile
from ..pairs.pairs import Pairs
from ..plans.plan import Plan


@dataclass(frozen=True)
class Material:
    """What methods make their plans from: the pairs that were measured, and what was measured on them.

    Attributes:
        pairs: those that ``momentum`` was counted on, for methods that need more than counters.
        profile: of the model's side effects, for methods that weigh effects by them.
    """

    model: nn.Module
    tokenizer: object
    pairs: Pairs
    momentum: Momentum
    profile: Profile | None = None

    def expect_effects(self, method: str, sites: Iterable[str]) -> None:
        """Raises SelectionError where the momentum has no effects, or none at one of the sites."""
        if self.momentum.effects is None:
            raise SelectionError(
                f"method {method!r}: found momentum without effects, expected one of measure(..., effects=True); "
                "measure again (austeer measure --effects)"
            )
        for site in sites:
            self.momentum.counters(site)

    def with_profile(self, method: str) -> Profile:
        """The profile, for a method that needs one and effects.

        Raises:
            SelectionError: one of them is missing, or the profile is of another model.
        """
        self.expect_effects(method, ())
        if self.profile is None:
            raise SelectionError(
                f"method {method!r}: found no side-effect profile, expected the model's: profile(model, tokenizer), or "
                "austeer profile --model ..."
            )
        self.profile.check(self.momentum.model)
        return self.profile


@dataclass(frozen=True, eq=False)
class Arm:
    """A plan of which the first k AUs are used; its strength is not chosen yet.

    Attributes:
        method: "momentum", or a baseline's name. plan: nested: several arms may share one, each with its k.
        detail: what tells arms of one method, site, operation and k apart, for example "layer 12" or "seed 1".
        weights: of a plan for several sites, what each site's alpha is for an arm's alpha of 1.
    """

    method: str
    plan: Plan
    k: int
    detail: str = ""
    weights: Mapping[str, float] | None = None

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

    @cached_property
    def digest(self) -> str:
        """Tells arms apart that steer differently."""
        plan = self.plan.top(self.k)
        found = hashlib.sha256(f"{plan.operation} {plan.site} {sorted((self.weights or {}).items())}".encode())
        for tensor in (plan.layer, plan.index, plan.beta, plan.delta):
            found.update(tensor.contiguous().numpy().data)
        return found.hexdigest()[:20]

    def strength(self, alpha: float) -> float | dict[str, float]:
        """The alpha to steer with."""
        return alpha if self.weights is None else {site: alpha * weight for site, weight in self.weights.items()}


@dataclass(frozen=True)
class Candidate:
    """An arm at a strength."""

    arm: Arm
    alpha: float

    @property
    def key(self) -> str:
        return f"{self.arm.digest} {self.alpha!r}"

    @property
    def strength(self) -> float | dict[str, float]:
        return self.arm.strength(self.alpha)
