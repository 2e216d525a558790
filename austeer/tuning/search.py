"""The search: strengths from a limit on the side effect, then successive halving on items, group by group."""

from __future__ import annotations

import math
import time
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
from .calibrate import Limit, calibrate, check_limit
from .schedule import ETA, Schedule, make_schedule
from .scorer import Scorer

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

    def best(self) -> Standing:
        """The best of all."""
        found = self.best_of()
        assert found is not None
        return found


def search(
    scorer: Scorer,
    arms: Sequence[Arm],
    *,
    group: Callable[[Arm], str],
    max_kl: float,
    budget: float | None = None,
    started: float | None = None,
    step: Step = no_bars,
) -> SearchResult:
    """Finds the best candidate of each group.

    Every arm is first brought to the limit on the side effect (:func:`calibrate`), so that candidates compare at equal
    side effect. Then all are scored on a few items, the best third of each group on three times as many, and so on. On
    a few neutral texts the limit is a rough one, so those of the last round are brought to it anew on more of them.

    Args:
        max_kl: the limit on KL(unsteered || steered) on the scorer's neutral texts, nats a token.
        budget: seconds in all, from ``started`` (:func:`time.perf_counter`) on.

    Raises:
        TaskError: no arm, a limit that is no positive number, a budget too small for one candidate, or no strength of
            any arm within the limit.
    """
    if not arms:
        raise TaskError("search: found no arm, expected at least one; give sites, operations and numbers of AUs")
    check_limit(max_kl)
    started = time.perf_counter() if started is None else started
    order = scorer.order
    schedule = _schedule(scorer, [group(arm) for arm in arms], budget, started, order, step)
    arms = [arms[number] for number in schedule.arms]
    with step("strengths at the limit", len(arms)) as advance:
        limits = calibrate(scorer, arms, max_kl, schedule.texts, on_arm=lambda: advance(1))
    remaining = [(arm, fraction) for arm in arms for fraction in schedule.fractions]
    done: list[Standing] = []
    for number, size in enumerate(schedule.items):
        last, items = number == len(schedule.items) - 1, order[:size]
        if last and schedule.final_texts > schedule.texts:
            limits |= _limits_on_more(scorer, [arm for arm, _ in remaining], limits, max_kl, schedule.final_texts, step)
        candidates = [
            (Candidate(arm, limit.alpha * fraction), group(arm), fraction, limit)
            for arm, fraction in remaining
            for limit in [limits[arm.digest]]
            if limit.alpha is not None
        ]
        if not candidates:
            raise TaskError(
                f"max_kl: no strength of any of {len(arms)} arms stayed within {max_kl:g} nats a token on neutral "
                "text; give a larger limit, or fewer AUs"
            )
        total = size * len(candidates)
        with step(f"round {number + 1} of {len(schedule.items)}: {len(candidates)} candidates", total) as advance:
            changes = scorer.changes([c for c, *_ in candidates], items, advance)
        standings = [Standing(*candidate, tuple(items), change) for candidate, change in zip(candidates, changes)]
        standings.sort(key=lambda s: -s.effect)
        if last:
            done = standings + done
            break
        kept = _keep(standings)
        done = [s for s in standings if s not in kept] + done
        remaining = [(s.candidate.arm, s.fraction) for s in kept]
    return SearchResult(done, schedule)


def _limits_on_more(
    scorer: Scorer, arms: Sequence[Arm], limits: dict[str, Limit], max_kl: float, texts: int, step: Step
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
            on_arm=lambda: advance(1),
        )


def _keep(standings: Sequence[Standing]) -> list[Standing]:
    """The best third of each group, one at least; ``standings`` are sorted."""
    sizes = Counter(standing.group for standing in standings)
    place: dict[str, Iterator[int]] = defaultdict(count)
    return [s for s in standings if next(place[s.group]) < math.ceil(sizes[s.group] / ETA)]


def _schedule(
    scorer: Scorer, groups: list[str], budget: float | None, started: float, order: list[int], step: Step
) -> Schedule:
    """From the record, or made now: with a budget from what the unsteered model takes for all items."""
    key = f"{scorer.name} schedule"
    known = scorer.record.get(key)
    if known is not None:
        return Schedule.from_json(known)
    with step("unsteered", len(order)) as advance:
        base = scorer.base(order, advance)
    if not torch.isfinite(base.margin).all():
        raise TaskError(f"{scorer.task.name}: the unsteered model gives no finite log-odds; expected a working model")
    costs = None if budget is None else replace(scorer.costs, spent=time.perf_counter() - started)
    schedule = make_schedule(groups, len(order), len(scorer.neutral), budget, costs)
    scorer.record.put(key, schedule.to_json())
    return schedule
