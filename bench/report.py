"""What the benchmarks print: progress on stderr, tables on stdout."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

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


def _spread(of: dict[str, Any]) -> str:
    return f"{of['median']:.3f}\n{of['low']:.2f} to {of['high']:.2f}"


def show_dispatch(content: dict[str, Any]) -> None:
    """Ratios and bandwidths case by case, then the goals, then the limits."""
    from .cases import AGAIN, ALONE, COLUMNS, PLAIN, RIVALS

    console = wide_console()
    shown = [AGAIN, *RIVALS, *COLUMNS.values(), *(r[0] for name, r in RIVALS.items() if len(r) == 1)]
    table = Table(title=f"ratio to plain, median and quartiles; {content['environment']['device']}, {content['dtype']}")
    for name in ("out x in", "tokens", "plain, us", *shown):
        table.add_column(name, justify="right")
    for row in content["rows"]:
        v = row["variants"]
        cells = [f"{row['n']}x{row['k']}", str(row["tokens"]), f"{v[PLAIN]['seconds']['median'] * 1e6:.1f}"]
        table.add_row(*cells, *(_spread(v[name]["ratio"]) if name in v else "" for name in shown))
    console.print(table)
    table = Table(title="microseconds, and share of the measured copy bandwidth")
    shown = [PLAIN, *RIVALS, COLUMNS[100], *ALONE.values()]
    for name in ("out x in", "tokens", *shown):
        table.add_column(name, justify="right")
    for row in content["rows"]:
        v = row["variants"]
        cells = [
            f"{v[name]['seconds']['median'] * 1e6:.2f}\n{v[name]['of_copy_bandwidth']:.0%}" if name in v else ""
            for name in shown
        ]
        table.add_row(f"{row['n']}x{row['k']}", str(row["tokens"]), *cells)
    console.print(table)
    show_goals(content["goals"], console)
    for limit in content["limits"]:
        console.print(f"fused up to {limit['m']} tokens at {limit['n']}x{limit['k']}")
    if not content["limits"]:
        console.print("fused at no shape: it was slower than product and columns at the fewest tokens already")
    if content["quick"]:
        console.print("[bold]--quick: these times mean nothing[/]")


def show_goals(goals: list[dict[str, Any]], console: Console | None = None) -> None:
    """Each goal once: met, or where it was missed, or where noise is larger than the distance to it (met: None)."""
    console = console or wide_console()
    for text in dict.fromkeys(goal["text"] for goal in goals):
        own = [goal for goal in goals if goal["text"] == text]
        counts = ", ".join(
            f"{verdict} in {sum(goal['met'] is met for goal in own)}"
            for met, verdict in ((True, "met"), (False, "missed"), (None, "hidden by noise"))
            if any(goal["met"] is met for goal in own)
        )
        console.print(f"[bold]{text}: {counts} of {len(own)} cases[/]", highlight=False)
        for goal in own:
            if goal["met"] is not True:
                verdict = "missed" if goal["met"] is False else "hidden by noise"
                times = goal["value"] / goal["limit"]
                console.print(f"    {verdict}: {goal['case']}, {times:.3f} times the limit", highlight=False)


def show_host(content: dict[str, Any]) -> None:
    """Host microseconds a site, variant by variant."""
    console = wide_console()
    e = content["environment"]
    for batch in content["batches"]:
        title = (
            f"host time a steered site over unsteered, us; batch {batch['batch']}, {content['sites']} sites, "
            f"{content['rounds']} rounds of {content['steps']} tokens; {e['device']}, {content['dtype']}"
        )
        table = Table(title=title)
        for name in ("variant", "path", "median", "quartiles", "minimum", "by itself", "quartiles"):
            table.add_column(name, justify="left" if name in ("variant", "path") else "right")
        for name, row in batch["variants"].items():
            us = row["us_a_site"]
            quartiles = f"{us['low']:.2f} to {us['high']:.2f}"
            alone = row["us_by_itself"]
            table.add_row(
                *(name, row["path"], f"{us['median']:.2f}", quartiles, f"{row['minimum_us_a_site']:.2f}"),
                *(f"{alone['median']:.2f}", f"{alone['low']:.2f} to {alone['high']:.2f}"),
            )
        console.print(table)
        console.print(
            f"unsteered {batch['unsteered_us']:.0f} us a forward pass (median); noise {batch['noise_us']:.2f} us a site"
        )
    show_goals(content["goals"], console)


def _table(title: str, left: list[str], right: list[str]) -> Table:
    table = Table(title=title)
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right")
    return table


def _ways(console: Console, title: str, row: dict[str, Any], references: list[str]) -> None:
    """One set: rates, ratios as run and at many pairs, and what was run, way by way."""
    from .compare import MANY

    def ratio(way: dict[str, Any], reference: str) -> str:
        if reference not in way["faster_than"]:
            return ""
        many = way[f"faster_than_at_{MANY}"][reference]["median"]
        return f"{_spread(way['faster_than'][reference])}\nat {MANY} pairs {many:.2f}"

    table = _table(
        f"{title}{row['set']}: {row['tokens_a_text']['median']:.0f} tokens a text (median)",
        ["way"],
        [
            "pairs",
            "pairs/s",
            *(f"x {name}" for name in references),
            "tokens run",
            "of texts",
            "to host, MB",
            "kept, MB",
            "counts differ",
        ],
    )
    for name, way in row["ways"].items():
        table.add_row(
            *(name, str(way["pairs"]), f"{way['pairs_a_second']:.2f}", *(ratio(way, of) for of in references)),
            *(str(way["tokens_run"]), f"{way['tokens_run'] / way['tokens']:.2f}"),
            *(f"{way['to_host'] / 1e6:.1f}", f"{way['kept'] / 1e6:.1f}", str(way["differing_counts"])),
        )
    console.print(table)


def show_momentum(content: dict[str, Any]) -> None:
    """Rates and ratios set by set, memory, weights on disk, what a GPU adds, then the goals."""
    from .offloaded import LAYERWISE, RESIDENT
    from .ways import PUBLIC, STACKED

    console = wide_console()
    console.print(f"{content['environment']['device']}; pairs: {content['data']}; {content['rounds']} rounds")
    for row in content["sets"]:
        _ways(console, "", row, [PUBLIC, STACKED])
    if content["memory"]:
        table = _table("peak memory over the loaded model, demo pairs", ["way"], ["pairs", "MB", "MB a further pair"])
        for extra in content["memory"]:
            few, many = extra["runs"]
            growth = (many["bytes"] - few["bytes"]) / (many["pairs"] - few["pairs"])
            table.add_row(
                extra["way"],
                f"{few['pairs']}\n{many['pairs']}",
                f"{few['bytes'] / 1e6:.0f}\n{many['bytes'] / 1e6:.0f}",
                f"{growth / 1e6:.2f}",
            )
        console.print(table)
    for case, row in (content["offloaded"] or {"cases": {}})["cases"].items():
        _ways(console, f"{case}; ", row, [RESIDENT, STACKED, PUBLIC])
        read, weights = row["ways"][LAYERWISE]["report"]["weights_read"], content["offloaded"]["weights"]
        console.print(
            f"{LAYERWISE}: {read / 1e6:.0f} MB of weights read, {read / weights:.2f}x the decoder's; the disk gave "
            f"{row['read_from_disk'] / 1e9:.2f} GB to all ways and rounds"
        )
    if content["kernel"]:
        kernel = content["kernel"]
        console.print(
            f"counting kernel on [{kernel['pairs']}, {kernel['columns']}] {kernel['dtype']}: "
            f"{kernel['seconds']['kernel']['median'] * 1e6:.1f} us, {kernel['of_copy_bandwidth']:.0%} of the copy "
            f"bandwidth, {kernel['faster_than_eager']['median']:.1f}x eager operations"
        )
    if content["large"]:
        for row in content["large"]["sets"]:
            _ways(console, f"random {content['large']['shape']['name']}, ", row, [STACKED])
        for extra in content["large"]["memory"]:
            sizes = ", ".join(f"{nbytes / 1e6:.0f} MB at {pairs} pairs" for pairs, nbytes in extra["bytes"].items())
            console.print(f"{extra['set']}, {extra['way']}: peak device memory over the model {sizes}")
    show_goals(content["goals"], console)
    if content["quick"]:
        console.print("[bold]--quick: these times mean nothing[/]")
