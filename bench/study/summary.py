"""Trials together: each row of a task over its seeds, differences from CAA and ITI item by item, and the goals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from austeer.statistics.intervals import group_interval
from austeer.utils.tables import signed

from .rows import CAA, ITI, KS, NEWTON, SADI, TRAINED, predicted_name

#: What differences are taken from, item by item.
RIVALS = (CAA, ITI)

#: A task counts where some method's interval is above 0, and its effect above this: nats.
WORKS = 0.5


def pooled(trials: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each row of one task, over all its trials: effect with interval over groups, KL, and differences from rivals.

    Rows that had no strength within the limit in one of the trials are over the others, and say how many ("trials").
    """
    names = dict.fromkeys(row["name"] for trial in trials for row in trial["rows"])
    by_name = [{row["name"]: row for row in trial["rows"]} for trial in trials]
    found = {}
    for name in names:
        rows = [rows[name] for rows in by_name if name in rows]
        effect, low, high = _mean(trials, by_name, name)
        found[name] = {
            "kind": rows[0]["kind"],
            "trials": len(rows),
            **{"effect": effect, "low": low, "high": high},
            "kl": sum(row["kl"] for row in rows) / len(rows),
            "k": [row["k"] for row in rows],
            "where": [" ".join(filter(None, (row["site"], row["detail"]))) for row in rows],
            "behind": {rival: _mean(trials, by_name, name, rival) for rival in RIVALS if rival != name},
        }
    return found


def _mean(
    trials: Sequence[Mapping[str, Any]], by_name: Sequence[Mapping[str, Any]], name: str, rival: str | None = None
) -> tuple[float | None, float | None, float | None]:
    """A row's mean change, or its lead over a rival's, over the items of all trials that have both: with interval.

    An item that is held out in several trials is one group.
    """
    values: list[float] = []
    groups: list[str] = []
    for trial, rows in zip(trials, by_name):
        if name not in rows or (rival is not None and rival not in rows):
            continue
        change = torch.tensor(rows[name]["change"], dtype=torch.float64)
        values += (change if rival is None else change - torch.tensor(rows[rival]["change"])).tolist()
        groups += trial["groups"]
    if not values:
        return None, None, None
    return sum(values) / len(values), *group_interval(torch.tensor(values, dtype=torch.float64), groups)


def works(rows: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether any method steers a task."""
    return any(row["low"] is not None and row["low"] > 0 and row["effect"] >= WORKS for row in rows.values())


def goals(tasks: Mapping[str, Mapping[str, Mapping[str, Any]]], trials: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Both goals, met or missed.

    Args:
        tasks: pooled rows of each. trials: those of each.

    Returns:
        "ten": ten AUs by effect, site and step by prediction, against each method without gradients, on each task where
        any method works: (mean lead, low, high); met where each lead's interval is above 0. "hundred": a hundred of
        them against the dense vectors by gradients, mean over tasks of the mean lead; met where that is not below 0.
    """
    tasks = {name: rows for name, rows in tasks.items() if works(rows)}
    ten, hundred = predicted_name(KS[0]), predicted_name(KS[1])
    leads: dict[str, dict[str, Any]] = {}
    means: dict[str, Any] = {}
    missing = 0
    for name in tasks:
        by_name = [{row["name"]: row for row in trial["rows"]} for trial in trials[name]]
        found = {rival: _mean(trials[name], by_name, ten, rival) for rival in (CAA, ITI, SADI)}
        leads[name] = {rival: lead for rival, lead in found.items() if rival in tasks[name]}
    for rival in (NEWTON, TRAINED):
        each = []
        for name in tasks:
            by_name = [{row["name"]: row for row in trial["rows"]} for trial in trials[name]]
            lead = _mean(trials[name], by_name, hundred, rival)
            if lead[0] is not None:
                each.append(lead)
            elif rival in tasks[name]:
                missing += 1
        if each:
            error = math.sqrt(sum(((high - low) / 2) ** 2 for _, low, high in each if low is not None)) / len(each)
            mean = sum(lead[0] for lead in each) / len(each)
            means[rival] = {"lead": [mean, mean - error, mean + error], "tasks": len(each)}
    won = [lead[1] is not None and lead[1] > 0 for found in leads.values() for lead in found.values()]
    return {
        "ten": {"row": ten, "leads": leads, "met": bool(won) and all(won)},
        "hundred": {
            "row": hundred,
            "means": means,
            "met": bool(means) and not missing and all(m["lead"][0] >= 0 for m in means.values()),
        },
    }


def interval(mean: float | None, low: float | None, high: float | None, digits: int = 2) -> str:
    """A mean with its 95 % interval."""
    if mean is None:
        return ""
    shown = signed(mean, digits)
    return shown if low is None or high is None else f"{shown} [{signed(low, digits)}, {signed(high, digits)}]"
