"""What steering is to cost at most, and whether a result says so: met, missed, or not told apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from . import steps
from .intervals import SAME
from .lineup import EAGER
from .published.inference import AUTO, DENSE, Case, Overhead
from .published.tables import table

MET, MISSED, UNRESOLVED = "met", "missed", "not told apart"


@dataclass(frozen=True)
class Goal:
    """One line of what is wanted.

    Attributes:
        words: the goal. applies: to a device ("cpu", or a GPU's type) and case. ways: each of which has to reach it.
        metric: "token" or "first_token". most: overhead in percent; None: the interval is to hold 0 and be narrower
            than 2 %. below_dense: whether the way has to be cheaper than the dense hook of the same case, too.
    """

    words: str
    applies: Callable[[str, Case], bool]
    most: float | None
    ways: tuple[str, ...] = (AUTO,)
    metric: str = "token"
    below_dense: bool = False


def _on_gpu(execution: str, *operations: str) -> Callable[[str, Case], bool]:
    def applies(device: str, case: Case) -> bool:
        return device != "cpu" and case.execution == execution and case.operation in operations and case.batch == 1

    return applies


GOALS = (
    Goal(
        "CPU, decode: no difference can be measured",
        lambda device, case: device == "cpu" and case.execution == EAGER and case.operation in ("scale", "shift"),
        None,
    ),
    Goal("GPU, eager: at most +1 %, below a dense hook", _on_gpu(EAGER, "scale", "shift"), 1.0, below_dense=True),
    Goal("GPU, eager, push: at most +2 %, below a dense hook", _on_gpu(EAGER, "push"), 2.0, below_dense=True),
    Goal("GPU, CUDA graph: at most 0 %", _on_gpu(steps.GRAPH, "scale", "shift"), 0.0, (AUTO, "fused")),
    Goal("GPU, prompt: at most +1 %", _on_gpu(EAGER, "scale", "shift"), 1.0, metric="first_token"),
)


def reached(goal: Goal, overhead: Overhead, dense: Overhead | None) -> str:
    """Whether an overhead is what a goal wants; where the dense hook was not measured, none is below it."""
    if goal.most is None:
        return MET if overhead.verdict == SAME else UNRESOLVED if overhead.low <= 0 else MISSED
    if overhead.low > goal.most:
        return MISSED
    if goal.below_dense and (dense is None or overhead.median >= dense.median):
        return MISSED if dense is not None and overhead.compared(dense) == "dearer" else UNRESOLVED
    return MET if overhead.median <= goal.most else UNRESOLVED


#: (goal, setting, way, overhead, what became of it)
Judged = tuple[str, str, str, Overhead, str]


def judged(content: dict[str, Any]) -> Iterator[Judged]:
    """All that goals are about in a result of kind "inference" or "plans"; nothing of another's."""
    device = "cpu" if "multiprocessors" not in content["environment"] else "gpu"
    if content["kind"] == "plans" and device != "cpu":
        yield from map(_many_plans, content["models"])
    if content["kind"] != "inference":
        return
    for case in map(Case, content["cases"]):
        for goal in GOALS:
            if not goal.applies(device, case):
                continue
            for way in goal.ways:
                if (overhead := case.overhead(way, goal.metric)) is None:
                    continue
                dense = case.overhead(DENSE, goal.metric)
                became = reached(goal, overhead, dense) if case.decidable(goal.metric) else UNRESOLVED
                setting = f"{content['model']['name']}, {case.words}, batch {case.batch}"
                yield goal.words, setting, way, overhead, became


#: Of as many plans as there are rows in a batch.
PLANS = Goal("GPU, as many plans as rows: at most +2 %", lambda device, case: False, 2.0)


def _many_plans(model: dict[str, Any]) -> Judged:
    """Of a decoding step of one execution, with the most plans."""
    row = max((row for row in model["rows"].values() if "plans" in row), key=lambda row: row["plans"])
    overhead = Overhead(*(100 * (row["ratio"][key] - 1) for key in ("median", "low", "high")), verdict="")
    return PLANS.words, f"{model['execution']}, {row['plans']} plans", AUTO, overhead, reached(PLANS, overhead, None)


def table_of(contents: Iterable[dict[str, Any]]) -> str:
    """A Markdown table of the goals that these results are about; "" where they are about none."""
    rows = [[*row[:3], str(row[3]), row[4]] for content in contents for row in judged(content)]
    return table(["goal", "setting", "way", "overhead, %", ""], rows) if rows else ""
