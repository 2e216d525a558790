"""The parts of the GPU suite (:mod:`bench.gpu`): each measures one thing, and says in its entry what became of it."""

from __future__ import annotations

import argparse
import gc
import importlib.util
import itertools
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

from austeer.costs.ceilings import ceilings as measured_ceilings

from . import catalogue, counted_ops, dispatch, files, inference, momentum, pair_sets, report, shapes, steps
from .gpu_suite import DTYPE, FAILED, PARTIAL, Clock, Part, SkippedError, Suite, check_device, in_words
from .inference import Effort, Job
from .lineup import EAGER, Case, Lineup

KERNEL_SHAPES, KERNEL_TOKENS, KERNEL_ROUNDS = ((4096, 4096), (4096, 14336), (14336, 4096)), (1, 16, 512, 4096), 9
#: (pairs that are timed, pairs at which memory is looked at again), rounds.
MOMENTUM_PAIRS, MOMENTUM_ROUNDS = (64, 128), 2
#: Ways to steer, beside the unsteered model, that is always there twice; ``--ways`` adds others.
WAYS = ("public", "dense hook", "auto")
#: What one decoding step in a CUDA graph shows besides: our kernels by themselves.
GRAPH_WAYS = (*WAYS, "columns", "fused")
#: A case is to take less than 15 seconds, with five ways of some 45 ms a token.
EFFORTS = {
    steps.GRAPH: Effort(seconds=3.0, least=10, most=40, tokens=4, counts=False),
    EAGER: Effort(seconds=8.0, least=6, most=40, tokens=6, counts=False),
}
QUICK_EFFORT = Effort(seconds=0.0, least=2, most=2, tokens=2, counts=False)
GRAPH_TOKENS, PREFILL_TOKENS, QUICK_PREFILL_TOKENS = 32, (512, 4096), (48,)
#: The operation that is recommended comes first, then the paper's.
OPERATIONS = ("shift", "scale", "push")
#: Processes of the tests.
TEST_PROCESSES = 12


def parts(chosen: Sequence[str] = ()) -> list[Part]:
    """Those of these names, or all; what matters most comes first, counts last: a profiler may slow the host for good.

    Before a later part's least nothing is begun, so the tests always run.
    """
    llama, gemma, mixture = shapes.LLAMA_8B, shapes.GEMMA2_9B, shapes.QWEN3_30B_A3B
    both, three = ("ffn", "attention"), ("ffn", "attention", "layer")
    found = [
        Part("ceilings", 2, 10, ceilings),
        Part("kernels", 10, 40, kernels),
        Part("graphs-llama", 15, 90, cases_of(llama, steps.GRAPH, both)),
        Part("eager-llama", 15, 100, cases_of(llama, EAGER, both)),
        Part("rows", 10, 40, rows),
        Part("graphs-gemma", 15, 100, cases_of(gemma, steps.GRAPH, three)),
        Part("eager-gemma", 15, 100, cases_of(gemma, EAGER, three)),
        Part("tests", 95, 110, tests),
        Part("graphs-mixture", 10, 50, cases_of(mixture, steps.GRAPH, ("ffn",))),
        Part("momentum", 10, 50, measured_momentum),
        Part("counts", 5, 30, counts),
    ]
    return [part for part in found if not chosen or part.name in chosen]


def ceilings(suite: Suite, entry: dict[str, Any], clock: Clock) -> None:
    """How fast the device is at best."""
    entry["result"] = measured_ceilings(suite.device, DTYPE).to_json()


def rows(suite: Suite, entry: dict[str, Any], clock: Clock) -> None:
    """Many plans in one batch: ``python -m bench.many_plans``, in a process of its own; its files lie beside these.

    Raises:
        SkippedError: there is no such measurement.
    """
    if importlib.util.find_spec("bench.many_plans") is None:
        raise SkippedError("found no bench/many_plans.py, expected the measurement of many plans in one batch")
    before = set(suite.path.parent.glob("*.json"))
    command = [sys.executable, "-m", "bench.many_plans", "--out", str(suite.path.parent.parent)]
    command += ["--quick"] * suite.quick + (["--commit", suite.commit] if suite.commit else [])
    environment = os.environ | {"PYTHONPATH": _places()}
    try:
        done = subprocess.run(
            command, cwd=files.ROOT, env=environment, capture_output=True, text=True, timeout=clock.left
        )
        if done.returncode:
            end = "\n".join(done.stderr.splitlines()[-20:])
            entry |= {"status": FAILED, "reason": f"ended with status {done.returncode}: {end}"}
    except subprocess.TimeoutExpired:
        entry |= {"status": PARTIAL, "reason": "its time was up"}
    entry["files"] = sorted(path.name for path in set(suite.path.parent.glob("*.json")) - before)


def _places() -> str:
    """Where Python finds this checkout."""
    return os.pathsep.join(
        [str(files.ROOT), str(files.ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    )


def tests(suite: Suite, entry: dict[str, Any], clock: Clock) -> None:
    """``pytest -m gpu``, in a process of its own."""
    if suite.device.type != "cuda":
        raise SkippedError("found no GPU, expected one for the tests that are marked gpu")
    several = ["-n", str(min(TEST_PROCESSES, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    entry |= run_tests(["-m", "gpu", *several, "tests"], clock.left)


_WORD = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
#: A line of one process, or of one of several.
_RESULT = re.compile(rf"^(?:(\S+::.*?) ({_WORD})\b|\[gw\d+\] \[ *\d+%\] ({_WORD}) (\S+::.*\S))", re.MULTILINE)


def run_tests(arguments: Sequence[str], seconds: float) -> dict[str, Any]:
    """An entry with how many tests passed, failed ..., and which failed; also of a run that had to be stopped."""
    # Without the project's own options: one of them refuses settings of plugins that are not installed.
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-v", "--tb=short", "--color=no"]
    command += ["--import-mode=importlib", "-p", "no:cacheprovider", "--continue-on-collection-errors", *arguments]
    environment = os.environ | {"PYTHONPATH": _places()}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        try:
            done = subprocess.run(command, cwd=files.ROOT, env=environment, stdout=log, stderr=log, timeout=seconds)
            code: int | None = done.returncode
        except subprocess.TimeoutExpired:
            code = None
        log.seek(0)
        output = log.read()
    results = [(one or other, word or own) for one, word, own, other in _RESULT.findall(output)]
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


def cases_of(
    shape: shapes.ModelShape, execution: str, sites: Sequence[str]
) -> Callable[[Suite, dict[str, Any], Clock], None]:
    """Steered inference of random weights in a published model's shape; a file of kind "inference" of its own."""

    def run(suite: Suite, entry: dict[str, Any], clock: Clock) -> None:
        own = shapes.tiny(shape) if suite.quick else shape
        how = execution if suite.device.type == "cuda" else EAGER
        model = shapes.build(own, suite.device, DTYPE)
        own_ways = GRAPH_WAYS if execution == steps.GRAPH else WAYS
        ways = catalogue.chosen([*own_ways, *suite.content["settings"]["ways"]])
        effort = QUICK_EFFORT if suite.quick else EFFORTS[execution]
        jobs = [Job(replace(case, execution=how), ways, effort) for case in planned(execution, sites, suite.quick)]
        measure_cases(suite, entry, clock, model, f"{own.name}, random weights", jobs)

    return run


def planned(execution: str, sites: Sequence[str], quick: bool) -> list[Case]:
    """Every site with every operation, most important first; in eager mode long prompts, for the time they take.

    A quick run has each operation and each site once.
    """
    length = GRAPH_TOKENS if execution == steps.GRAPH else (QUICK_PREFILL_TOKENS if quick else PREFILL_TOKENS)[0]
    base = Case(execution, k=10 if quick else 100, prompt_tokens=length)
    places = zip(OPERATIONS, itertools.cycle(sites)) if quick else itertools.product(OPERATIONS, sites)
    cases = [replace(base, operation=operation, site=site) for operation, site in places]
    longer = [] if execution == steps.GRAPH or quick else PREFILL_TOKENS[1:]
    return [cases[0], *(replace(cases[0], prompt_tokens=tokens) for tokens in longer), *cases[1:]]


def measure_cases(
    suite: Suite, entry: dict[str, Any], clock: Clock, model: Any, name: str, jobs: Sequence[Job]
) -> None:
    """Case by case, each written as it comes, until the time is up; one that fails costs itself alone."""
    problems: list[str] = []

    def failed(case: Case, error: Exception) -> None:
        problems.append(f"{case}: {in_words(error)}")
        gc.collect()
        check_device(suite.device)

    path = suite.new_file(
        "inference", re.sub(r"[^a-z0-9.]+", "-", f"{name.split(',')[0]}-{jobs[0].case.execution}".lower())
    )
    measured, longest, begin = 0, 0.0, time.perf_counter()
    for content in inference.run(
        *(model, name, jobs, {"main": [job.case for job in jobs]}, suite.commit),
        tell=lambda turns, text: None if turns else report.say(f"{name}: {text}"),
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


def counts(suite: Suite, entry: dict[str, Any], clock: Clock) -> None:
    """Launches, bytes, operations, device and host time of a token, by way, once."""
    shape = shapes.tiny(shapes.LLAMA_8B) if suite.quick else shapes.LLAMA_8B
    model = shapes.build(shape, suite.device, DTYPE)
    case = Case(EAGER, k=10 if suite.quick else 100)
    with Lineup(model, case, catalogue.chosen((*GRAPH_WAYS, "sparse hook"))) as lineup:
        entry["result"] = {"model": shape.name, "case": str(case), "ways": {}}
        for name, way in lineup.made.items():
            entry["result"]["ways"][name] = counted_ops.of_step_or_why_not(way, lineup.prompt(-1))


def measured_momentum(suite: Suite, entry: dict[str, Any], clock: Clock) -> None:
    """The kernel that counts, and momentum of demo pairs on a random model; a file of kind "momentum"."""
    content = momentum.empty(suite.device, suite.commit, "demo pairs", MOMENTUM_ROUNDS, suite.quick)
    path = suite.new_file("momentum")
    for part in momentum.on_random_weights(
        [pair_sets.demo_pairs()], MOMENTUM_PAIRS, MOMENTUM_ROUNDS, suite.device, suite.quick
    ):
        content |= part
        suite.write(path, content, entry)
    suite.write(path, content | {"complete": True}, entry)
