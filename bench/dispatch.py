"""Times every way to steer a projection on a GPU, and writes from how few tokens on the fused kernel is worth while.

    python -m bench.dispatch [--write-table] [--shapes 4096x14336 ...] [--tokens 1 16 ...]

Ratios are to PyTorch's plain product in the same round, in CUDA graphs, inputs rotated over more than three times the
L2 cache; nothing is timed that is not within twice plain PyTorch's own error. --write-table puts into the kernels'
table of this device, for each shape, the number of tokens up to which the fused kernel was no slower, in each of its
forms, than what it replaces. On a CPU only --quick runs: tiny shapes, to see that everything works. Its times mean
nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import glob
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from austeer.costs.ceilings import Ceilings, ceilings
from austeer_kernels import launch

from . import command, files, report
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
            "of_copy_bandwidth": variant.nbytes / median / best.bandwidth,
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


def limits(rows: Iterable[dict[str, Any]], dtype: str) -> list[launch.Limit]:
    """For each shape the largest number of tokens up to which no form of the fused kernel was ever slower."""
    found: dict[tuple[int, int], int] = {}
    stopped = set()
    for row in sorted(rows, key=lambda row: row["tokens"]):
        shape = row["n"], row["k"]
        if not row["over_rival"]:  # more tokens than the kernel takes
            continue
        if any(form["median"] > 1 for form in row["over_rival"].values()):
            stopped.add(shape)
        elif shape not in stopped:
            found[shape] = row["tokens"]
    return [launch.Limit((dtype,), n, k, m) for (n, k), m in sorted(found.items())]


def run(options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Measures case by case; gives, after each, the content of the result file so far."""
    dtype = getattr(torch, options.dtype)
    warm_up(device)
    best = ceilings(device, dtype)
    report.say(f"copy {best.bandwidth / 1e12:.2f} TB/s, matmul {best.flops / 1e12:.1f} TFLOP/s ({options.dtype})")
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
                "limits": [dataclasses.asdict(limit) for limit in limits(rows, options.dtype)],
            }


def write_table(content: dict[str, Any], names: tuple[str, str], file: Path, source: str) -> None:
    """Puts a result's limits into the kernels' table of a device, made or updated, and reads it back.

    Earlier limits of the same shapes are replaced, also by none; launch settings stay.

    Args:
        names: the device's, from ``launch.names_of``. source: where the numbers come from; earlier sources stay.

    Raises:
        ValueError: the file is for other devices.
    """
    kept: dict[str, Any] = {"architectures": [names[0]], "devices": [glob.escape(names[1])], "entries": [], "fused": []}
    if file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
        for key in ("devices", "architectures"):
            if found[key] != kept[key]:
                raise ValueError(f"{file} is for {key} {found[key]}, expected {kept[key]}")
        kept |= found
    shapes = {(row["n"], row["k"]) for row in content["rows"]}
    fused = [row for row in kept["fused"] if row["dtypes"] != [content["dtype"]] or (row["n"], row["k"]) not in shapes]
    fused += content["limits"]
    sources = [*kept.get("source", "").split("; "), source]
    head = {"source": "; ".join(dict.fromkeys(filter(None, sources))), **{key: kept[key] for key in list(kept)[:2]}}
    parts = [f'  "{name}": {json.dumps(value)}' for name, value in head.items()]
    for name, rows in (("entries", kept["entries"]), ("fused", fused)):
        lines = ",\n".join(f"    {json.dumps(row)}" for row in sorted(rows, key=_key))
        parts.append(f'  "{name}": [\n{lines}\n  ]' if lines else f'  "{name}": []')
    file.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    launch.forget()
    launch.tables()  # says where a row does not fit


def _key(row: dict[str, Any]) -> tuple:
    return row.get("op", ""), list(row["dtypes"]), row["n"], row.get("k", 0), row["m"]


def _shape(text: str) -> tuple[int, int]:
    sizes = text.lower().split("x")
    if len(sizes) != 2 or not all(size.isdecimal() and int(size) for size in sizes):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected OUTxIN, such as 4096x14336")
    return int(sizes[0]), int(sizes[1])


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, with the defaults of --quick filled in."""
    parser = command.parser("dispatch", __doc__, quick="two tiny shapes, few rounds")
    parser.add_argument("--write-table", action="store_true", help="update the kernels' table of this device")
    parser.add_argument("--shapes", nargs="+", type=_shape, metavar="OUTxIN", help="default: all")
    parser.add_argument("--tokens", nargs="+", type=int, help=f"default: {' '.join(map(str, TOKENS))}")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=command.rounds, help="default: 15, quick: 3; at least 2")
    options = parser.parse_args(argv)
    whole = options.tokens is None and not options.quick
    options.shapes = options.shapes or (QUICK_SHAPES if options.quick else SHAPES)
    options.tokens = sorted(options.tokens or (QUICK_TOKENS if options.quick else TOKENS))
    options.rounds = options.rounds or (3 if options.quick else 15)
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
    """The command line. Returns the exit status."""
    options, device = parse(argv), command.device()
    path, content = command.measure("dispatch", options, run(options, device))
    if options.write_table:
        table = launch.TABLES / f"{files.device_slug(device)}.json"
        versions = content["environment"]["packages"]
        source = f"measured with torch {versions['torch']}, triton {versions['triton']}: {path.name}"
        write_table(content, launch.names_of(device), table, source)
        report.say(f"written: {table}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
