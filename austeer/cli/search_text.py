"""What commands print of steerings alike: strengths, values with their intervals, and the held-out table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from ..utils.tables import show_table, signed
from .common import console

if TYPE_CHECKING:
    from ..forward.timing import Timing
    from ..tuning.held_out import HeldOut, Unsteered
    from ..tuning.tune import Trial

LEGEND = (
    "effect: mean change of log p(wanted) - log p(best other option), with its 95 % interval over groups of items; up: "
    "share of items that moved the wanted way;\np: McNemar's exact test of the accuracy against unsteered; KL: of the "
    "next token on held-out neutral text against unsteered, nats a token"
)


def show_held_out(
    unsteered: Unsteered,
    rows: Sequence[HeldOut],
    extra: Callable[[HeldOut], str] | None = None,
    on: Console = console,
) -> None:
    """The table of what settings do to held-out data; ``extra`` gives a last column, of time."""
    columns = ["setting", "alpha", "AUs", "effect, nats [95 %]", "up", "accuracy", "p", "KL"]
    cells = [["unsteered", "", "", "", "", f"{unsteered.accuracy:.1%}", "", ""]]
    for row in rows:
        cells.append(
            [
                f"{row.method} {row.operation}, {show_place(row)}" + (" (derails)" if row.derailed else ""),
                show_alpha(row.alpha),
                str(row.k),
                show_value(row.effect, row.low, row.high),
                f"{row.share:.0%}",
                f"{row.accuracy:.1%}",
                f"{row.p:.2g}",
                f"{row.kl:.3f}",
            ]
        )
    if extra is not None:
        columns.append("time")
        for line, time in zip(cells, ["", *map(extra, rows)]):
            line.append(time)
    show_table(columns, cells, on=on)


def show_place(row: HeldOut | Trial) -> str:
    """Where a setting steers, with what tells it apart from others there."""
    named = not row.detail or all(site in row.detail for site in row.site.split("+"))
    return row.detail or row.site if named else f"{row.site}, {row.detail}"


def show_left_out(left_out: Sequence[str]) -> None:
    """What a time budget was too short for."""
    if left_out:
        console.print("[bold]cut by --budget[/]: " + escape("; ".join(left_out)))


def show_alpha(alpha: float | dict[str, float]) -> str:
    if isinstance(alpha, dict):
        return "\n".join(f"{site} {value:.3g}" for site, value in alpha.items())
    return f"{alpha:.3g}"


def show_value(value: float, low: float | None, high: float | None) -> str:
    """With its interval, where it has one."""
    found = signed(value, 2)
    return found if low is None or high is None else f"{found} [{signed(low, 2)}, {signed(high, 2)}]"


def show_ratio(timing: Timing) -> str:
    """To unsteered, with quartiles."""
    return f"{timing.ratio:.3f} [{timing.low:.3f}, {timing.high:.3f}]"
