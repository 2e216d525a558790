"""What chosen candidates do to data that nothing was chosen by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..baselines.arm import Candidate
from ..statistics.intervals import mcnemar, mean_interval, share_interval
from .budget import HELD_OUT, Budget
from .scorer import Scorer
from .search import Step, judged, no_bars, outcome_of
from .writing import Writing


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
        derailed: in what its texts differ too much from the unsteered model's (writing.py); empty if they do not.
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
    derailed: str = ""


@dataclass(frozen=True)
class Unsteered:
    """The model as it is, on the test part: mean log-odds of the wanted option (nats), and accuracy with interval.

    Attributes:
        items: of the test part that all rows were scored on; None in results that did not keep it.
    """

    log_odds: float
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    items: int | None = None


def hold_out(
    scorer: Scorer,
    candidates: Sequence[Candidate],
    step: Step = no_bars,
    budget: Budget | None = None,
    writing: Writing | None = None,
) -> tuple[Unsteered, list[HeldOut]]:
    """Scores candidates on all items and neutral texts of a scorer; the first is what the others are set against.

    Args:
        budget: where it is nearly over, as many of the items as it leaves time for, and at least a few.
        writing: what the candidates write; the rows say which of them derail.
    """
    budget = Budget() if budget is None else budget
    with step("held-out neutral text", len(candidates)) as advance:
        texts = _texts(scorer, candidates, budget)
        side_effects = scorer.side_effects(candidates, texts)
        advance(len(candidates))
    budget.note("held-out neutral texts", texts, len(scorer.neutral))
    everything = [None, *candidates]
    with step(f"{len(candidates)} settings on held-out items", len(scorer.task) * len(everything)) as advance:
        items = sorted(judged(everything, scorer, scorer.order, budget, HELD_OUT, advance))
    budget.note("held-out items", len(items), len(scorer.task))
    base, scores = scorer.base(items), scorer.scores(candidates, items)
    groups = [scorer.task[i].group for i in items]
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
                derailed=writing.settings[number].derailed if writing else "",
            )
        )
    hits = int(base.correct[0].sum())
    unsteered = Unsteered(float(base.margin.mean()), hits / len(items), *share_interval(hits, len(items)), len(items))
    return unsteered, found


def _texts(scorer: Scorer, candidates: Sequence[Candidate], budget: Budget) -> int:
    """How many neutral texts are run: with a budget, as many as half of the time that is left allows, by the first."""
    everything = len(scorer.neutral)
    if budget.seconds is None:
        return everything
    before = budget.spent
    scorer.side_effects(candidates, 1)
    left, took = HELD_OUT * budget.seconds - budget.spent, budget.spent - before
    return min(everything, max(1, int(left / 2 / took))) if took > 0 else everything
