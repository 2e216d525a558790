"""``austeer inspect``: what a momentum file or a plan holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..utils.tables import show_table
from .common import Json, console, emit


def inspect(
    source: Annotated[str, typer.Argument(help="A momentum file, a plan's folder, or a plan on the Hub (USER/NAME).")],
    site: Annotated[str | None, typer.Option(help="One site. [default: the first]")] = None,
    k: Annotated[int, typer.Option(help="How many AUs are looked at.", min=1)] = 100,
    rows: Annotated[int, typer.Option(help="How many of them are listed.", min=1)] = 10,
    png: Annotated[Path | None, typer.Option(help="Also draw a figure here.")] = None,
    json: Json = False,
) -> None:
    """Show the top AUs, how far they stand out from chance, and whether other pairs would choose them again.

    Example: `austeer inspect kind.momentum --site attention --png kind.png`

    *beta* is the signed share of pairs, with its exact 95 % interval; *effect* the mean over the standard deviation;
    *p* of a two-sided sign test; *q* the same, corrected for all AUs of the site.
    """
    from ..overview import overview
    from ..overview import text as overview_text
    from ..plans.dose_table import dose_table

    summary = overview.of_file(source, site, k)
    if png:
        from ..overview.figures import draw_overview

        draw_overview(summary, png)
    if json:
        emit({**summary.to_json(), "png": png})
        return
    console.print(f"[bold]{source}[/]  {summary.origin}\n")
    headings, *units = overview_text.unit_table(summary, rows)
    show_table(headings, units, right=True)
    console.print(f"\ntop {len(summary.units)} AUs of site {summary.site} by layer")
    for line in overview_text.layer_lines(summary, console.width):
        console.print(line)
    console.print()
    for line in overview_text.summary_lines(summary):
        paragraph(line)
    if summary.stability is not None:
        console.print()
        headings, *again = overview_text.stability_table(summary.stability)
        show_table(headings, again, right=True)
    if summary.verdict:
        console.print()
        paragraph(summary.verdict, "bold")
    if len(summary.sites) + len(summary.effects) > 1:
        console.print()
        headings, *sites = overview_text.site_table(summary)
        show_table(headings, sites, right=True)
    if summary.effects:
        paragraph(
            "effects: the same of the gradient of log p(positive) - log p(negative) by a shift of each AU, pair by pair"
        )
    if summary.dose:
        console.print()
        headings, *doses = dose_table(summary.dose)
        show_table(headings, doses, right=True)
    if summary.evidence is not None:
        console.print()
        if summary.evidence.tested:
            headings, *tested = overview_text.evidence_table(summary.evidence)
            show_table(headings, tested, prose=(len(headings) - 1,), right=True)
        for line in overview_text.evidence_lines(summary.evidence):
            paragraph(line)
    for note in summary.notes:
        paragraph(note)
    if png:
        console.print(f"wrote {png}")


def paragraph(text: str, style: str | None = None) -> None:
    """Text broken into lines at the terminal's width."""
    console.print(text, style=style, soft_wrap=False, markup=False)
