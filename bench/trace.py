"""A Chrome trace of every way at work, for https://ui.perfetto.dev."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import PreTrainedModel

from austeer.errors import AusteerError

from .graphs import wait
from .lineup import MEASURED, Case, Lineup
from .published.tables import table
from .report import show_markdown
from .steered import Steered, Way

ENDINGS = (".json", ".json.gz")
#: Decoded tokens of each way.
STEPS = 4
PREFILL, DECODE, GENERATE = "prefill", "decode", "generate"


def check_trace_path(path: Path | str) -> Path:
    """The path, if a trace can be written there.

    Raises:
        AusteerError: it cannot.
    """
    path = Path(path)
    if not path.name.endswith(ENDINGS) or path.name in ENDINGS:
        raise AusteerError(f"trace: found the name {path.name!r}, expected one that ends in {' or '.join(ENDINGS)}")
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise AusteerError(f"trace: found that {path} cannot be written, expected a file in a folder that is there")
    return path


def write_trace(
    model: PreTrainedModel,
    case: Case,
    ways: Mapping[str, Way],
    path: Path | str,
    on_way: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Profiles one prefill and a few decoding steps under each way, and writes the trace.

    Each way runs inside a range of its own name, after a warm-up and the gate. Compiled or captured steps have no
    prefill of their own.

    Returns:
        For each way its phases ("prefill" and "decode", or "generate" for a way that can only generate as a whole) with
        the seconds until everything was queued, of one token or of the one prefill; or the reason why it has none.

    Raises:
        AusteerError: nothing can be written there, or the model cannot have the case; before any work.
    """
    path = check_trace_path(path)
    case.check(model)
    with Lineup(model, case, ways, on_way) as lineup:
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
    rows = [
        {"way": name, "phase": phase, "host_seconds": seconds / (1 if phase == PREFILL else STEPS), "reason": ""}
        for (name, phase), seconds in host.items()
    ]
    rows += [
        {"way": name, "phase": "", "host_seconds": None, "reason": f"{row['status']}: {row['reason']}"}
        for name, row in lineup.rows.items()
        if row["status"] != MEASURED
    ]
    return sorted(rows, key=lambda row: list(ways).index(row["way"]))


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
                with record_function(f"{name}: {phase}"):
                    begin = time.perf_counter()
                    run()
                    seconds[phase] = time.perf_counter() - begin
                    wait(device)
    return seconds


def show_trace(rows: Iterable[Mapping[str, Any]], path: Path, console: Console) -> None:
    """A line for each way and phase, and where the trace lies."""
    lines = [
        [row["way"], row["phase"], "" if row["reason"] else f"{1e6 * row['host_seconds']:.0f}", row["reason"]]
        for row in rows
    ]
    title = "A prefill, and a decoded token; under the profiler, which slows the host:"
    show_markdown(f"{title}\n\n{table(['way', 'phase', 'host, us', 'not in the trace'], lines)}", console)
    console.print(f"wrote {path}; open it in https://ui.perfetto.dev or chrome://tracing")
