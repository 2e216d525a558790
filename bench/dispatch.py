"""Times every way to steer a projection on a GPU, and writes from how few tokens on the fused kernel is worth while.

    python -m bench.dispatch [--tune] [--write-table] [--shapes 4096x14336 ...] [--tokens 1 16 ...]

Ratios are to PyTorch's plain product in the same round, in CUDA graphs, inputs rotated over more than three times the
L2 cache; nothing is timed that is not within twice plain PyTorch's own error. With --tune the best launch settings are
searched first (some minutes a large shape: give a few --shapes at a time, tables are updated). With --write-table the
kernels' table of this device gets them, and for each shape the number of tokens up to which the fused kernel was no
slower than the product and the sparse kernel, at that and every smaller number measured, in each of its forms. Beyond
launch.MOST_TOKENS it is not timed: there the product and the sparse kernel run.

On a CPU only --quick runs: tiny shapes, to see that everything works. Its times mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from austeer_kernels import launch

from . import files, report, tables, tuning
from .cases import ALONE, COLUMNS, FUSED, PLAIN, RIVALS, Case
from .graphs import Ceilings, Replay, interleaved, measure_ceilings, ratios, relative_error, spread, warm_up

#: out x in: the square and the two projections of 8B and 70B models, and of smaller ones.
SHAPES = (
    (4096, 4096),
    (4096, 14336),
    (14336, 4096),
    (8192, 8192),
    (8192, 28672),
    (576, 1536),
    (2048, 2048),
    (2048, 8192),
)
TOKENS = (1, 4, 16, 64, 512, 4096)
QUICK_SHAPES, QUICK_TOKENS = ((48, 64), (160, 112)), (1, 16)

FUSED_TOKENS, FUSED_RATIO = (1, 4, 16), 1.00
COLUMNS_TOKENS, COLUMNS_RATIO = (512, 4096), 1.02
ALONE_SECONDS = 3e-6


@dataclasses.dataclass(frozen=True)
class Goal:
    """A number that was to be reached, and what was.

    Attributes:
        value, limit: a ratio, or seconds.
    """

    text: str
    case: str
    value: float
    limit: float

    @property
    def met(self) -> bool:
        return self.value <= self.limit


def measure(case: Case, ceilings: Ceilings, rounds: int) -> dict[str, Any]:
    """One row of the result: every variant of a case, checked, then timed."""
    variants = case.variants()
    errors = {name: variant.check() for name, variant in variants.items()}
    case.forget_references()
    replays = {}
    for name, variant in variants.items():
        floor = ceilings.floor(variant.nbytes, variant.operations)
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
            "of_copy_bandwidth": variant.nbytes / median / ceilings.copy,
            "of_floor": ceilings.floor(variant.nbytes, variant.operations) / median,
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


def goals(rows: Iterable[dict[str, Any]]) -> list[Goal]:
    """What is to be reached, and what was, for each row that a goal is about."""
    found = []
    for row in rows:
        case, variants = f"{row['n']}x{row['k']}, {row['tokens']} tokens", row["variants"]
        if row["tokens"] in FUSED_TOKENS:
            text = f"fused at {', '.join(map(str, FUSED_TOKENS))} tokens <= {FUSED_RATIO:.2f}x plain"
            found.append(Goal(text, case, variants[FUSED]["ratio"]["median"], FUSED_RATIO))
        if row["tokens"] in COLUMNS_TOKENS:
            text = f"product and columns at {', '.join(map(str, COLUMNS_TOKENS))} tokens <= {COLUMNS_RATIO:.2f}x plain"
            for count, name in COLUMNS.items():
                found.append(Goal(text, f"{case}, k={count}", variants[name]["ratio"]["median"], COLUMNS_RATIO))
        for count, name in ALONE.items():
            text = f"columns alone <= {ALONE_SECONDS * 1e6:.0f} us"
            found.append(Goal(text, f"{case}, k={count}", variants[name]["seconds"]["median"], ALONE_SECONDS))
    return found


def tuned_projection(case: Case, ceilings: Ceilings, rounds: int) -> list[tuning.Tuned]:
    """The best settings of the fused kernel for a case, with one plan and with a plan a token."""
    return [tuning.tune(op, case, ceilings, rounds) for op in ("steered_linear", "steered_linear_rows")]


def tuned_columns(
    tokens: Sequence[int], dtype: torch.dtype, device: torch.device, ceilings: Ceilings, rounds: int
) -> list[tuning.Tuned]:
    """The best settings of the sparse kernel; they do not depend on the projection."""
    found = []
    for m in tokens:
        case = Case(4096, 16, m, dtype, device)
        found += [tuning.tune("steer_columns_", case, ceilings, rounds, count) for count in list(ALONE)[1:]]
    return found


def run(options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Measures case by case; gives, after each, the content of the result file so far."""
    dtype = getattr(torch, options.dtype)
    warm_up(device)
    ceilings = measure_ceilings(device, dtype)
    report.say(f"copy {ceilings.copy / 1e12:.2f} TB/s, matmul {ceilings.matmul / 1e12:.1f} TFLOP/s ({options.dtype})")
    rows: list[dict[str, Any]] = []
    tuned: list[tuning.Tuned] = []
    about = files.about(device, options.commit)
    if options.tune:
        tuned += tuned_columns(options.tokens, dtype, device, ceilings, options.rounds)
    for n, k in options.shapes:
        for tokens in options.tokens:
            case = Case(n, k, tokens, dtype, device)
            report.say(str(case))
            if options.tune and tokens <= launch.MOST_TOKENS:
                tuned += tuned_projection(case, ceilings, options.rounds)
            with launch.preferring([t.entry for t in tuned]):
                rows.append(measure(case, ceilings, options.rounds))
            del case  # before the next one's inputs are made
            yield {
                "kind": "dispatch",
                "environment": about,
                "dtype": options.dtype,
                "rounds": options.rounds,
                "quick": options.quick,
                "complete": len(rows) == len(options.shapes) * len(options.tokens),
                "ceilings": dataclasses.asdict(ceilings),
                "rows": rows,
                "limits": [dataclasses.asdict(limit) for limit in limits(rows, options.dtype)],
                "goals": [dataclasses.asdict(goal) | {"met": goal.met} for goal in goals(rows)],
                "tuned": [dataclasses.asdict(t) for t in tuned],
            }


def write_table(content: dict[str, Any], names: tuple[str, str], file: Path, source: str) -> None:
    """Puts a result's limits and settings into a table."""
    tables.update(
        file,
        names,
        source,
        content["dtype"],
        {(row["n"], row["k"]) for row in content["rows"]},
        [launch.Limit(**limit) for limit in content["limits"]],
        [launch.Entry(**t["entry"]) for t in content["tuned"]],
    )


def _shape(text: str) -> tuple[int, int]:
    sizes = text.lower().split("x")
    if len(sizes) != 2 or not all(size.isdecimal() and int(size) for size in sizes):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected OUTxIN, such as 4096x14336")
    return int(sizes[0]), int(sizes[1])


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """The options, with the defaults of --quick filled in."""
    parser = argparse.ArgumentParser(prog="python -m bench.dispatch", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=files.ROOT / "bench" / "results", help="folder of the results")
    parser.add_argument("--write-table", action="store_true", help="update the kernels' table of this device")
    parser.add_argument("--tune", action="store_true", help="search the best launch settings first")
    parser.add_argument("--quick", action="store_true", help="two tiny shapes, few rounds: only to see that it runs")
    parser.add_argument("--json", action="store_true", help="print the result as JSON instead of tables")
    parser.add_argument("--shapes", nargs="+", type=_shape, metavar="OUTxIN", help="default: all")
    parser.add_argument("--tokens", nargs="+", type=int, help=f"default: {' '.join(map(str, TOKENS))}")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, help="default: 15, quick: 3; at least 2")
    parser.add_argument("--commit", help="the commit, where this copy of the code has no git folder")
    options = parser.parse_args(argv)
    whole = options.tokens is None and not options.quick
    options.shapes = options.shapes or (QUICK_SHAPES if options.quick else SHAPES)
    options.tokens = sorted(options.tokens or (QUICK_TOKENS if options.quick else TOKENS))
    options.rounds = options.rounds or (3 if options.quick else 15)
    if options.rounds < 2:
        parser.error("--rounds: expected at least 2, for a spread")
    if not torch.cuda.is_available():
        if options.write_table:
            parser.error("--write-table: found no GPU, and a table may only hold what was measured on one")
        if not options.quick:
            parser.error("found no GPU; on a CPU only --quick runs, to see that everything works")
    if options.write_table and not whole:
        parser.error(
            "--write-table: found --quick or --tokens, expected the whole series: a limit is about every "
            "smaller number of tokens, and a shape's settings must be there for all of them"
        )
    return options, parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status: 0 also where a goal is missed."""
    options, _ = parse(argv)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    report.quiet = options.json
    path = files.new_file(options.out, device, "dispatch-quick" if options.quick else "dispatch")
    content: dict[str, Any] = {}
    for content in run(options, device):
        files.write(path, content)  # after each case: a GPU that is lent may be taken away
    if options.json:
        print(files.dumps(content))
    else:
        report.show_dispatch(content)
    report.say(f"written: {path}")
    if options.write_table:
        table = launch.TABLES / f"{files.device_slug(device)}.json"
        versions = content["environment"]["packages"]
        source = f"measured with torch {versions['torch']}, triton {versions['triton']}: {path.name}"
        write_table(content, launch.names_of(device), table, source)
        report.say(f"written: {table}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
