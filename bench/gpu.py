"""Everything that is measured on one GPU, in under eight minutes.

    python -m bench.gpu [--budget 480] [--only graphs-llama eager-llama ...] [--ways columns ...] [--quick] [--json]

What matters most comes first: the projection kernels; steered inference of random models in the shapes of published
ones, in CUDA graphs, then in eager mode; many plans in one batch; the tests that need a GPU; a mixture of experts;
momentum; counts. A part that fails is recorded with its error, and the rest still runs: in a new process where it ended
its own, or the GPU's context. A part for which too little of the budget is left is skipped and named. Results are
written as they come, since a GPU that is lent may be taken away. On a CPU only --quick runs: tiny models, to see that
everything works. Its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import catalogue, command, files, goals, gpu_parts, report
from .gpu_suite import DTYPE, FAILED, RUNNING, BrokenDeviceError, Clock, Suite, run_part
from .published.tables import counts, table

KIND = "gpu"
BUDGET = 480.0
#: A process in which the GPU answers no more ends with this status, and another goes on.
BROKEN = 3
#: A part is not interrupted in the middle; after so many seconds more it hangs.
GRACE = 60.0


def work(path: Path, seconds: float) -> int:
    """Runs the parts that a result file has no entry of.

    Returns:
        0, or ``BROKEN`` where another process has to go on.
    """
    clock = Clock(seconds)
    content = files.read(path, KIND)
    suite = Suite(path, content, command.device())
    missing = [part for part in gpu_parts.parts(content["settings"]["only"]) if part.name not in content["parts"]]
    for number, part in enumerate(missing):
        kept = sum(later.least for later in missing[number + 1 :])  # for those that come after it
        report.say(f"{part.name}: {clock.left:.0f} s are left")
        try:
            run_part(suite, part, clock.left - kept)
        except BrokenDeviceError as error:
            report.say(str(error))
            return BROKEN
        entry = content["parts"][part.name]
        report.say(f"{part.name}: {entry['status']} {entry['reason']}")
    return 0


def supervise(path: Path, end: float, command: Sequence[str]) -> None:
    """Has processes run the parts, until all have an entry; one that ends in the middle of a part costs that part.

    Args:
        end: when the time is up, by ``time.perf_counter``. command: what calls :func:`work`, with two options added.
    """
    while True:
        left = max(end - time.perf_counter(), 0.0)
        why, again = "", False
        try:
            code = subprocess.run(
                [*command, "--work", str(path), "--budget", f"{left:.1f}"], cwd=files.ROOT, timeout=left + GRACE
            ).returncode
            if code:
                why = f"its process ended with {_status(code)}"
        except subprocess.TimeoutExpired:
            code, why = 0, f"stopped, since it was still running {GRACE:.0f} s after the time was up"
        content = files.read(path, KIND)
        for entry in content["parts"].values():
            if entry["status"] == RUNNING:
                entry |= {"status": FAILED, "reason": "; ".join(filter(None, [entry["reason"], why]))}
                again = code != 0
        if code not in (0, BROKEN) and not again:
            content["stopped"] = f"the measuring process did not begin: it ended with {_status(code)}"
        files.write(path, content)
        if not again and code != BROKEN:
            return


def _status(code: int) -> str:
    return f"status {code}" if code >= 0 else f"signal {-code} ({signal.strsignal(-code)})"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command.parser("gpu", __doc__, quick="tiny models, few rounds")
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"seconds for everything (default: {BUDGET:.0f})")
    names = [part.name for part in gpu_parts.parts()]
    parser.add_argument("--only", nargs="+", choices=names, default=[], help="parts to run (default: all)")
    parser.add_argument("--ways", nargs="+", choices=list(catalogue.WAYS), default=[], help="more ways to steer")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.budget <= 0 and not options.work:
        parser.error(f"--budget: found {options.budget:g}, expected a number of seconds above 0")
    if not torch.cuda.is_available() and not (options.quick or options.work):
        parser.error("found no GPU, expected one; --quick runs tiny models on the CPU to see that everything works")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status: 0 if every part ran or was skipped, 1 if one failed."""
    end = time.perf_counter()
    options = parse(argv)
    report.quiet = options.json
    if options.work:
        return work(options.work, options.budget)
    end += options.budget
    path = command.new_file(KIND, options)
    content: dict[str, Any] = {
        "kind": KIND,
        "schema": files.SCHEMAS[KIND],
        "environment": files.about(command.device(), options.commit),
        "settings": {
            **{"budget": options.budget, "quick": options.quick, "only": options.only, "ways": options.ways},
            "dtype": str(DTYPE).removeprefix("torch."),
        },
        "quick": options.quick,
        "complete": False,
        "parts": {},
    }
    files.write(path, content)
    if options.quick:
        work(path, options.budget)
    else:
        supervise(path, end, [sys.executable, "-m", "bench.gpu", *(["--json"] if options.json else [])])
    content = files.read(path, KIND)
    content["complete"] = "stopped" not in content
    content["seconds"] = time.perf_counter() - end + options.budget
    files.write(path, content)
    if options.json:
        print(files.dumps(content))
    else:
        show(path, content)
    report.say(f"written: {path}")
    ran = content["complete"] and all(entry["status"] != FAILED for entry in content["parts"].values())
    return 0 if ran else 1


def show(path: Path, content: dict[str, Any]) -> None:
    """Everything that the parts' own files hold, then what became of the parts, and of the goals."""
    found = [json.loads((path.parent / file).read_text()) for of in content["parts"].values() for file in of["files"]]
    for one in found:
        report.show(path, one)
    parts = content["parts"]
    rows = [
        [name, entry["status"], f"{entry['seconds']:.0f}", entry["reason"] or _tests(entry), ", ".join(entry["files"])]
        for name, entry in parts.items()
    ]
    text = table(["part", "status", "seconds", "", "files"], rows)
    if counted := (parts.get("counts", {}).get("result") or {}).get("ways"):
        text = f"Counted once, {parts['counts']['result']['case']}:\n\n{counts(counted)}\n\n{text}"
    reached = "" if content["quick"] else goals.table_of(found)
    report.show_markdown(f"{text}\n\n{content.get('stopped', '')}\n\n{reached}")


def _tests(entry: dict[str, Any]) -> str:
    """How many tests came to which end; "" of other parts."""
    counted = (entry["result"] or {}).get("counts", {})
    return ", ".join(f"{number} {word}" for word, number in counted.items())


if __name__ == "__main__":
    sys.exit(main())
