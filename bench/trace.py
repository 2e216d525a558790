"""A Chrome trace of every way at work, for https://ui.perfetto.dev, and what took the time in each."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import PreTrainedModel

from austeer.errors import AusteerError

from .gate import Exact
from .graphs import wait
from .lineup import MEASURED, Case, Lineup
from .published.tables import table
from .steered import Steered, Way

ENDINGS = (".json", ".json.gz")
#: Decoded tokens of each way, and how many operations its table lists.
STEPS, TOP = 4, 5
PREFILL, DECODE, GENERATE = "prefill", "decode", "generate"


@dataclass(frozen=True)
class Traced:
    """One way in one phase; all numbers are of one token step, or of the one prefill, and under the profiler.

    Attributes:
        phase: "prefill", "decode", or "generate" for a way that can only generate as a whole.
        host_seconds: until everything is queued; on a CPU until everything is done.
        device_seconds, launches: of kernels and copies on a GPU; on a CPU None, and the operations called by the model
            and its hooks, without those inside them.
        top: (operation, seconds, calls), the longest first: kernels on a GPU, operations without their parts on a CPU.
        reason: why it is not in the trace, instead of numbers; empty if it is.
    """

    way: str
    phase: str = ""
    host_seconds: float | None = None
    device_seconds: float | None = None
    launches: float | None = None
    top: tuple[tuple[str, float, float], ...] = ()
    reason: str = ""


def check_trace_path(path: Path | str) -> Path:
    """The path, if a trace can be written there.

    Raises:
        AusteerError: it cannot.
    """
    path = Path(path)
    if not path.name.endswith(ENDINGS) or path.name in ENDINGS:
        raise AusteerError(f"trace: found the name {path.name!r}, expected one that ends in {' or '.join(ENDINGS)}")
    if path.is_dir():
        raise AusteerError(f"trace: found a folder at {path}, expected a file's name")
    if not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise AusteerError(f"trace: found no folder {path.parent} to write in, expected one; make it, or name another")
    return path


def write_trace(
    model: PreTrainedModel,
    case: Case,
    ways: Mapping[str, Way],
    path: Path | str,
    on_way: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Profiles one prefill and a few decoding steps under each way, and writes the trace.

    Each way runs inside a range of its own name, after a warm-up and the gate; those that are not to be had, or are
    wrong, are not in the trace. Compiled or captured steps have no prefill of their own.

    Args:
        path: ``.json``, or ``.json.gz`` to compress it. An existing file is replaced.

    Returns:
        The fields of :class:`Traced` for each way and phase, or why a way has none.

    Raises:
        AusteerError: nothing can be written there, or the model cannot have the case; before any work.
        WeakGateError: see :class:`bench.gate.Gate`.
    """
    path = check_trace_path(path)
    case.check(model)
    with Lineup(model, Exact(model), case, ways, on_way) as lineup:
        device = lineup.prompt(-1).device
        phases = {name: _phases(lineup, name) for name in lineup.made}
        for name, own in phases.items():  # warms up
            _run(name, lineup.made[name], own, device)
        on_gpu = [ProfilerActivity.CUDA] if device.type == "cuda" else []
        host: dict[tuple[str, str], float] = {}
        with profile(activities=[ProfilerActivity.CPU, *on_gpu]) as profiled:
            for name, own in phases.items():
                for phase, seconds in _run(name, lineup.made[name], own, device).items():
                    host[name, phase] = seconds
    profiled.export_chrome_trace(str(path))
    events = profiled.events()
    rows = [summary(events, name, phase, seconds, device) for (name, phase), seconds in host.items()]
    rows += [
        Traced(name, reason=f"{row['status']}: {row['reason']}")
        for name, row in lineup.rows.items()
        if row["status"] != MEASURED
    ]
    return [asdict(row) for row in sorted(rows, key=lambda row: list(ways).index(row.way))]


def _phases(lineup: Lineup, name: str) -> dict[str, Callable[[], object]]:
    """What is run of a way, by phase; the way is active meanwhile."""
    steered, ids = lineup.made[name], lineup.prompt(-1)
    if name in lineup.steps:
        lineup.steps[name].rewind()
        return {DECODE: lambda: lineup.steps[name].advance(STEPS)}
    if not lineup.ways[name].module:
        length = {"max_new_tokens": STEPS, "min_new_tokens": STEPS}
        return {GENERATE: lambda: steered.generate(ids, do_sample=False, **length)}
    cache: list[Any] = []

    def prefill() -> None:
        cache[:] = [lineup.prefill(name)]

    def decode() -> None:
        for _ in range(STEPS):
            lineup.decode(name, cache[0])

    return {PREFILL: prefill, DECODE: decode}


@torch.no_grad()
def _run(
    name: str, steered: Steered, phases: Mapping[str, Callable[[], object]], device: torch.device
) -> dict[str, float]:
    """Runs all phases inside their ranges; seconds until each was queued."""
    seconds = {}
    with steered.active():
        wait(device)
        with record_function(name):
            for phase, run in phases.items():
                with record_function(_range(name, phase)):
                    begin = time.perf_counter()
                    run()
                    seconds[phase] = time.perf_counter() - begin
                    wait(device)
    return seconds


def _range(name: str, phase: str) -> str:
    return f"{name}: {phase}"


def summary(events: Iterable[Any], name: str, phase: str, seconds: float, device: torch.device) -> Traced:
    """What happened within a range; on a GPU nothing of another range is left over, for each ends with a wait."""
    events = list(events)
    (within,) = (e.time_range for e in events if e.name == _range(name, phase) and e.device_type == DeviceType.CPU)
    kind = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    own = [
        e
        for e in events
        if e.device_type == kind
        and not e.is_user_annotation
        and within.start <= e.time_range.start
        and e.time_range.end <= within.end
    ]
    times = 1 if phase == PREFILL else STEPS
    spent: dict[str, list[float]] = defaultdict(list)
    for e in own:
        spent[e.name].append((e.time_range.elapsed_us() if kind == DeviceType.CUDA else e.self_cpu_time_total) * 1e-6)
    longest = sorted(spent.items(), key=lambda item: -sum(item[1]))[:TOP]
    top = tuple((operation, sum(values) / times, len(values) / times) for operation, values in longest)
    if kind == DeviceType.CUDA:
        launches, busy = len(own), sum(map(sum, spent.values())) / times
    else:
        launches, busy = sum(e.cpu_parent is None or e.cpu_parent.is_user_annotation for e in own), None
    return Traced(name, phase, seconds / times, busy, launches / times, top)


def show_trace(rows: Iterable[Mapping[str, Any]], console: Console) -> None:
    """A line for each way and phase."""
    lines = []
    for row in rows:
        if row["reason"]:
            lines.append([row["way"], "", "", "", "", row["reason"]])
            continue
        device = "" if row["device_seconds"] is None else f"{1e6 * row['device_seconds']:.0f}"
        top = ", ".join(f"{calls:g} x {name[:60]} {1e6 * seconds:.1f}" for name, seconds, calls in row["top"])
        lines.append(
            [row["way"], row["phase"], f"{1e6 * row['host_seconds']:.0f}", device, f"{row['launches']:g}", top]
        )
    head = ["way", "phase", "host, us", "device, us", "launches", "longest operations, us"]
    title = "A prefill, and a decoded token; under the profiler, which slows the host:"
    console.print(Markdown(f"{title}\n\n{table(head, lines)}"))
