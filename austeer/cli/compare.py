"""``austeer compare``: methods of steering side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from . import common
from . import search_options as options
from .common import Chat, ChatOption, Device, DType, Json, Model, Quiet, System, console
from .search_text import LEGEND, show_held_out, show_left_out, show_ratio
from .writing_text import Samples, show_writing

if TYPE_CHECKING:
    from ..tuning import CompareResult
    from ..tuning.held_out import HeldOut


def compare(
    data: options.DataArgument,
    model: Model,
    template: options.Template = None,
    methods: Annotated[
        str,
        typer.Option(help="Methods, separated by commas; NAME:OPERATION takes one operation only."),
    ] = "effect,momentum,random,all,difference,caa,iti,sadi",
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder for result, figure and search.")] = Path(
        "runs/compare"
    ),
    sites: options.Sites = "attention,ffn",
    operations: options.Operations = "scale,push,shift",
    ks: options.Ks = "10,100",
    max_kl: options.MaxKl = 0.1,
    budget: options.Budget = None,
    neutral: options.Neutral = None,
    texts: Annotated[bool, typer.Option("--texts/--no-texts", help="Let each method write, and judge it.")] = True,
    samples: Samples = 2,
    timed: Annotated[bool, typer.Option("--time/--no-time", help="Time decoding with each method.")] = True,
    limit: options.Limit = None,
    seed: options.Seed = 0,
    chat: Chat = False,
    chat_option: ChatOption = None,
    system: System = None,
    dtype: DType = "auto",
    device: Device = None,
    force: options.ForceAnew = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Tune momentum and other methods alike, and compare them on held-out data at equal side effect.

    Example: `austeer compare boolq.jsonl --template boolq --model demo --methods momentum,random,caa --budget 20m`

    Methods: momentum (the paper), effect (by gradients, per side effect), random, all (AUs, softly weighted),
    difference and standardised (other rankings), caa (a block's vector), newton and trained (such vectors by
    gradients), iti (heads), sadi (masked elements).
    """
    from ..tuning import compare as compare_methods
    from ..tuning.figures import draw_compare

    shared = options.read_options(sites, operations, ks, budget, neutral, out, quiet)
    form = common.chat_form(chat, chat_option, system)
    task = options.load_data(data, template, limit)  # before the model, which takes longer
    options.open_folder(out, force)
    network, tokenizer = common.load(model, dtype, device)
    task = common.in_chat_form(task, tokenizer, form)
    shared |= {"methods": common.split_names(methods), "texts": texts, "timed": timed, "max_kl": max_kl, "seed": seed}
    result = compare_methods(network, tokenizer, task, **shared)
    options.write_result(result, out / "compare.png", draw_compare, json)
    if json:
        return
    show(result, samples)
    console.print(f"\n{result.seconds:.0f} s; wrote result.json and compare.png in {out}")


def show(result: CompareResult, samples: int) -> None:
    """What each method does to held-out data, what it writes, and what it costs."""
    split = result.settings["data"]
    console.print(
        f"{split['measure']['pairs']} pairs measured, {split['tune']['items']} items tuned on, {len(result.trials)} "
        f"settings\n{options.groups_line(split)}\n\n[bold]On {result.unsteered.items} held-out items[/], each method "
        "tuned to the same limit on the side effect"
    )

    def time_of(row: HeldOut) -> str:
        return show_ratio(result.cost[row.name]) if row.name in result.cost else ""

    show_held_out(result.unsteered, result.held_out, time_of if result.cost else None)
    console.print(LEGEND)
    show_writing(result.writing, samples)
    if result.cost:
        console.print(
            "time: of a token over unsteered, decoding at batch 1, median and quartiles; unsteered again "
            + escape(show_ratio(result.cost["unsteered again"]))
        )
    show_left_out(result.left_out)
