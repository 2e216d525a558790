"""``austeer inspect``: what a momentum file or a plan holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from .common import Json, console, emit


def inspect(
    path: Annotated[Path, typer.Argument(help="A momentum file, or a plan's folder.")],
    site: Annotated[str | None, typer.Option(help="One site. [default: the first]")] = None,
    k: Annotated[int, typer.Option(help="How many AUs are looked at.", min=1)] = 100,
    rows: Annotated[int, typer.Option(help="How many of them are listed.", min=1)] = 10,
    png: Annotated[Path | None, typer.Option(help="Also draw a figure here.")] = None,
    json: Json = False,
) -> None:
    """Show the top AUs and how they spread over the layers.

    Example: `austeer inspect kind.momentum --site attention --png kind.png`
    """
    from .. import overview

    summary = overview.of_file(path, site, k)
    if png:
        from ..figures import draw_overview

        draw_overview(summary, png)
    if json:
        emit({**summary.to_json(), "png": png})
        return
    console.print(f"[bold]{path}[/]  {summary.origin}")
    table = Table("rank", "layer", "AU", "beta", "delta", *(["effect", "p"] if summary.p else []), box=None)
    for i, unit in enumerate(summary.units[:rows]):
        cells = [str(i), str(unit.layer), str(unit.index), f"{unit.beta:+.3f}", f"{unit.delta:+.4f}"]
        if summary.p:
            cells += [f"{summary.effect[i]:.2f}", f"{summary.p[i]:.1e}"]
        table.add_row(*cells)
    console.print(table)
    console.print(f"\ntop {len(summary.units)} AUs of site {summary.site} by layer")
    most = max(summary.by_layer)
    for layer, count in enumerate(summary.by_layer):
        console.print(f"  {layer:>3} {count:>5} {'█' * round(40 * count / most)}")
    for note in summary.notes:
        console.print(note)
    if png:
        console.print(f"wrote {png}")
