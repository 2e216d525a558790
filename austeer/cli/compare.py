"""``austeer compare``: methods of steering side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from .common import Device, DType, Json, Model, Quiet, console, emit, load, split_names, write_json
from .search_options import (
    LEGEND,
    Budget,
    Chat,
    DataArgument,
    Ks,
    Limit,
    MaxKl,
    Neutral,
    Operations,
    Seed,
    Sites,
    Template,
    bars,
    held_out_table,
    load_data,
    open_folder,
    parse_budget,
    parse_counts,
    read_neutral,
)

if TYPE_CHECKING:
    from ..tuning.held_out import HeldOut


def compare(
    data: DataArgument,
    model: Model,
    template: Template = None,
    methods: Annotated[
        str,
        typer.Option(help="Methods, separated by commas; NAME:OPERATION takes one operation only."),
    ] = "momentum,random,all,difference,caa,iti,sadi",
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder for result, figure and search.")] = Path(
        "runs/compare"
    ),
    sites: Sites = "attention,ffn",
    operations: Operations = "scale,push,shift",
    ks: Ks = "10,100",
    max_kl: MaxKl = 0.1,
    budget: Budget = None,
    neutral: Neutral = None,
    timed: Annotated[bool, typer.Option("--time/--no-time", help="Time decoding with each method.")] = True,
    limit: Limit = None,
    seed: Seed = 0,
    chat: Chat = False,
    dtype: DType = "auto",
    device: Device = None,
    force: Annotated[bool, typer.Option("--force", help="Start anew over an earlier search in --out.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Tune momentum and other methods alike, and compare them on held-out data at equal side effect.

    Example: `austeer compare boolq.jsonl --template boolq --model demo --methods momentum,random,caa --budget 20m`

    Methods: momentum (the paper), random, all (AUs, softly weighted), difference and effect (other rankings), caa
    (a block's vector), iti (heads), sadi (masked elements).
    """
    from ..tuning import compare as compare_methods
    from ..tuning.figures import draw_compare
    from ..utils.figures import require_matplotlib

    seconds, counts, texts = parse_budget(budget), parse_counts("--ks", ks), read_neutral(neutral)
    require_matplotlib()
    open_folder(out, force)
    network, tokenizer = load(model, dtype, device)
    show = False if quiet or json else None
    result = compare_methods(
        network,
        tokenizer,
        load_data(data, template, limit, chat, tokenizer),
        methods=split_names(methods),
        sites=split_names(sites),
        operations=split_names(operations),
        ks=counts,
        max_kl=max_kl,
        budget=seconds,
        neutral=texts,
        timed=timed,
        seed=seed,
        folder=out,
        step=bars(show),
        progress=show,
    )
    write_json(out / "result.json", result.to_json())
    draw_compare(result, out / "compare.png")
    if json:
        emit({"out": out, **result.to_json()})
        return
    split = result.settings["data"]
    console.print(
        f"{split['measure']['pairs']} pairs measured, {split['tune']['items']} items tuned on, {len(result.trials)} "
        f"settings\n\n[bold]On {split['test']['items']} held-out items[/], each method tuned to the same limit on the "
        "side effect"
    )

    def time_of(row: HeldOut) -> str:
        timing = result.cost.get(row.name)
        return "" if timing is None else escape(f"{timing.ratio:.3f} [{timing.low:.3f}, {timing.high:.3f}]")

    console.print(held_out_table(result.unsteered, result.held_out, time_of if result.cost else None))
    console.print(LEGEND)
    if result.cost:
        again = result.cost["unsteered again"]
        console.print(
            "time: of a token over unsteered, decoding at batch 1, median and quartiles; unsteered again "
            + escape(f"{again.ratio:.3f} [{again.low:.3f}, {again.high:.3f}]")
        )
    console.print(f"\n{result.seconds:.0f} s; wrote result.json and compare.png in {out}")
