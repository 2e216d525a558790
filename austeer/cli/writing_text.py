"""What ``austeer tune`` and ``austeer compare`` print of the texts that settings write."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from ..utils.one_line import one_line
from ..utils.tables import show_table
from .common import console
from .search_text import show_alpha

if TYPE_CHECKING:
    from ..tuning.writing import Writing, Written

Samples = Annotated[int, typer.Option(help="After how many prompts written texts are printed.", min=0)]

LEGEND = (
    "repeated: share of 3-grams of tokens that a text had before; likelihood: mean log-probability of a token under "
    "the unsteered model, nats"
)


def show_writing(writing: Writing | None, samples: int) -> None:
    """The judgement of every setting, those that derail with the reason, and the first one's texts by strength."""
    if writing is None:
        return
    rows = [writing.unsteered, *writing.set_aside, *writing.settings, *writing.others]
    prompts = list(dict.fromkeys(text.prompt for text in writing.unsteered.texts))
    console.print(f"\n[bold]What they write[/], {len(writing.settings[0].texts)} texts each")
    cells = [
        [
            w.name,
            "" if w is writing.unsteered else show_alpha(w.alpha),
            f"{w.repeated:.0%}",
            "" if w.log_prob is None else f"{w.log_prob:.2f}",
            "" if w.wanted is None else f"{w.wanted:.0%}",
        ]
        for w in rows
    ]
    show_table(["setting", "alpha", "repeated", "likelihood", "wanted"], cells)
    console.print(LEGEND + _wanted(writing))
    for w in rows:
        if w.derailed:
            aside = "set aside" if w in writing.set_aside else "derails"
            console.print(f"{aside}: {w.name}, alpha {_inline(w)}: {w.derailed}", markup=False)
    if writing.settings[0].derailed:
        console.print("[bold]no setting was found that does not derail[/]: try a lower --max-kl")
    strengths = sorted([writing.settings[0], *writing.others], key=lambda w: w.part)
    for prompt in prompts[:samples]:
        console.print(f"\n[bold]{escape(one_line(prompt))}[/]")
        for w in (writing.unsteered, *strengths):
            name = "unsteered" if w is writing.unsteered else f"alpha {_inline(w)}"
            text = next((text.text for text in w.texts if text.prompt == prompt), "")
            console.print(
                textwrap.fill(
                    f"{name}: {one_line(text) or '(nothing)'}",
                    max(console.width, 40),
                    initial_indent="  ",
                    subsequent_indent="    ",
                ),
                markup=False,
            )


def _wanted(writing: Writing) -> str:
    reader = writing.reader
    if reader is None:
        return ""
    said = f"a linear reader of layer {reader['layer']}, right on {reader['accuracy']:.0%} of held-out answers"
    if writing.unsteered.wanted is None:
        return f"\nwanted: no opinion: {said}"
    return f"\nwanted: share of texts on the wanted side, by {said}"


def _inline(written: Written) -> str:
    return show_alpha(written.alpha).replace("\n", ", ")
