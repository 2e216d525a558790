"""The study's causal check, of the task that has one, as tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from austeer.utils.tables import signed

from ..study.summary import interval
from .tables import table

#: Words for the ways of the causal check.
WAYS = {
    "scale": "doubled and zeroed",
    "shift": "shifted by the mean difference",
    "deviation": "shifted by a standard deviation",
}


def tables_of(tasks: dict[str, Any]) -> Iterator[tuple[str, object]]:
    """The causal check of those tasks that have one, by name."""
    head = ["task", "each AU alone", "top AUs", "matched random", "difference [95 %]"]
    yield "causal", table([*head, "rank correlation with beta [95 %]"], causal(tasks))
    head = ["task", "each AU alone", "beta", "delta", "predicted effect", "measured for a nat predicted"]
    yield "causal.predicted", table(head, predicted(tasks))
    head = ["task", "strength of ten AUs", "correlation of predicted and measured", "measured for a nat predicted"]
    yield "causal.together", table(head, together(tasks))


def causal(tasks: dict[str, Any]) -> Iterator[list[str]]:
    """Top AUs beside matched random ones, each steered alone."""
    for name, task in tasks.items():
        if "causal" not in task:
            continue
        for way, found in task["causal"]["findings"].items():
            wanted, rank = found["wanted"], found["spread"]["beta"]
            means = [signed(wanted[key], 3) for key in ("top", "matched")]
            yield [name, WAYS.get(way, way), *means, _of(wanted, "difference", 3), _of(rank, "rho")]


def predicted(tasks: dict[str, Any]) -> Iterator[list[str]]:
    """Rank correlations with the effect of single AUs, the top ones by effect among them, where effects are known."""
    for name, task in tasks.items():
        for way, found in task.get("causal", {}).get("findings", {}).items():
            mixed = found.get("mixed")
            if mixed is not None and mixed["predicted"] is not None:
                rhos = [_of(mixed[key], "rho") for key in ("beta", "delta", "predicted")]
                yield [name, WAYS.get(way, way), *rhos, interval(*mixed["slope"])]


def together(tasks: dict[str, Any]) -> Iterator[list[str]]:
    """Groups of ten AUs, at each strength, where effects are known."""
    for name, task in tasks.items():
        found = task.get("causal", {}).get("together")
        for row in [] if found is None else found["strengths"]:
            strength = f"{row['alpha']:g} mean differences"
            yield [name, strength, interval(*row["correlation"]), interval(*row["slope"])]


def _of(row: dict[str, Any], key: str, digits: int = 2) -> str:
    return interval(row[key], row["low"], row["high"], digits)
