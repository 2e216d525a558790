"""The parts of the GPU suite (:mod:`bench.gpu`): each measures one thing, and says in its entry what became of it."""

from __future__ import annotations

import argparse
import gc
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from . import catalogue, dispatch, files, inference, momentum, pair_sets, report, shapes, steps
from .gpu_suite import DTYPE, FAILED, PARTIAL, Clock, Part, SkippedError, Suite, check_device, in_words
from .inference import Effort, Job
from .lineup import EAGER, Case

KERNEL_SHAPES, KERNEL_TOKENS, KERNEL_ROUNDS = ((4096, 4096), (4096, 14336), (14336, 4096)), (1, 16, 512, 4096), 9
#: (pairs that are timed, pairs at which memory is looked at again), rounds.
MOMENTUM_PAIRS, MOMENTUM_ROUNDS = (64, 128), 2
#: Ways to steer, beside the unsteered model, that is always there twice.
WAYS = ("public", "dense hook", "sparse hook", "columns", "fused", "fold", "lora")
#: Those of the cases that vary k and the batch.
SWEPT = ("public", "sparse hook", "columns", "fold")
EFFORT, QUICK_EFFORT = Effort(seconds=3.0, least=10, most=40, tokens=4), Effort(seconds=0.0, least=2, most=2, tokens=2)
PREFILL_TOKENS, QUICK_PREFILL_TOKENS = 512, 48


def parts(settings: dict[str, Any]) -> list[Part]:
    """What these settings ask for, in order."""
    found = [
        Part("tests", 20, 130, tests),
        Part("kernels", 20, 100, kernels),
        *(Part(name, 20, 100 if i == 0 else 80, model_part(name)) for i, name in enumerate(settings["models"])),
        Part("momentum", 25, 80, measured_momentum),
    ]
    skipped = {*settings["skip"], *(shapes.SHAPES if "models" in settings["skip"] else ())}
    return [part for part in found if part.name not in skipped]


def tests(suite: Suite, entry: dict[str, Any], clock: Clock) -> None:
    """``pytest -m gpu``, in a process of its own."""
    if suite.device.type != "cuda":
        raise SkippedError("found no GPU, expected one for the tests that are marked gpu")
    entry |= run_tests(["-m", "gpu", "tests"], clock.left)


_RESULT = re.compile(r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", re.MULTILINE)


def run_tests(arguments: Sequence[str], seconds: float) -> dict[str, Any]:
    """An entry with how many tests passed, failed ..., and which failed; also of a run that had to be stopped."""
    # Without the project's own options: one of them refuses settings of plugins that are not installed.
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-v", "--tb=short", "--color=no"]
    command += ["-p", "no:cacheprovider", "--continue-on-collection-errors", *arguments]
    places = [str(files.ROOT), str(files.ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places)}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        try:
            done = subprocess.run(command, cwd=files.ROOT, env=environment, stdout=log, stderr=log, timeout=seconds)
            code: int | None = done.returncode
        except subprocess.TimeoutExpired:
            code = None
        log.seek(0)
        output = log.read()
    results = _RESULT.findall(output)
    failing = list(dict.fromkeys(name for name, word in results if word in ("FAILED", "ERROR")))
    counts = dict(Counter(word.lower() for _, word in results))
    result = {"counts": counts, "failing": failing, "end": [] if code == 0 else output.splitlines()[-60:]}
    if code == 0:
        return {"result": result}
    ended = f"stopped after {seconds:.0f} s" if code is None else f"pytest ended with status {code}"
    reason = f"{ended} and {len(results)} tests, {len(failing)} failed{': ' * bool(failing)}{', '.join(failing)}"
    return {"status": PARTIAL if code is None and not failing else FAILED, "reason": reason, "result": result}


def kernels(suite: Suite, entry: dict[str, Any], clock: Clock) -> None:
    """Projections by every way to steer them; a file of kind "dispatch"."""
    options = argparse.Namespace(
        shapes=dispatch.QUICK_SHAPES if suite.quick else KERNEL_SHAPES,
        tokens=dispatch.QUICK_TOKENS if suite.quick else KERNEL_TOKENS,
        rounds=2 if suite.quick else KERNEL_ROUNDS,
        dtype=str(DTYPE).removeprefix("torch."),
        quick=suite.quick,
        commit=suite.commit,
    )
    path = suite.new_file("dispatch")
    for content in dispatch.run(options, suite.device):
        suite.write(path, content, entry)
        if clock.left <= 0 and not content["complete"]:
            entry |= {"status": PARTIAL, "reason": f"{len(content['rows'])} cases, then its time was up"}
            return


def cases_of(quick: bool, gpu: bool) -> tuple[list[Case], dict[str, list[Case]]]:
    """What is measured of a model, most important first, and the series that the cases make.

    The main cases are a decoding step in a CUDA graph, and eager generation after a long prompt, for the time that the
    prompt takes.
    """
    base = Case(steps.GRAPH if gpu else EAGER, k=10 if quick else 100)
    eager = Case(EAGER, k=base.k, prompt_tokens=QUICK_PREFILL_TOKENS if quick else PREFILL_TOKENS)
    if quick:
        swept, series = inference.sweep(base, site=("ffn", "attention"))
    else:
        swept, series = inference.sweep(base, site=("ffn", "attention", "layer"), k=(1, 10, 100, 1000), batch=(1, 16))
    # Eager first: the profiler, which looks at a case when it is timed, may slow the host down for good.
    return [eager, *swept], series | {"main": [base, eager]}


def model_part(name: str) -> Callable[[Suite, dict[str, Any], Clock], None]:
    """Steered inference of random weights in a published model's shape; a file of kind "inference" of its own."""

    def run(suite: Suite, entry: dict[str, Any], clock: Clock) -> None:
        shape = shapes.tiny(shapes.SHAPES[name]) if suite.quick else shapes.SHAPES[name]
        model = shapes.build(shape, suite.device, DTYPE)
        cases, series = cases_of(suite.quick, suite.device.type == "cuda")
        ways, few = catalogue.chosen(WAYS), catalogue.chosen(SWEPT)
        effort = QUICK_EFFORT if suite.quick else EFFORT
        thorough = {*series["main"], *series["site"]}
        jobs = [
            Job(case, ways, effort) if case in thorough else Job(case, few, replace(effort, counts=False))
            for case in cases
        ]
        problems: list[str] = []

        def failed(case: Case, error: Exception) -> None:
            """It costs this case alone."""
            problems.append(f"{case}: {in_words(error)}")
            gc.collect()
            check_device(suite.device)

        path = suite.new_file("inference", re.sub(r"[^a-z0-9.]+", "-", shape.name.lower()))
        measured, longest, begin = 0, 0.0, time.perf_counter()
        for content in inference.run(
            *(model, f"{shape.name}, random weights", jobs, series, suite.commit),
            tell=lambda turns, text: None if turns else report.say(f"{shape.name}: {text}"),
            failed=failed,
        ):
            suite.write(path, content, entry)
            measured += 1
            now = time.perf_counter()
            longest, begin = max(longest, now - begin), now
            if clock.left < longest:
                break
        left = len(jobs) - measured - len(problems)
        if left:
            problems.append(f"{left} of {len(jobs)} cases left out, since its time was up")
        if problems:
            entry |= {"status": PARTIAL if measured else FAILED, "reason": "; ".join(problems)}

    return run


def measured_momentum(suite: Suite, entry: dict[str, Any], clock: Clock) -> None:
    """The kernel that counts, and momentum of demo pairs on a random model; a file of kind "momentum"."""
    sets = [pair_sets.demo_pairs()] if suite.quick else [pair_sets.demo_pairs(), pair_sets.long_demo_pairs()]
    content = momentum.empty(suite.device, suite.commit, "demo pairs", MOMENTUM_ROUNDS, suite.quick)
    path = suite.new_file("momentum")
    for part in momentum.on_random_weights(sets, MOMENTUM_PAIRS, MOMENTUM_ROUNDS, suite.device, suite.quick):
        content |= part
        suite.write(path, content, entry)
    suite.write(path, content | {"complete": True}, entry)
