"""``austeer pairs``: make contrastive pairs, and check them for artefacts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from . import common, pairs_make
from .common import (
    Chat,
    ChatOption,
    Device,
    DType,
    Json,
    Model,
    NegativeField,
    PositiveField,
    PromptField,
    Quiet,
    System,
    console,
    note,
)

if TYPE_CHECKING:
    from ..making import PairsReport

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown", help="Make contrastive pairs, and check them for artefacts."
)
app.add_typer(pairs_make.app, name="make")

STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "grave": "bold red"}


@app.command()
def check(
    pairs: Annotated[str, typer.Argument(help="A file of pairs, as for austeer measure.", show_default=False)],
    model: Model,
    momentum: Annotated[
        Path | None,
        typer.Option(help="Momentum of these pairs: says how many of its top AUs react to length alone."),
    ] = None,
    control: Annotated[
        bool, typer.Option("--control", help="The same, with momentum measured now. Needs the model's weights.")
    ] = False,
    k: Annotated[int, typer.Option(help="With --momentum or --control: how many AUs of each site.", min=1)] = 100,
    control_pairs: Annotated[int, typer.Option(help="How many pairs are run for the control.", min=2)] = 200,
    out_control: Annotated[
        Path | None, typer.Option(help="Write the pairs of the control, which differ in length only, here (.jsonl).")
    ] = None,
    prompt_field: PromptField = "prompt",
    positive_field: PositiveField = "positive",
    negative_field: NegativeField = "negative",
    limit: Annotated[int | None, typer.Option(help="Look at the first so many pairs.", min=2)] = None,
    chat: Chat = False,
    chat_option: ChatOption = None,
    system: System = None,
    max_length: Annotated[int | None, typer.Option(help="Texts are cut to so many tokens.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="For the control.")] = 0,
    dtype: DType = "auto",
    device: Device = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite --out-control.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Look for what tells the sides of pairs apart besides their meaning: lengths, last tokens, prompts.

    Example: `austeer pairs check pairs.jsonl --model demo`

    Without --momentum and --control only the tokenizer is loaded.
    """
    from ..errors import ModelError
    from ..making import check_pairs, write_pairs
    from ..making import control_pairs as control_set
    from ..making.check import read_unchecked
    from ..making.made_pairs import check_out
    from ..models.skeleton import load_config, load_tokenizer
    from ..models.structure import text_config_of
    from ..momentum.momentum import Momentum

    names = {"prompt": prompt_field, "positive": positive_field, "negative": negative_field}
    found = read_unchecked(pairs, names, limit)
    if out_control is not None:
        common.check_writable(check_out(out_control), force)
    counted = None if momentum is None else Momentum.load(momentum)
    network, config = None, None
    if control or counted is not None:
        network, tokenizer = common.load(model, dtype, device)
    else:
        config, tokenizer = text_config_of(load_config(model)), load_tokenizer(model)
        if tokenizer is None:
            raise ModelError(f"{model}: found no tokenizer, expected one beside the model's config")
    form = common.chat_form(chat, chat_option, system)
    in_form = common.in_chat_form(found, tokenizer, form)
    if not form and getattr(tokenizer, "chat_template", None) and counted is None:
        note("prompts are read as they are; with --chat they go through the model's chat template")
    report = check_pairs(
        in_form,
        tokenizer,
        network,
        counted,
        config=config,
        k=k,
        control_count=control_pairs,
        max_length=max_length,
        seed=seed,
        progress=False if quiet else None,
    )
    if counted is not None and counted.pairs != len(found):
        note(f"{momentum} was measured on {counted.pairs} pairs, and here are {len(found)}")
    if out_control is not None:
        write_pairs(out_control, control_set(found, tokenizer, count=control_pairs, seed=seed))
    if json:
        common.emit({**report.to_json(), "control_file": out_control})
        return
    show(report)
    if out_control is not None:
        console.print(f"wrote {out_control}")


def show(report: PairsReport) -> None:
    """The findings, the gravest first."""
    from ..making.findings import LEVELS

    console.print(f"[bold]{escape(report.source)}[/]  {report.pairs} pairs, {report.usable} of them with two sides")
    for level in reversed(LEVELS):
        for finding in report.of(level):
            console.print(f"  [{STYLES[level]}]{level:<8}[/][bold]{escape(finding.name)}[/]: {escape(finding.verdict)}")
            if finding.remedy:
                console.print(f"          [dim]-> {escape(finding.remedy)}[/]")
    for site in () if report.control is None else report.control.sites.values():
        units = ", ".join(f"layer {u.layer} AU {u.index}" for u in site.reacting[:10])
        more = f" and {len(site.reacting) - 10} more (--json)" if len(site.reacting) > 10 else ""
        if units:
            console.print(f"  {site.site}: with length alone go {units}{more}")
