"""What ``austeer bench`` prints: a table a case, what was left out and why, and what may be said."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .catalogue import AGAIN, UNSTEERED
from .intervals import FASTER, NOISY, SAME, SLOWER, UNCLEAR
from .lineup import MEASURED, Case
from .report import wide_console

WORDS = {
    SAME: "[green]none[/]",
    SLOWER: "[red]slower[/]",
    FASTER: "[green]faster[/]",
    UNCLEAR: "unclear",
    NOISY: "[yellow]no verdict[/]",
}
_METRICS = {"first_token": "first token", "token": "token"}


def percent(of: dict[str, Any]) -> str:
    """An overhead with its interval, in percent."""
    middle, low, high = (100 * (of[name] - 1) for name in ("median", "low", "high"))
    return f"{middle:+.1f} [{low:+.1f}, {high:+.1f}]"


def show(content: dict[str, Any]) -> None:
    """All cases of a result of kind "inference"."""
    console = wide_console()
    model, environment = content["model"], content["environment"]
    console.print(
        f"[bold]{escape(model['name'])}[/], {model['layers']} layers of width {model['width']}, {model['dtype']}, on "
        f"{environment['device']} ({environment['threads']} threads); medians, overhead with its "
        f"{content['settings']['level']:.0%} interval"
    )
    for case in content["cases"]:
        _case(case, console)


def _case(case: dict[str, Any], console: Console) -> None:
    rows = case["variants"]
    metrics = [name for name in _METRICS if name in rows[UNSTEERED]]
    console.print(f"\n[bold]{Case.of(case)}[/]", highlight=False)
    for metric in metrics:
        console.print(_table(rows, metric))
    for name, row in rows.items():
        if row["status"] != MEASURED:
            console.print(f"  {name}: {row['status']}, {escape(row['reason'])}", highlight=False)
    for metric in metrics:
        if not case["verdicts_possible"][metric]:
            console.print(
                f"[yellow]  {_METRICS[metric]}: the unsteered model differs from itself by up to "
                f"{case['noise'][metric]:.1%}: this machine is too noisy for a verdict; close other programs, or give "
                "more --seconds[/]",
                highlight=False,
            )


def _table(rows: dict[str, Any], metric: str) -> Table:
    counted = {"tokens/s": "tokens_a_second", "held MB": "held_bytes", "launches": "launches"}
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    table.add_column("variant", no_wrap=True)
    table.add_column(f"{_METRICS[metric]}, ms", justify="right")
    table.add_column("overhead, %", justify="right", no_wrap=True)
    table.add_column("cost")
    for column in counted if metric == "token" else ():
        table.add_column(column, justify="right")
    for name, row in rows.items():
        if row["status"] != MEASURED:
            continue
        of = row[metric]
        cells = [f"{1e3 * of['seconds']['median']:.2f}", "" if name == UNSTEERED else escape(percent(of["ratio"]))]
        cells.append("noise floor" if name == AGAIN else WORDS.get(row.get("verdict", {}).get(metric), ""))
        if metric == "token":
            cells += [_number(column, row.get(key)) for column, key in counted.items()]
        table.add_row(name, *cells)
    return table


def _number(column: str, value: float | None) -> str:
    if value is None:
        return ""
    if column == "held MB":
        return f"{value / 1e6:.2f}"
    return f"{value:.1f}" if column == "tokens/s" else f"{value:.0f}"
