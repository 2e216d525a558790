"""Times every way to steer a projection on a GPU; or settings for each kernel, of which the device's table is written.

    python -m bench.dispatch [--shapes 4096x14336 ...] [--tokens 1 16 ...]
    python -m bench.dispatch --write-table
    python -m bench.dispatch --table-from bench/results/nvidia-h200/settings-2026-11-27.json

Ratios are to PyTorch's plain product in the same round, in CUDA graphs, inputs rotated over more than three times the
L2 cache; nothing is timed that is not within twice plain PyTorch's own error. --write-table tries settings instead
(bench/settings.py), adds them to the results, and writes the kernels' table of this device from all results of its
settings; --table-from writes it from files, on any machine. On a CPU only --quick runs: tiny shapes, to see that
everything works. Its times mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from austeer.costs.ceilings import Ceilings, ceilings
from austeer.errors import AusteerError

from . import command, files, kernel_tables, report, settings
from .cases import PLAIN, RIVALS, Case
from .graphs import Replay, interleaved, ratios, relative_error, spread, warm_up

#: out x in: the square and the two projections of 8B and 70B models, and of smaller ones.
SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (8192, 8192), (8192, 28672))
SHAPES += ((576, 1536), (2048, 2048), (2048, 8192))
TOKENS = (1, 4, 16, 64, 512, 4096)
QUICK_SHAPES, QUICK_TOKENS = ((48, 64), (160, 112)), (1, 16)


def measure(case: Case, best: Ceilings, rounds: int) -> dict[str, Any]:
    """One row of the result: every variant of a case, checked, then timed."""
    variants = case.variants()
    errors = {name: variant.check() for name, variant in variants.items()}
    replays = {}
    for name, variant in variants.items():
        floor = best.seconds(variant.nbytes, variant.operations, 0)
        replays[name] = Replay(variant.calls, case.device, floor)
        if variant.pure:
            # The graph holds what was checked: its last call gives what the same call gives outside of it.
            difference = relative_error(replays[name].run(), variant.calls[-1]().double())
            if difference > torch.finfo(case.dtype).eps:
                raise AssertionError(f"{name}, {case}: a replay differs from the call by {difference:.2e}")
    seconds = interleaved(replays, rounds)
    rows = {}
    for name, variant in variants.items():
        median = spread(seconds[name]).median
        rows[name] = {
            "seconds": dataclasses.asdict(spread(seconds[name])),
            "ratio": dataclasses.asdict(ratios(seconds[name], seconds[PLAIN])),
            "of_bandwidth": variant.nbytes / median / best.bandwidth,
            "of_floor": best.seconds(variant.nbytes, variant.operations, 0) / median,
            "error": errors[name][0],
            "plain_error": errors[name][1],
            "bytes": variant.nbytes,
            "operations": variant.operations,
            "calls_a_sample": replays[name].count,
        }
    over_rival = {}
    for name, rivals in RIVALS.items():
        if name not in variants:
            continue
        rival = min(rivals, key=lambda r: rows[r]["seconds"]["median"])
        over_rival[name] = {"rival": rival} | dataclasses.asdict(ratios(seconds[name], seconds[rival]))
    fixed = {"n": case.n, "k": case.k, "tokens": case.tokens, "copies": case.copies}
    return fixed | {"variants": rows, "over_rival": over_rival}


def run(options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Measures case by case; gives, after each, the content of the result file so far."""
    dtype = getattr(torch, options.dtype)
    warm_up(device)
    best = ceilings(device, dtype)
    report.say(f"memory {best.bandwidth / 1e12:.2f} TB/s, matmul {best.flops / 1e12:.1f} TFLOP/s ({options.dtype})")
    rows: list[dict[str, Any]] = []
    about = files.about(device, options.commit)
    for n, k in options.shapes:
        for tokens in options.tokens:
            case = Case(n, k, tokens, dtype, device)
            report.say(str(case))
            rows.append(measure(case, best, options.rounds))
            del case  # before the next one's inputs are made
            yield {
                "kind": "dispatch",
                "environment": about,
                "dtype": options.dtype,
                "rounds": options.rounds,
                "quick": options.quick,
                "complete": len(rows) == len(options.shapes) * len(options.tokens),
                "ceilings": best.to_json(),
                "rows": rows,
            }


def _shape(text: str) -> tuple[int, int]:
    sizes = text.lower().split("x")
    if len(sizes) != 2 or not all(size.isdecimal() and int(size) for size in sizes):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected OUTxIN, such as 4096x14336")
    return int(sizes[0]), int(sizes[1])


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, with the defaults of --quick filled in."""
    parser = command.parser("dispatch", __doc__, quick="two tiny shapes, few rounds")
    parser.add_argument("--write-table", action="store_true", help="try settings; write this device's table from them")
    parser.add_argument("--table-from", nargs="+", type=Path, metavar="FILE", help="only write the table, from results")
    parser.add_argument("--shapes", nargs="+", type=_shape, metavar="OUTxIN", help="default: all")
    parser.add_argument("--tokens", nargs="+", type=int, help=f"default: {' '.join(map(str, TOKENS))}")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=command.rounds, help="default: 15, quick: 3; at least 2")
    options = parser.parse_args(argv)
    whole = options.tokens is None and not options.quick
    shapes, tokens = (settings.SHAPES, settings.TOKENS) if options.write_table else (SHAPES, TOKENS)
    options.shapes = options.shapes or (QUICK_SHAPES if options.quick else shapes)
    options.tokens = sorted(options.tokens or (QUICK_TOKENS if options.quick else tokens))
    options.rounds = options.rounds or (3 if options.quick else 15)
    if options.table_from:
        return options
    if not torch.cuda.is_available():
        if options.write_table:
            parser.error("--write-table: found no GPU, and a table may only hold what was measured on one")
        if not options.quick:
            parser.error("found no GPU; on a CPU only --quick runs, to see that everything works")
    if options.write_table and not whole:
        parser.error(
            "--write-table: found --quick or --tokens, expected the whole series: a limit is about every "
            "smaller number of tokens"
        )
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status: 1 where a result that a table is to be made of cannot be read."""
    options, device = parse(argv), command.device()
    if options.table_from:
        try:
            report.say(f"written: {kernel_tables.write(options.table_from)}")
        except AusteerError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    elif options.write_table:
        path, _ = command.measure(kernel_tables.KIND, options, settings.run(options, device))
        results = sorted(path.parent.glob(f"{kernel_tables.KIND}-2*.json"), key=lambda p: (len(p.name), p.name))
        report.say(f"written: {kernel_tables.write(results)}")
    else:
        command.measure("dispatch", options, run(options, device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
