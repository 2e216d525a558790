"""What chosen candidates do to data that nothing was chosen by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..baselines.arm import Candidate
from ..statistics.intervals import mcnemar, mean_interval, share_interval
from .scorer import Scorer
from .search import Step, no_bars, outcome_of


@dataclass(frozen=True)
class HeldOut:
    """One steering on the test part.

    Attributes:
        name: for people. method, detail, site, operation, k: the arm's. alpha: the strength, one a site where they
            differ. layers: how many layers it touches.
        effect: mean change of the log-odds of the wanted option, nats. low, high: its 95 % interval over groups of
            items; None where there is one group only. share: share of items that moved the wanted way.
        accuracy: share of items whose wanted option is the likeliest, with Wilson's 95 % interval.
        p: McNemar's exact test of the accuracy against unsteered.
        kl, rise: KL(unsteered || steered) and rise of the cross-entropy on held-out neutral text, nats a token.
        behind: mean of the first row's effect minus this one's, item by item, with its interval; None in the first.
    """

    name: str
    method: str
    detail: str
    site: str
    operation: str
    k: int
    alpha: float | dict[str, float]
    layers: int
    effect: float
    low: float | None
    high: float | None
    share: float
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    p: float
    kl: float
    rise: float
    behind: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Unsteered:
    """The model as it is, on the test part: mean log-odds of the wanted option (nats), and accuracy with interval."""

    log_odds: float
    accuracy: float
    accuracy_low: float
    accuracy_high: float


def hold_out(scorer: Scorer, candidates: Sequence[Candidate], step: Step = no_bars) -> tuple[Unsteered, list[HeldOut]]:
    """Scores candidates on all items and neutral texts of a scorer; the first is what the others are set against."""
    items = range(len(scorer.task))
    groups = [item.group for item in scorer.task]
    with step(f"{len(candidates)} settings on held-out items", len(items) * (len(candidates) + 1)) as advance:
        base = scorer.base(items, advance)
        scores = scorer.scores(candidates, items, advance)
    with step("held-out neutral text", len(candidates)) as advance:
        side_effects = scorer.side_effects(candidates)
        advance(len(candidates))
    changes = scores.margin - base.margin
    found = []
    for number, (candidate, (kl, rise)) in enumerate(zip(candidates, side_effects)):
        arm, change, correct = candidate.arm, changes[number], scores.correct[number]
        accuracy_low, accuracy_high = share_interval(int(correct.sum()), len(items))
        behind = None
        if number and len(set(groups)) > 1:
            lead = changes[0] - change
            behind = (float(lead.mean()), *mean_interval(lead, groups))
        found.append(
            HeldOut(
                name=arm.name,
                **outcome_of(candidate, change, groups),
                layers=len(arm.plan.layer[: arm.k].unique()),
                accuracy=float(correct.double().mean()),
                accuracy_low=accuracy_low,
                accuracy_high=accuracy_high,
                p=mcnemar(base.correct[0], correct),
                kl=kl,
                rise=rise,
                behind=behind,
            )
        )
    hits = int(base.correct[0].sum())
    unsteered = Unsteered(float(base.margin.mean()), hits / len(items), *share_interval(hits, len(items)))
    return unsteered, found
