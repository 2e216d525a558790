"""The parts of the GPU suite (:mod:`bench.gpu`): each measures one thing, and says in its entry what became of it."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from . import dispatch, files, graphs, large, models, momentum, pair_sets, shapes
from .gpu_models import model_part
from .gpu_suite import DTYPE, FAILED, PARTIAL, Clock, Part, SkippedError, Suite

KERNEL_SHAPES, KERNEL_TOKENS, KERNEL_ROUNDS = ((4096, 4096), (4096, 14336), (14336, 4096)), (1, 16, 512, 4096), 9
#: (pairs that are timed, pairs at which memory is looked at again), rounds.
MOMENTUM_PAIRS, MOMENTUM_ROUNDS = (64, 128), 2


def parts(settings: dict[str, Any]) -> list[Part]:
    """What these settings ask for, in order."""
    found = [
        Part("tests", 20, 130, tests),
        Part("ceilings", 5, 15, ceilings),
        Part("kernels", 20, 90, kernels),
        Part("counting", 5, 20, counting),
        *(Part(name, 20, 100 if i == 0 else 80, model_part(name)) for i, name in enumerate(settings["models"])),
        Part("momentum", 25, 60, measured_momentum),
    ]
    skipped = set(settings["skip"])
    return [
        part for part in found if part.name not in skipped and not ("models" in skipped and part.name in shapes.SHAPES)
    ]


# --- tests -----------------------------------------------------------------------------------------------------------


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
            code: int | None = subprocess.run(
                command, cwd=files.ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=seconds
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
        log.seek(0)
        output = log.read()
    results = _RESULT.findall(output)
    counts = Counter(word.lower() for _, word in results)
    failing = list(dict.fromkeys(name for name, word in results if word in ("FAILED", "ERROR")))
    result = {"counts": dict(counts), "failing": failing, "end": [] if code == 0 else output.splitlines()[-60:]}
    if code == 0:
        return {"result": result}
    if failing:
        reason = f"{len(failing)} of {len(results)} tests failed"
    elif code is None:
        return {
            "status": PARTIAL,
            "reason": f"stopped after {seconds:.0f} s and {len(results)} tests",
            "result": result,
        }
    else:
        reason = f"pytest ended with status {code} after {len(results)} tests"
    return {"status": FAILED, "reason": reason, "result": result}


# --- ceilings and kernels --------------------------------------------------------------------------------------------


def ceilings(suite: Suite, entry: dict[str, Any], clock: Clock) -> None:
    """What the device can do."""
    graphs.warm_up(suite.device)
    entry["result"] = asdict(graphs.measure_ceilings(suite.device, DTYPE))


def kernels(suite: Suite, entry: dict[str, Any], clock: Clock) -> None:
    """Projections by every way to steer them; a file of kind "dispatch" when all cases were measured."""
    options = argparse.Namespace(
        shapes=dispatch.QUICK_SHAPES if suite.quick else KERNEL_SHAPES,
        tokens=dispatch.QUICK_TOKENS if suite.quick else KERNEL_TOKENS,
        rounds=2 if suite.quick else KERNEL_ROUNDS,
        dtype=str(DTYPE).removeprefix("torch."),
        tune=False,
        quick=suite.quick,
        commit=suite.commit,
    )
    for content in dispatch.run(options, suite.device):
        entry["result"] = content
        suite.save()
        if clock.left <= 0 and not content["complete"]:
            count, of = len(content["rows"]), len(options.shapes) * len(options.tokens)
            entry |= {"status": PARTIAL, "reason": f"{count} of {of} cases, then its time was up"}
            return
    path = suite.new_file("dispatch")
    files.write(path, entry["result"])
    entry |= {"files": [path.name], "result": None}


def counting(suite: Suite, entry: dict[str, Any], clock: Clock) -> None:
    """The kernel that counts momentum."""
    shape = momentum.QUICK_KERNEL_SHAPE if suite.quick else momentum.KERNEL_SHAPE
    entry["result"] = large.kernel(*shape, DTYPE, suite.device, 3 if suite.quick else momentum.KERNEL_ROUNDS)


# --- momentum ---------------------------------------------------------------------------------------------------------


def measured_momentum(suite: Suite, entry: dict[str, Any], clock: Clock) -> None:
    """Momentum of demo pairs on a random model; a file of kind "momentum"."""
    if not suite.quick:
        shapes.check_memory(shapes.LLAMA_8B, suite.device, DTYPE)
    sets = [pair_sets.demo_pairs()] if suite.quick else [pair_sets.demo_pairs(), pair_sets.long_demo_pairs()]
    content: dict[str, Any] = {
        "kind": "momentum",
        "environment": files.about(suite.device, suite.commit),
        "data": "demo pairs",
        "rounds": MOMENTUM_ROUNDS,
        "quick": suite.quick,
        "sets": [],
        "memory": [],
        "offloaded": None,
        "large": large.model(
            models.TINY if suite.quick else models.LLAMA_8B,
            DTYPE,
            suite.device,
            sets,
            momentum.QUICK_LARGE_PAIRS if suite.quick else MOMENTUM_PAIRS,
            MOMENTUM_ROUNDS,
        ),
        "kernel": suite.content["parts"].get("counting", {}).get("result"),
    }
    path = suite.new_file("momentum")
    files.write(path, content | {"goals": momentum.goals(content, gpu=suite.device.type == "cuda")})
    entry["files"] = [path.name]
