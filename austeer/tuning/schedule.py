"""How much of what is run: all that there is, or as much as a time budget allows."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

from ..errors import TaskError

#: A rung of successive halving keeps one in so many candidates, and the next has so many times the items.
ETA = 3

#: Candidates of a group that are scored on all items.
FINALISTS = 3

#: Strengths of an arm, as parts of the one at which the side effect reaches its limit.
FRACTIONS = (1.0, 0.5)

#: The fewest items a candidate is judged by.
FEWEST = 4

#: Neutral texts that calibration runs, if time allows: of all arms, and of those in the last round.
TEXTS, FINAL_TEXTS = 4, 16

#: Of a time budget, what is kept for mixing sites and for held-out items; and what calibration may take of the rest.
RESERVE, CALIBRATION = 0.3, 0.4

#: Steps of calibration that an arm takes on average, from nothing and from a strength that is near; and what a neutral
#: token costs next to one of an item: its logits are made at every token.
STEPS, FINAL_STEPS, NEUTRAL_COST = 4.0, 2.0, 1.5


@dataclass(frozen=True)
class Costs:
    """Seconds that one candidate takes for an item, for a neutral text, and for a token of an item.

    Attributes:
        spent: what has gone of the budget.
    """

    item: float
    text: float
    token: float = 0.0
    spent: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """Attributes:
    arms: numbers of the arms that are tried. texts: neutral texts that each is calibrated on.
    final_texts: on how many those in the last round are calibrated again; not again if they are no more than ``texts``.
    fractions: see ``FRACTIONS``.
    items: how many items each rung has; the last one has all that are used.
    """

    arms: tuple[int, ...]
    texts: int
    final_texts: int
    fractions: tuple[float, ...]
    items: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Schedule:
        arms, fractions, items = (tuple(data[name]) for name in ("arms", "fractions", "items"))
        return cls(arms, data["texts"], data["final_texts"], fractions, items)


def make_schedule(
    groups: Sequence[str], items: int, texts: int, budget: float | None = None, costs: Costs | None = None
) -> Schedule:
    """What to run.

    Args:
        groups: each arm's group; halving keeps the best of each. items, texts: how many there are.
        budget: seconds in all; None for as long as it takes. costs: what things take, if there is a budget.

    Raises:
        TaskError: the budget is too small for one candidate (says what is needed).
    """
    everything = tuple(range(len(groups)))
    texts, final_texts = min(texts, TEXTS), min(texts, FINAL_TEXTS)
    if budget is None:
        rungs = _rungs(_candidates(groups, everything, FRACTIONS), items, math.inf)
        return Schedule(everything, texts, final_texts, FRACTIONS, rungs)
    assert costs is not None
    left = budget * (1 - RESERVE) - costs.spent
    for stride in range(1, len(groups) + 1):
        arms = _every(groups, stride)
        for fractions in (FRACTIONS, FRACTIONS[:1]):
            candidates = _candidates(groups, arms, fractions)
            pairs = [(n, more) for n in range(texts, 0, -1) for more in dict.fromkeys((final_texts, n))]
            for few, final in pairs:
                again = final > few
                steps = len(arms) * few * STEPS + again * candidates[-1] * final * FINAL_STEPS
                calibration = steps * NEUTRAL_COST * costs.text
                if calibration > (1 - CALIBRATION if few == final == 1 else CALIBRATION) * left:
                    continue
                afford = (left - calibration) / costs.item if costs.item else math.inf
                rungs = _rungs(candidates, items, afford, again)
                if rungs:
                    return Schedule(arms, few, final, fractions, rungs)
    kinds = len(set(groups))
    calibration, scoring = kinds * STEPS * NEUTRAL_COST * costs.text, kinds * min(FEWEST, items) * costs.item
    needed = (costs.spent + max(calibration + scoring, calibration / (1 - CALIBRATION))) / (1 - RESERVE)
    raise TaskError(
        f"budget: found {budget:.0f} s, too little for one candidate of each of {kinds} kinds; expected at "
        f"least {math.ceil(1.01 * needed)} s here, or fewer sites and operations"
    )


def _every(groups: Sequence[str], stride: int) -> tuple[int, ...]:
    """Every ``stride``-th arm of each group, the first of each included."""
    place: dict[str, Iterator[int]] = defaultdict(count)
    return tuple(number for number, group in enumerate(groups) if next(place[group]) % stride == 0)


def _candidates(groups: Sequence[str], arms: Sequence[int], fractions: Sequence[float]) -> list[int]:
    """How many candidates each rung has."""
    sizes = [len(fractions) * sum(groups[arm] == group for arm in arms) for group in dict.fromkeys(groups)]
    counts = [sum(sizes)]
    while max(sizes) > FINALISTS:
        sizes = [max(1, math.ceil(size / ETA)) for size in sizes]
        counts.append(sum(sizes))
    return counts


def _rungs(counts: Sequence[int], items: int, afford: float, again: bool = False) -> tuple[int, ...]:
    """Items of each rung, so that all rungs take at most ``afford`` candidates times items; empty if that cannot be.

    Args:
        counts: candidates of each rung. again: those of the last one have other strengths by then, so that no score of
            an earlier one is theirs.
    """
    last = items
    while True:
        rungs = [max(min(FEWEST, last), math.ceil(last / ETA**back)) for back in reversed(range(len(counts)))]
        new = [n - before for n, before in zip(rungs, [0, *rungs])]
        if again:
            new[-1] = rungs[-1]
        if sum(candidates * n for candidates, n in zip(counts, new)) <= afford:
            return tuple(rungs)
        if last <= FEWEST:
            return ()
        last = max(FEWEST, math.floor(last * 0.9))
