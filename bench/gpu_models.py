"""The part of the GPU suite about models: steered inference of random weights in a published model's shape."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from . import catalogue, files, inference, report, shapes, steps
from .gpu_suite import DTYPE, FAILED, PARTIAL, Clock, Suite, check_device, in_words
from .inference import Case, Effort

#: Ways to steer, beside the unsteered model, that is always there twice.
WAYS = ("public", "dense hook", "sparse hook", "columns", "fused", "fold", "lora")
#: Those of the cases that vary k and the batch.
SWEPT = ("public", "sparse hook", "columns", "fold")
EFFORT, QUICK_EFFORT = Effort(seconds=3.0, least=10, most=40, tokens=4), Effort(seconds=0.0, least=2, most=2, tokens=2)
PREFILL_TOKENS, QUICK_PREFILL_TOKENS = 512, 48


def cases_of(quick: bool, gpu: bool) -> tuple[list[Case], dict[str, list[Case]]]:
    """What is measured of a model, most important first, and the series that the cases make.

    The main cases are a decoding step in a CUDA graph, and eager generation after a long prompt, for the time that the
    prompt takes.
    """
    base = Case(steps.GRAPH if gpu else inference.EAGER, k=10 if quick else 100)
    eager = Case(inference.EAGER, k=base.k, prompt_tokens=QUICK_PREFILL_TOKENS if quick else PREFILL_TOKENS)
    if quick:
        swept, numbers = inference.sweep(base, site=("ffn", "attention"))
    else:
        swept, numbers = inference.sweep(base, site=("ffn", "attention", "layer"), k=(1, 10, 100, 1000), batch=(1, 16))
    series = {name: [swept[i] for i in own] for name, own in numbers.items()}
    # Eager first: the profiler, which looks at a case when it is timed, may slow the host down for good.
    return [eager, base, *swept[1:]], series | {"main": [base, eager]}


@contextmanager
def all_that_is_there_frozen() -> Iterator[None]:
    """Python's collector looks at new objects alone; each of its many runs would else take a good part of a second."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def model_part(name: str) -> Callable[[Suite, dict[str, Any], Clock], None]:
    """The part of one model, with a file of kind "inference" of its own."""

    def run(suite: Suite, entry: dict[str, Any], clock: Clock) -> None:
        shape = shapes.tiny(shapes.SHAPES[name]) if suite.quick else shapes.SHAPES[name]
        model = shapes.build(shape, suite.device, DTYPE)
        with all_that_is_there_frozen():
            _measure(suite, entry, clock, model, shape)

    return run


def _measure(suite: Suite, entry: dict[str, Any], clock: Clock, model: Any, shape: shapes.ModelShape) -> None:
    cases, series = cases_of(suite.quick, suite.device.type == "cuda")
    ways, few = catalogue.chosen(WAYS), catalogue.chosen(SWEPT)
    thorough = {*series["main"], *series["site"]}
    effort = QUICK_EFFORT if suite.quick else EFFORT
    brief = replace(effort, counts=False)
    name = f"{shape.name}, random weights"
    path = suite.new_file("inference", re.sub(r"[^a-z0-9.]+", "-", shape.name.lower()))
    content: dict[str, Any] = {}
    measured: list[Case] = []
    problems: list[str] = []
    waiting, longest, begin = list(cases), 0.0, time.perf_counter()
    while waiting and clock.left > longest:
        run = inference.run(
            *(model, name, waiting[:], {"main": [0]}, ways, effort),
            others={i: (few, brief) for i, case in enumerate(waiting) if case not in thorough},
            commit=suite.commit,
            on_case=lambda text: report.say(f"{shape.name}: {text}"),
        )
        try:
            for found in run:
                measured.append(waiting.pop(0))
                content = found | content | {"cases": [*content.get("cases", []), found["cases"][-1]]}
                content["series"] = _numbers(series, measured)
                content["complete"] = len(measured) == len(cases)
                content["goals"] = inference.goals(content["cases"], suite.device.type)
                files.write(path, content)
                entry["files"] = [path.name]
                suite.save()
                now = time.perf_counter()
                longest, begin = max(longest, now - begin), now
                if clock.left < longest:
                    break
        except Exception as error:  # it costs this case alone
            problems.append(f"{waiting.pop(0)}: {in_words(error)}")
            entry["reason"] = "; ".join(problems)
        gc.collect()
        check_device(suite.device)
    if waiting:
        problems.append(f"{len(waiting)} of {len(cases)} cases left out, since its time was up")
    if problems:
        entry |= {"status": PARTIAL if measured else FAILED, "reason": "; ".join(problems)}


def _numbers(series: dict[str, list[Case]], measured: Sequence[Case]) -> dict[str, list[int]]:
    """The series as numbers of the cases that there are."""
    found = {name: [measured.index(case) for case in own if case in measured] for name, own in series.items()}
    return {name: own for name, own in found.items() if name == "main" or len(own) > 1}
