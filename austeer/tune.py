"""Choosing site, operation, k and alpha on pairs that were not measured, under a limit on the side effect."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from scipy import stats
from torch import Tensor, nn

from .momentum import Momentum
from .pairs import Pairs
from .plan import Plan
from .steering import steer
from .tasks import cross_entropy, log_odds

#: The weakest and the strongest alpha that is tried.
WEAKEST, STRONGEST = 0.125, 32.0


@dataclass(frozen=True)
class Trial:
    """One setting and what it did.

    Attributes:
        effect: mean change of log-odds (positive over negative continuation) from unsteered, nats.
        share: share of pairs whose log-odds rose.
        side_effect: rise of the cross-entropy on neutral text, nats a token.
    """

    site: str
    operation: str
    k: int
    alpha: float
    effect: float
    share: float
    side_effect: float

    def plan(self, momentum: Momentum) -> Plan:
        return momentum.select(self.site, k=self.k, operation=self.operation)


class Scorer:
    """Scores steerings of one model against the unsteered model, whose own scores are taken once.

    Args:
        pairs: prompts with a wanted and an unwanted continuation. neutral: texts that should not change.
    """

    def __init__(self, model: nn.Module, tokenizer, pairs: Pairs, neutral: Sequence[str]):
        self.model, self.tokenizer, self.pairs, self.neutral = model, tokenizer, pairs, neutral
        self.base_log_odds = log_odds(model, tokenizer, pairs)
        self.base_cross_entropy = cross_entropy(model, tokenizer, neutral)

    def side_effect(self, plan: Plan, alpha: float) -> float:
        """Rise of the cross-entropy on neutral text, nats a token."""
        with steer(self.model, plan, alpha):
            return cross_entropy(self.model, self.tokenizer, self.neutral) - self.base_cross_entropy

    def change(self, plan: Plan, alpha: float) -> Tensor:
        """Change of each pair's log-odds, nats: float64 [pairs]."""
        with steer(self.model, plan, alpha):
            return log_odds(self.model, self.tokenizer, self.pairs) - self.base_log_odds


def search(
    scorer: Scorer,
    momentum: Momentum,
    *,
    sites: Iterable[str],
    operations: Iterable[str],
    ks: Iterable[int],
    max_side_effect: float,
    on_series: Callable[[], None] = lambda: None,
) -> list[Trial]:
    """Tries a grid of sites, operations and k with a series of strengths each; every setting within the limit.

    A series doubles alpha from 1 until the side effect passes the limit (a stronger one would only break more) or the
    effect falls, or halves it until the side effect is within. ``on_series`` is called after each. In the end the best
    setting of each operation is also tried with alpha times sqrt(2), between two steps of its series.
    """
    trials: list[Trial] = []
    ks, operations = tuple(ks), tuple(operations)
    for site in sites:
        for operation in operations:
            for k in ks:
                plan = momentum.select(site, k=k, operation=operation)
                _series(partial(_try, scorer, plan, max_side_effect, trials))
                on_series()
    for operation in operations:
        top = best(trials, operation=operation)
        if top is not None and top.alpha < STRONGEST:
            _try(scorer, top.plan(momentum), max_side_effect, trials, top.alpha * 2**0.5)
    return trials


def _series(attempt: Callable[[float], Trial | None]) -> None:
    alpha = 1.0
    last = attempt(alpha)
    if last is None:
        while last is None and alpha > WEAKEST:
            alpha /= 2
            last = attempt(alpha)
        return
    while alpha < STRONGEST:
        alpha *= 2
        trial = attempt(alpha)
        if trial is None or trial.effect < last.effect:
            return
        last = trial


def _try(scorer: Scorer, plan: Plan, max_side_effect: float, trials: list[Trial], alpha: float) -> Trial | None:
    """Adds a trial and gives it, if the side effect is within the limit (NaN is not)."""
    side_effect = scorer.side_effect(plan, alpha)
    if not side_effect <= max_side_effect:
        return None
    change = scorer.change(plan, alpha)
    share = float((change > 0).double().mean())
    trials.append(Trial(plan.site[0], plan.operation, len(plan), alpha, float(change.mean()), share, side_effect))
    return trials[-1]


def best(trials: Iterable[Trial], **fixed: object) -> Trial | None:
    """The trial of largest effect among those with the given fields, for example ``operation="scale"``."""
    fitting = [t for t in trials if all(getattr(t, name) == value for name, value in fixed.items())]
    return max(fitting, key=lambda t: t.effect, default=None)


def top_overlap(first: Momentum, second: Momentum, site: str, k: int) -> float:
    """Share of the top k AUs of ``first`` that are also in the top k of ``second``: how stable a ranking is."""
    a, b = (set(m.select(site, k=k).keys()) for m in (first, second))
    return len(a & b) / k


def mean_interval(values: Tensor, groups: Sequence[str], level: float = 0.95) -> tuple[float, float]:
    """A confidence interval of the mean when values of one group are alike (Student's t over the groups' means).

    Args:
        values: [n]. groups: the group of each value, for example a pair's topic; at least two different ones.
    """
    members: dict[str, list[float]] = {}
    for value, group in zip(values.tolist(), groups, strict=True):
        members.setdefault(group, []).append(value)
    means = torch.tensor([sum(m) / len(m) for m in members.values()], dtype=torch.float64)
    error = float(means.std()) / len(means) ** 0.5
    reach = float(stats.t.ppf((1 + level) / 2, len(means) - 1)) * error
    return float(means.mean()) - reach, float(means.mean()) + reach
