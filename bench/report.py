"""What the benchmarks print: progress on stderr, tables on stdout."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from .cases import AGAIN, ALONE, COLUMNS, PLAIN, RIVALS

#: Set where the output is to be JSON alone.
quiet = False


def say(text: str) -> None:
    """A line of progress."""
    if not quiet:
        print(text, file=sys.stderr, flush=True)


def wide_console() -> Console:
    """As wide as the terminal, or wide enough for every table where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=180)


def table(title: str, left: Sequence[str], right: Sequence[str] = ()) -> Table:
    """An empty table with texts on the left and numbers on the right."""
    found = Table(title=title)
    for name in left:
        found.add_column(name, overflow="fold")
    for name in right:
        found.add_column(name, justify="right")
    return found


def _spread(of: dict[str, Any]) -> str:
    return f"{of['median']:.3f}\n{of['low']:.2f} to {of['high']:.2f}"


def show_dispatch(content: dict[str, Any]) -> None:
    """Ratios and bandwidths case by case, then the limits."""
    console = wide_console()
    shown = [AGAIN, *RIVALS, *COLUMNS.values(), *(r[0] for name, r in RIVALS.items() if len(r) == 1)]
    title = f"ratio to plain, median and quartiles; {content['environment']['device']}, {content['dtype']}"
    ratios = table(title, [], ("out x in", "tokens", "plain, us", *shown))
    for row in content["rows"]:
        v = row["variants"]
        cells = [f"{row['n']}x{row['k']}", str(row["tokens"]), f"{v[PLAIN]['seconds']['median'] * 1e6:.1f}"]
        ratios.add_row(*cells, *(_spread(v[name]["ratio"]) if name in v else "" for name in shown))
    console.print(ratios)
    shown = [PLAIN, *RIVALS, COLUMNS[100], *ALONE.values()]
    times = table("microseconds, and share of the measured copy bandwidth", [], ("out x in", "tokens", *shown))
    for row in content["rows"]:
        v = row["variants"]
        found = (v.get(name) for name in shown)  # more tokens than the fused kernel takes
        cells = (f"{f['seconds']['median'] * 1e6:.2f}\n{f['of_copy_bandwidth']:.0%}" if f else "" for f in found)
        times.add_row(f"{row['n']}x{row['k']}", str(row["tokens"]), *cells)
    console.print(times)
    for limit in content["limits"]:
        console.print(f"fused up to {limit['m']} tokens at {limit['n']}x{limit['k']}")
    if not content["limits"]:
        console.print("fused at no shape: it was slower than product and columns at the fewest tokens already")


def show_host(content: dict[str, Any]) -> None:
    """Host microseconds a site, variant by variant."""
    console = wide_console()
    e = content["environment"]
    for batch in content["batches"]:
        title = (
            f"host time that a steered site adds to a call, us; batch {batch['batch']}, {content['rounds']} rounds; "
            f"{e['device']}, {content['dtype']}"
        )
        times = table(title, ("variant", "path"), ("median", "quartiles"))
        for name, row in batch["variants"].items():
            us = row["us_by_itself"]
            times.add_row(name, row["path"], f"{us['median']:.2f}", f"{us['low']:.2f} to {us['high']:.2f}")
        console.print(times)


def _ways(console: Console, title: str, row: dict[str, Any], references: list[str]) -> None:
    """One set: rates, ratios as run and at many pairs, and what was run, way by way."""
    from .compare import MANY

    def ratio(way: dict[str, Any], reference: str) -> str:
        if reference not in way["faster_than"]:
            return ""
        many = way[f"faster_than_at_{MANY}"][reference]["median"]
        return f"{_spread(way['faster_than'][reference])}\nat {MANY} pairs {many:.2f}"

    rates = table(
        f"{title}{row['set']}: {row['tokens_a_text']['median']:.0f} tokens a text (median)",
        ["way"],
        ["pairs", "pairs/s", *(f"x {name}" for name in references), "tokens run", "of texts", "counts differ"],
    )
    for name, way in row["ways"].items():
        rates.add_row(
            *(name, str(way["pairs"]), f"{way['pairs_a_second']:.2f}", *(ratio(way, of) for of in references)),
            *(str(way["tokens_run"]), f"{way['tokens_run'] / way['tokens']:.2f}", str(way["differing_counts"])),
        )
    console.print(rates)


def show_momentum(content: dict[str, Any]) -> None:
    """Rates and ratios set by set, memory, weights on disk, and what a GPU adds."""
    from .offloaded import LAYERWISE, RESIDENT
    from .ways import PUBLIC, STACKED

    console = wide_console()
    console.print(f"{content['environment']['device']}; pairs: {content['data']}; {content['rounds']} rounds")
    for row in content["sets"]:
        _ways(console, "", row, [PUBLIC, STACKED])
    if content["memory"]:
        memory = table("peak memory over the loaded model, demo pairs", ["way"], ["pairs", "MB", "MB a further pair"])
        for extra in content["memory"]:
            few, many = extra["runs"]
            growth = (many["bytes"] - few["bytes"]) / (many["pairs"] - few["pairs"])
            sizes = (f"{few['bytes'] / 1e6:.0f}\n{many['bytes'] / 1e6:.0f}", f"{growth / 1e6:.2f}")
            memory.add_row(extra["way"], f"{few['pairs']}\n{many['pairs']}", *sizes)
        console.print(memory)
    for case, row in (content["offloaded"] or {"cases": {}})["cases"].items():
        _ways(console, f"{case}; ", row, [RESIDENT, STACKED, PUBLIC])
        read, weights = row["ways"][LAYERWISE]["report"]["weights_read"], content["offloaded"]["weights"]
        console.print(
            f"{LAYERWISE}: {read / 1e6:.0f} MB of weights read, {read / weights:.2f}x the decoder's; the disk gave "
            f"{row['read_from_disk'] / 1e9:.2f} GB to all ways and rounds"
        )
    if content["kernel"]:
        console.print(counting(content["kernel"]))
    if content["large"]:
        for row in content["large"]["sets"]:
            _ways(console, f"random {content['large']['shape']['name']}, ", row, [STACKED])
        for extra in content["large"]["memory"]:
            sizes = ", ".join(f"{nbytes / 1e6:.0f} MB at {pairs} pairs" for pairs, nbytes in extra["bytes"].items())
            console.print(f"{extra['set']}, {extra['way']}: peak device memory over the model {sizes}")


def counting(kernel: dict[str, Any]) -> str:
    """The counting kernel, in a sentence."""
    return (
        f"The counting kernel reads [{kernel['pairs']}, {kernel['columns']}] {kernel['dtype']} in "
        f"{kernel['seconds']['kernel']['median'] * 1e6:.1f} us, at {kernel['of_copy_bandwidth']:.0%} of the copy "
        f"bandwidth, {kernel['faster_than_eager']['median']:.1f} times as fast as PyTorch's own operations."
    )
