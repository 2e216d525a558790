"""Times settings for every kernel on a GPU, to write its table from: a result of kind "settings".

Each form of the projection is timed beside PyTorch's plain product, the product with the sparse kernel, and the kernel
with the settings of today ("now"); all in CUDA graphs, in turns, on rotated inputs. Settings that do not fit the
device, or give a wrong result, are counted as bad and get no time.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from austeer.costs.ceilings import Ceilings, ceilings
from austeer_kernels import launch

from . import files, kernel_tables, large, report
from .cases import Case
from .graphs import Replay, WrongResultError, interleaved, spread, warm_up

#: out x in: the output projections of an attention and of an MLP, of models of 8B, 9B and 70B.
SHAPES = ((4096, 4096), (4096, 14336), (3584, 14336), (8192, 8192))
TOKENS = (1, 16, 64)
SPLITS = (1, 2, 4, 8)
#: block_n, block_k, warps, stages, by bytes of a value.
TILES = {
    2: (
        *((32, 128, 4, 5), (64, 64, 4, 6), (64, 128, 4, 4), (64, 128, 4, 5)),
        *((64, 256, 4, 3), (128, 64, 8, 4), (128, 128, 8, 3), (128, 128, 8, 4)),
    ),
    4: ((64, 32, 4, 2), (64, 32, 4, 3), (64, 64, 4, 2), (128, 32, 8, 2), (128, 32, 8, 3)),
}
#: Width, tokens and selected columns; block_m, block_n, warps.
COLUMNS = ((4096, 1, 100), (4096, 16, 100), (4096, 512, 100), (4096, 4096, 100), (14336, 4096, 100))
COLUMNS += ((4096, 1, 10), (4096, 16, 10), (4096, 4096, 10))
COLUMNS_BLOCKS = ((1, 128, 4), (1, 64, 2), (1, 32, 1), (2, 32, 1), (8, 16, 4), (8, 64, 4), (16, 16, 4), (16, 128, 4))
#: Pairs and columns; block_m, block_n, warps, stages, programs a multiprocessor.
COUNTING = (1000, 131072)
COUNTING_BLOCKS = tuple(itertools.product((4, 8), (256, 128), (4,), (3, 4), (2, 4)))
#: A quick run tries two of each, at small shapes.
QUICK_COLUMNS, QUICK_COUNTING = ((40, 3, 10), (40, 3, 100)), (6, 100)
NOW = "now"


def run(options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Measures part by part; gives, after each, the content of the result file so far."""
    dtype, few = getattr(torch, options.dtype), 2 if options.quick else None
    warm_up(device)
    best = ceilings(device, dtype)
    architecture, _, processors = launch.device_profile(device)
    about = files.about(device, options.commit) | {"architecture": architecture, "multiprocessors": processors}
    content: dict[str, Any] = {"kind": kernel_tables.KIND, "environment": about, "dtype": options.dtype}
    counted = QUICK_COUNTING if options.quick else COUNTING
    content |= {"rounds": options.rounds, "quick": options.quick, "complete": False, "ceilings": best.to_json()}
    content |= {"forms": [], "sparse us": {}, "counting shape": counted, "counting": {}}
    for (n, k), tokens in itertools.product(options.shapes, options.tokens):
        case = Case(n, k, tokens, dtype, device)
        for at_input, rows in itertools.product((False, True), repeat=2):
            report.say(f"{case}, {launch.form(at_input, rows)}")
            content["forms"].append(one_form(case, at_input, rows, best, options.rounds, few))
            yield content
        del case  # before the next one's inputs are made
    for width, tokens, count in QUICK_COLUMNS if options.quick else COLUMNS:
        case = Case(width, 1, tokens, dtype, device)
        report.say(f"{count} columns of {width}, {tokens} tokens")
        found = columns(case, count, best, options.rounds, few)
        content["sparse us"][f"w{width} m{tokens} k{count}"] = found
    for block in COUNTING_BLOCKS[:few]:
        entry = kernel_tables.counting_entry(*counted, block, (options.dtype,))
        with launch.preferring([entry]):
            found = large.kernel(*counted, dtype, device, options.rounds)
        name = "{}x{} w{} s{} p{}".format(*block)
        content["counting"][name] = {"us": 1e6 * found["seconds"][large.KERNEL]["median"]}
    yield content | {"complete": True}


def candidates(tokens: int, dtype: torch.dtype) -> list[dict[str, int]]:
    """Settings for a projection of some tokens, all of which one tile holds."""
    block_m = max(16, 1 << (tokens - 1).bit_length())
    names = ("block_m", "block_n", "block_k", "num_warps", "num_stages", "splits")
    return [
        dict(zip(names, (block_m, *tile, splits))) for tile, splits in itertools.product(TILES[dtype.itemsize], SPLITS)
    ]


def one_form(case: Case, at_input: bool, rows: bool, best: Ceilings, rounds: int, few: int | None) -> dict[str, Any]:
    """One row: a form of the projection with every candidate, beside what it replaces."""
    shape = {"n": case.n, "k": case.k, "m": case.tokens, "at_input": at_input, "rows": rows}
    processors, dtypes = launch.device_profile(case.device)[2], (str(case.dtype).removeprefix("torch."),)
    variant, rival = case.fused(at_input, rows), case.columns(at_input, rows)
    floor = best.seconds(variant.nbytes, variant.operations, 0)
    others = {"plain": case.plain(), "columns": rival, NOW: variant}
    for other in others.values():
        other.check()
    replays: dict[Any, Replay] = {name: Replay(other.calls, case.device, floor) for name, other in others.items()}
    tried = candidates(case.tokens, case.dtype)[:few]
    for number, settings in enumerate(tried):
        with launch.preferring([kernel_tables.form_entry(shape, settings, dtypes, processors)]):
            _add(replays, number, variant, case.device, floor)
    us = _microseconds(replays, rounds)
    fastest = min((number for number in us if number not in others), key=lambda number: us[number])
    row = shape | {"tried": len(tried), "bad": len(tried) + len(others) - len(us)}
    row |= {f"{name} us": us[name] for name in others}
    return row | {"best us": us[fastest], "best": tried[fastest]}


def columns(case: Case, count: int, best: Ceilings, rounds: int, few: int | None) -> dict[str, float]:
    """Microseconds of ``steer_columns_`` by its settings."""
    variant = case.alone(count)
    floor = best.seconds(variant.nbytes, variant.operations, 0)
    variant.check()
    replays: dict[Any, Replay] = {NOW: Replay(variant.calls, case.device, floor)}
    for block in COLUMNS_BLOCKS[:few]:
        entry = kernel_tables.columns_entry(case.tokens, count, *block, (str(case.dtype).removeprefix("torch."),))
        with launch.preferring([entry]):
            _add(replays, "{} {} w{}".format(*block), variant, case.device, floor)
    return _microseconds(replays, rounds)


def _add(replays: dict[Any, Replay], name: Any, variant: Any, device: torch.device, floor: float) -> None:
    """A variant with the settings preferred now; none where they do not fit the device, or give a wrong result."""
    try:
        variant.check()
        replays[name] = Replay(variant.calls, device, floor)
    except (WrongResultError, *_too_large()) as error:
        report.say(f"{name}: {error}")


def _too_large() -> Iterable[type[Exception]]:
    from triton.runtime.errors import OutOfResources

    return (OutOfResources,)


def _microseconds(replays: dict[Any, Replay], rounds: int) -> dict[Any, float]:
    return {name: 1e6 * spread(values).median for name, values in interleaved(replays, rounds).items()}
