"""The search: strengths from a limit on the side effect, then successive halving on items, group by group."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor

from ..baselines.arm import Arm, Candidate
from ..errors import TaskError
from ..statistics.intervals import group_interval
from .budget import SEARCH, Budget
from .calibrate import Limit, calibrate, check_limit
from .schedule import ETA, FEWEST, FINAL_TEXTS, FRACTIONS, TEXTS, Schedule, make_schedule
from .scorer import Scorer, slices

#: With a budget, the clock is looked at after so many scores, of a candidate on an item.
AT_ONCE = 128

#: Opens a bar of so many units, and gives what moves it.
Step = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@contextmanager
def no_bars(what: str, total: int) -> Iterator[Callable[[int], None]]:
    yield lambda by: None


@dataclass(frozen=True, eq=False)
class Standing:
    """One candidate, and what it did to the items that it was judged by.

    Attributes:
        fraction: its alpha, as part of the one at which the side effect reaches the limit.
        limit: where that is.
        items: numbers of the items. change: float64 [items], of the log-odds, nats.
    """

    candidate: Candidate
    group: str
    fraction: float
    limit: Limit
    items: tuple[int, ...]
    change: Tensor

    @property
    def effect(self) -> float:
        """Mean change of the log-odds, nats; minus infinity where the model gave no number."""
        mean = float(self.change.mean())
        return mean if math.isfinite(mean) else -math.inf


def outcome_of(candidate: Candidate, change: Tensor, groups: Sequence[str]) -> dict[str, Any]:
    """A candidate's setting, and what it did to items: the columns that tables of trials and of held-out data share.

    Args:
        change: float64 [items], of the log-odds, nats. groups: of the items.
    """
    arm, (low, high) = candidate.arm, group_interval(change, groups)
    return {
        **{name: getattr(arm, name) for name in ("method", "detail", "site", "operation", "k")},
        "alpha": candidate.strength,
        "effect": float(change.mean()),
        "low": low,
        "high": high,
        "share": float((change > 0).double().mean()),
    }


@dataclass(frozen=True)
class SearchResult:
    """Attributes:
    standings: every candidate as it stood when it was last judged, best first among those judged by as many items.
    schedule: what was run.
    """

    standings: list[Standing]
    schedule: Schedule

    def best_of(self, **fixed: object) -> Standing | None:
        """The best among those judged by the most items, of the arms with these attributes; None if there is none."""
        fitting = [s for s in self.standings if all(getattr(s.candidate.arm, n) == v for n, v in fixed.items())]
        return max(fitting, key=lambda s: (len(s.items), s.effect), default=None)

    def best_in(self, group: str) -> Standing:
        """The same of one group, which has to be there."""
        return max((s for s in self.standings if s.group == group), key=lambda s: (len(s.items), s.effect))

    def ranked(self) -> list[Standing]:
        """All of them, best first among those judged by as many items."""
        return sorted(self.standings, key=lambda s: (-len(s.items), -s.effect))

    def best(self) -> Standing:
        """The best of all."""
        return self.ranked()[0]


def search(
    scorer: Scorer,
    arms: Sequence[Arm],
    *,
    group: Callable[[Arm], str],
    max_kl: float,
    budget: Budget | None = None,
    step: Step = no_bars,
) -> SearchResult:
    """Finds the best candidate of each group.

    Every arm is first brought to the limit on the side effect (:func:`calibrate`), so that candidates compare at equal
    side effect. Then all are scored on a few items, the best third of each group on three times as many, and so on. On
    a few neutral texts the limit is a rough one, so those of the last round are brought to it anew on more of them.

    Args:
        max_kl: the limit on KL(unsteered || steered) on the scorer's neutral texts, nats a token.
        budget: by which it is planned. Where it is over nonetheless, the search ends with what it is at, and the
            candidates stand as they are; the budget notes what was left out.

    Raises:
        TaskError: no arm, a limit that is no positive number, a budget too small for one candidate, or no strength of
            any arm within the limit.
    """
    if not arms:
        raise TaskError("search: found no arm, expected at least one; give sites, operations and numbers of AUs")
    check_limit(max_kl)
    budget = Budget() if budget is None else budget
    order, everything = scorer.order, len(arms)
    schedule = _schedule(scorer, [group(arm) for arm in arms], budget, order, step)
    arms = [arms[number] for number in schedule.arms]
    with step("strengths at the limit", len(arms)) as advance:
        limits = calibrate(scorer, arms, max_kl, schedule.texts, **_options(budget, advance))
    remaining = [(arm, fraction) for arm in arms for fraction in schedule.fractions]
    tried = len([arm for arm, _ in remaining if not budget.is_over(SEARCH) or limits[arm.digest].alpha is not None])
    done: list[Standing] = []
    kept: list[Standing] = []
    most = rounds = 0
    for number, size in enumerate(schedule.items):
        last = number == len(schedule.items) - 1
        if last and schedule.final_texts > schedule.texts and not budget.is_over(SEARCH):
            within = [arm for arm, _ in remaining]
            more = _limits_on_more(scorer, within, limits, max_kl, schedule.final_texts, budget, step)
            limits |= {} if budget.is_over(SEARCH) else more
        if number and budget.is_over(SEARCH):
            break
        candidates = [
            (Candidate(arm, limit.alpha * fraction), group(arm), fraction, limit)
            for arm, fraction in remaining
            for limit in [limits[arm.digest]]
            if limit.alpha is not None
        ]
        if not candidates:
            if budget.is_over(SEARCH):
                raise TaskError(
                    f"budget: found {budget.seconds:.0f} s, over before any of {len(arms)} arms was brought within "
                    f"{max_kl:g} nats a token; give more time"
                )
            raise TaskError(
                f"max_kl: no strength of any of {len(arms)} arms stayed within {max_kl:g} nats a token on neutral "
                "text; give a larger limit, or fewer AUs"
            )
        what = f"round {number + 1} of {len(schedule.items)}: {len(candidates)} candidates"
        with step(what, size * len(candidates)) as advance:
            items = judged([c for c, *_ in candidates], scorer, order[:size], budget, SEARCH, advance)
        changes = scorer.changes([c for c, *_ in candidates], items)
        if len(items) < most:
            break  # time was up before they were judged by as many as in the round before: that one counts
        standings = [Standing(*candidate, tuple(items), change) for candidate, change in zip(candidates, changes)]
        standings.sort(key=lambda s: -s.effect)
        done, most, rounds = standings + [s for s in done if s not in kept], len(items), number + 1
        kept = _keep(standings)
        remaining = [(s.candidate.arm, s.fraction) for s in kept]
    budget.note("settings tried", tried, everything * len(FRACTIONS))
    texts = len(scorer.neutral)
    budget.note("neutral texts for the first strengths", schedule.texts, min(texts, TEXTS))
    budget.note("neutral texts for the last strengths", schedule.final_texts, min(texts, FINAL_TEXTS))
    budget.note("rounds", rounds, len(schedule.items))
    budget.note("tuning items that the best were judged by", most, len(order))
    return SearchResult(done, schedule)


def _options(budget: Budget, advance: Callable[[int], None]) -> dict[str, Any]:
    """What :func:`calibrate` is to tell, and when it is to stop."""
    return {"on_arm": lambda: advance(1), "is_over": lambda: budget.is_over(SEARCH)}


def judged(
    candidates: Sequence[Candidate | None],
    scorer: Scorer,
    items: list[int],
    budget: Budget,
    until: float,
    advance: Callable[[int], None],
) -> list[int]:
    """Scores all candidates (None: the unsteered model) on the items.

    Args:
        until: which part of the budget may be gone by then.

    Returns:
        Those items, from the first on, that time was enough for; some at least.
    """
    scored: list[int] = []
    size = len(items) if budget.seconds is None else max(FEWEST, AT_ONCE // len(candidates))
    for part in slices(items, size):
        if scored and budget.is_over(until):
            break
        scorer.scores(candidates, part, advance)
        scored += part
    return scored


def _limits_on_more(
    scorer: Scorer,
    arms: Sequence[Arm],
    limits: dict[str, Limit],
    max_kl: float,
    texts: int,
    budget: Budget,
    step: Step,
) -> dict[str, Limit]:
    """The limits of arms that have one, found again on so many texts."""
    within = {arm.digest: arm for arm in arms if limits[arm.digest].alpha is not None}
    with step(f"strengths at the limit, on {texts} texts", len(within)) as advance:
        return calibrate(
            scorer,
            list(within.values()),
            max_kl,
            texts,
            start=lambda arm: limits[arm.digest].alpha or 1.0,
            **_options(budget, advance),
        )


def _keep(standings: Sequence[Standing]) -> list[Standing]:
    """The best third of each group, one at least; ``standings`` are sorted."""
    sizes = Counter(standing.group for standing in standings)
    place: dict[str, Iterator[int]] = defaultdict(count)
    return [s for s in standings if next(place[s.group]) < math.ceil(sizes[s.group] / ETA)]


def _schedule(scorer: Scorer, groups: list[str], budget: Budget, order: list[int], step: Step) -> Schedule:
    """From the record, or made now: with a budget from what the unsteered model takes for all items."""
    key = f"{scorer.name} schedule"
    known = scorer.record.get(key)
    if known is not None:
        return Schedule.from_json(known)
    with step("unsteered", len(order)) as advance:
        base = scorer.base(order, advance)
    if not torch.isfinite(base.margin).all():
        raise TaskError(f"{scorer.task.name}: the unsteered model gives no finite log-odds; expected a working model")
    costs = None if budget.seconds is None else replace(scorer.costs, spent=budget.spent)
    schedule = make_schedule(groups, len(order), len(scorer.neutral), budget.seconds, costs)
    scorer.record.put(key, schedule.to_json())
    return schedule
