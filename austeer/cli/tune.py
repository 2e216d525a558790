"""``austeer tune``: from pairs or a task to a plan with its strength."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from .common import Device, DType, Json, Model, Quiet, console, emit, load, split_names, write_json
from .search_options import (
    LEGEND,
    Budget,
    Chat,
    DataArgument,
    Ks,
    Limit,
    MaxKl,
    Momentum,
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
    show_alpha,
)


def tune(
    data: DataArgument,
    model: Model,
    template: Template = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder for plan, result, figure and search.")] = Path(
        "runs/tune"
    ),
    momentum: Momentum = None,
    sites: Sites = "attention,ffn",
    operations: Operations = "scale,push,shift",
    ks: Ks = "3,10,30,100,300",
    max_kl: MaxKl = 0.1,
    budget: Budget = None,
    neutral: Neutral = None,
    mix: Annotated[bool, typer.Option("--mix/--no-mix", help="Also try the best two sites together.")] = True,
    limit: Limit = None,
    seed: Seed = 0,
    chat: Chat = False,
    rows: Annotated[int, typer.Option(help="How many settings are listed.", min=1)] = 10,
    dtype: DType = "auto",
    device: Device = None,
    force: Annotated[bool, typer.Option("--force", help="Start anew over an earlier search in --out.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Choose site, operation, k and alpha on held-out data, under a limit on the side effect.

    Example: `austeer tune pairs.jsonl --model demo --budget 5m --out runs/kind`

    Half of the data is measured, a quarter tuned on, and a quarter looked at once, for the figures. An interrupted
    search goes on where it was when the same command is given again.
    """
    from ..momentum.momentum import Momentum as Counted
    from ..tuning import tune as search_plan
    from ..tuning.figures import draw_tune
    from ..utils.figures import require_matplotlib

    seconds, counts = parse_budget(budget), parse_counts("--ks", ks)
    texts, counted = read_neutral(neutral), None if momentum is None else Counted.load(momentum)
    require_matplotlib()  # before minutes of work, not after
    open_folder(out, force)
    network, tokenizer = load(model, dtype, device)
    show = False if quiet or json else None
    result = search_plan(
        network,
        tokenizer,
        load_data(data, template, limit, chat, tokenizer),
        momentum=counted,
        sites=split_names(sites),
        operations=split_names(operations),
        ks=counts,
        max_kl=max_kl,
        budget=seconds,
        neutral=texts,
        mix=mix,
        seed=seed,
        folder=out,
        step=bars(show),
        progress=show,
    )
    result.plan.save_pretrained(out / "plan")
    write_json(out / "result.json", result.to_json())
    draw_tune(result, out / "tune.png")
    if json:
        emit({"out": out, **result.to_json()})
        return
    split = result.settings["data"]
    measured = f"{split['measure']['pairs']} pairs measured, " if "measure" in split else ""
    console.print(
        f"{measured}{split['tune']['items']} items tuned on, {split['test']['items']} held out; "
        f"{len(result.trials)} settings\n"
    )
    table = Table("setting", "k", "alpha", "items", escape("effect, nats [95 %]"), "up", box=None, pad_edge=False)
    for t in result.trials[:rows]:
        interval = "" if t.low is None else f" [{t.low:+.2f}, {t.high:+.2f}]"
        effect = escape(f"{t.effect:+.2f}{interval}")
        where = f"{t.operation} at {t.detail or t.site}"
        table.add_row(where, str(t.k), show_alpha(t.alpha), str(t.items), effect, f"{t.share:.0%}")
    console.print(table)
    console.print(f"\n[bold]On {split['test']['items']} held-out items[/]: the chosen setting first")
    console.print(held_out_table(result.unsteered, result.held_out))
    console.print(LEGEND)
    first = result.held_out[0]
    if first.low is not None and first.low <= 0:
        console.print(
            "[bold]no effect was found on the held-out items[/]: the interval includes 0. Other pairs, more of them, "
            "or a larger --max-kl may help; see austeer inspect for whether the ranking is stable"
        )
    if first.kl > 1.5 * max_kl:
        console.print(f"the limit of {max_kl:g} held on the tuning texts; on held-out ones it is {first.kl:.3f}")
    console.print(
        f"\n{result.seconds:.0f} s; wrote plan, result.json and tune.png in {out}\n"
        f"next: austeer generate {out}/plan --model {model} --prompt ..."
    )
