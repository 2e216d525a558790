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
    """Whether an overhead is what a goal wants; beside the dense hook's, where there is one."""
    if goal.most is None:
        return MET if overhead.verdict == SAME else UNRESOLVED if overhead.low <= 0 else MISSED
    if overhead.low > goal.most:
        return MISSED
    if goal.below_dense and dense is not None and overhead.median >= dense.median:
        return MISSED if overhead.compared(dense) == "dearer" else UNRESOLVED
    return MET if overhead.median <= goal.most else UNRESOLVED


def judged(content: dict[str, Any]) -> Iterator[tuple[Goal, Case, str, Overhead, str]]:
    """(goal, case, way, overhead, what became of it) for all of a result of kind "inference" that goals are about."""
    device = "cpu" if "multiprocessors" not in content["environment"] else "gpu"
    for case in map(Case, content["cases"]):
        for goal in GOALS:
            if not goal.applies(device, case):
                continue
            for way in goal.ways:
                if (overhead := case.overhead(way, goal.metric)) is None:
                    continue
                dense = case.overhead(DENSE, goal.metric)
                quiet = case.decidable(goal.metric)
                yield goal, case, way, overhead, reached(goal, overhead, dense) if quiet else UNRESOLVED


def table_of(contents: Iterable[dict[str, Any]]) -> str:
    """A Markdown table of the goals that these results are about; "" where they are about none."""
    rows = [
        [goal.words, f"{content['model']['name']}, {case.words}, batch {case.batch}", way, str(overhead), became]
        for content in contents
        for goal, case, way, overhead, became in judged(content)
    ]
    return table(["goal", "setting", "way", "overhead, %", ""], rows) if rows else ""
