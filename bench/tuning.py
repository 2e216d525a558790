"""The best launch settings for one operation and shape, from a declared list of candidates.

Each candidate passes the correctness gate, then all are timed in a few interleaved rounds, then the fastest once more,
beside the settings that are in use now. A setting that the ahead-of-time check (aot.py) objects to is not taken.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from austeer.costs.ceilings import Ceilings
from austeer_kernels import launch

from .cases import Case, Variant
from .graphs import Replay, Spread, interleaved, ratios

#: (block_n, block_k, warps, stages) of the projection, all tokens in one block of 16, 32 or 64, so that the weights
#: are read once; the tables of a plan a token leave shared memory for blocks of up to 32.
PROJECTION = ((32, 128, 4, 5), (32, 256, 4, 4), (64, 64, 4, 6), (64, 128, 4, 4), (64, 128, 4, 5), (64, 128, 8, 5))
PROJECTION += ((64, 256, 4, 3), (64, 256, 8, 4), (128, 64, 4, 5), (128, 64, 8, 5), (128, 128, 4, 3), (128, 128, 8, 4))
#: What a program may have on an H100; a smaller GPU refuses a candidate by itself.
SHARED_BYTES = 227 * 1024
#: How many programs a multiprocessor K is split for; 0: not at all.
PROGRAMS, MOST_SPLITS = (0, 1, 2, 4), 32
#: (block_m, block_n, warps) of the sparse kernel.
COLUMNS = tuple(
    (m, n, w) for m in (1, 2, 4, 8, 16, 32) for n in (16, 32, 64, 128) for w in (1, 2, 4) if m * n <= 1024 * w
)

#: Rounds of the first look, and how many candidates get a second one.
FIRST_ROUNDS, FINALISTS = 3, 4


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What was found for one operation and shape.

    Attributes:
        entry: the best settings, as a row of a table; may be those in use now.
        gain: their time over that of the settings in use now (under 1: faster).
        tried: how many candidates were timed. skipped: setting -> why it was not, or not taken.
    """

    entry: launch.Entry
    gain: Spread
    tried: int
    skipped: dict[str, str]


def candidates(op: str, m: int, n: int, k: int, dtype: str) -> Iterator[launch.Entry]:
    """Entries for a shape, best read as a grid: tiles by splits. A projection is tuned for up to launch.MOST_TOKENS."""
    make = functools.partial(launch.Entry, op=op, dtypes=(dtype,), m=m, n=n, k=k)
    if op == "steer_columns_":
        for block_m, block_n, warps in COLUMNS:
            yield make(block_m=block_m, block_n=block_n, num_warps=warps)
        return
    block_m = 16 if m <= 16 else 32 if m <= 32 or op == "steered_linear_rows" else 64
    # At most: the pipeline need not hold the tables of a plan a token whole.
    table_bytes = block_m * (10 if op == "steered_linear_rows" else 2)
    for block_n, block_k, warps, stages in PROJECTION:
        tile = {"block_m": block_m, "block_n": block_n, "block_k": block_k, "num_warps": warps, "num_stages": stages}
        if stages * block_k * (2 * block_n + table_bytes) <= SHARED_BYTES:
            for programs in PROGRAMS:
                yield make(**tile, programs_per_processor=programs, max_splits=MOST_SPLITS if programs else 1)


def tune(op: str, case: Case, best: Ceilings, rounds: int, count: int = 0) -> Tuned:
    """The best settings of ``op`` for a case (of ``steer_columns_``, with ``count`` columns).

    An entry serves steering at the input and at the output, so both count.
    """
    if op == "steer_columns_":
        variants: Sequence[Variant] = [case.alone(count)]
        shape = (case.tokens, count, 0)
    else:
        variants = [case.fused(at_input, op == "steered_linear_rows") for at_input in (False, True)]
        shape = (case.tokens, case.n, case.k)
    short = str(case.dtype).removeprefix("torch.")
    now, used = (find(op, *shape, case.dtype, case.device) for find in (launch.settings, launch.nearest))
    m, n, k = shape
    entries = {now: dataclasses.replace(used, dtypes=(short,), m=m, n=n, k=k)}
    for entry in candidates(op, m, n, k, short):
        with launch.preferring([entry]):
            entries.setdefault(launch.settings(op, m, n, k, case.dtype, case.device), entry)
    replays: dict[launch.Settings, list[Replay]] = {}
    skipped: dict[str, str] = {}
    for setting, entry in entries.items():
        try:
            with launch.preferring([entry]):
                replays[setting] = [_checked(variant, case, best) for variant in variants]
        except Exception as error:  # too much shared memory, a tile that does not compile, a wrong result
            if setting == now:
                raise
            skipped[_name(setting)] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            if case.device.type == "cuda":
                torch.cuda.synchronize(case.device)  # raises where the device itself has failed
    tried = len(replays)
    first = _seconds(replays, FIRST_ROUNDS)
    ranked = sorted(replays, key=lambda setting: statistics.median(first[setting]))
    finalists = {setting: replays[setting] for setting in (now, *ranked[:FINALISTS])}
    second = _seconds(finalists, rounds)
    for setting in sorted(finalists, key=lambda setting: statistics.median(second[setting])):
        problems = () if setting == now else objections(entries[setting], launch.names_of(case.device)[0])
        if not problems:
            return Tuned(entries[setting], ratios(second[setting], second[now]), tried, skipped)
        skipped[_name(setting)] = problems[0]
    raise AssertionError("the settings in use now are always a finalist")


def _checked(variant: Variant, case: Case, best: Ceilings) -> Replay:
    variant.check()
    return Replay(variant.calls, case.device, best.seconds(variant.nbytes, variant.operations, 0))


def _seconds(replays: Mapping[launch.Settings, Sequence[Replay]], rounds: int) -> dict[launch.Settings, list[float]]:
    """The time of all of a setting's variants together, round by round."""
    flat = {f"{i} {j}": replay for i, group in enumerate(replays.values()) for j, replay in enumerate(group)}
    seconds = interleaved(flat, rounds)
    return {
        setting: [sum(parts) for parts in zip(*(seconds[f"{i} {j}"] for j in range(len(group))))]
        for i, (setting, group) in enumerate(replays.items())
    }


def _name(s: launch.Settings) -> str:
    return f"{s.block_m}x{s.block_n}x{s.block_k} w{s.num_warps} s{s.num_stages} splits {s.splits}"


def objections(entry: launch.Entry, architecture: str) -> tuple[str, ...]:
    """What the ahead-of-time check finds wrong with an entry (spills, say); nothing where kernels are interpreted."""
    if not architecture.startswith(("sm_", "gfx")):
        return ()
    # The shape of an entry and its splits do not change what is compiled.
    return _objections(dataclasses.replace(entry, m=1, n=1, k=1, programs_per_processor=0, max_splits=1), architecture)


@functools.cache
def _objections(entry: launch.Entry, architecture: str) -> tuple[str, ...]:
    from austeer_kernels import aot

    with launch.preferring([entry]):
        jobs = [job for job in aot.jobs(architecture) if job.setting.startswith("preferred ")]
    rows: list[Any] = [aot.compile_job(job) for job in jobs]
    return tuple(f"{row.kernel} {row.variant}: {problem}" for row in rows for problem in row.problems)
