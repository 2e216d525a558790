"""``austeer tune``: from pairs or a task to a plan with its strength."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..utils.tables import show_table
from . import common
from . import search_options as options
from .common import Chat, ChatOption, Device, DType, Json, Model, Quiet, System, console
from .replays import Replay
from .search_text import LEGEND, show_alpha, show_held_out, show_left_out, show_place, show_value
from .writing_text import Samples, show_writing

if TYPE_CHECKING:
    from ..tuning import TuneResult


def tune(
    data: options.DataArgument,
    model: Model,
    template: options.Template = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder for plan, result, figure and search.")] = Path(
        "runs/tune"
    ),
    momentum: options.Momentum = None,
    sites: Annotated[
        str | None,
        typer.Option(help="Separated by commas. [default: attention,neuron; by momentum attention,ffn]"),
    ] = None,
    operations: Annotated[
        str | None, typer.Option(help="Separated by commas. [default: shift; by momentum scale,push,shift]")
    ] = None,
    ks: options.Ks = "3,10,30,100,300",
    max_kl: options.MaxKl = 0.1,
    budget: options.Budget = None,
    neutral: options.Neutral = None,
    mix: Annotated[bool, typer.Option("--mix/--no-mix", help="Also try sites together.")] = True,
    rank: Annotated[
        str | None,
        typer.Option(
            help="effect: AUs by effect per side effect, of shift; or momentum, the paper's. [default: effect, where "
            "--operations and --momentum allow it]"
        ),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(help="Of austeer profile, by effect. [default: made once, and kept in the cache]"),
    ] = None,
    limit: options.Limit = None,
    seed: options.Seed = 0,
    chat: Chat = False,
    chat_option: ChatOption = None,
    system: System = None,
    rows: Annotated[int, typer.Option(help="How many settings are listed.", min=1)] = 10,
    samples: Samples = 2,
    replay: Replay = False,
    dtype: DType = "auto",
    device: Device = None,
    force: options.ForceAnew = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Choose site, operation, k and alpha on held-out data, under a limit on the side effect.

    Example: `austeer tune pairs.jsonl --model demo --budget 5m --out runs/kind`

    Half of the data is measured, a quarter tuned on, and a quarter looked at once, for the figures. An interrupted
    search goes on where it was when the same command is given again.
    """
    from ..momentum.momentum import Momentum as Counted
    from ..momentum.profile import Profile
    from ..pairs.chat import chat_arguments
    from ..tuning import tune as search_plan
    from ..tuning.figures import draw_tune
    from ..verifying import record_replay

    shared = options.read_options(sites, operations, ks, budget, neutral, out, quiet)
    counted = None if momentum is None else Counted.load(momentum)
    known = None if profile is None else Profile.load(profile)
    if counted is not None and counted.effects is None and rank is None:
        common.note(f"{momentum} has no effects: AUs are searched by momentum; for those by effect measure --effects")
    form = common.chat_form(chat, chat_option, system)
    task = options.load_data(data, template, limit)  # before the model, which takes longer
    options.open_folder(out, force)
    network, tokenizer = common.load(model, dtype, device)
    task = common.in_chat_form(task, tokenizer, form)
    shared |= {"momentum": counted, "mix": mix, "rank": rank, "profile": known, "max_kl": max_kl, "seed": seed}
    result = search_plan(network, tokenizer, task, **shared)
    plan = record_replay(network, tokenizer, result.plan, progress=False if quiet else None) if replay else result.plan
    plan.save_pretrained(out / "plan")
    options.write_result(result, out / "tune.png", draw_tune, json)
    if json:
        return
    show(result, max_kl, rows, samples)
    console.print(
        f"\n{result.seconds:.0f} s; wrote plan, result.json and tune.png in {out}\n"
        + common.next_line(
            *("austeer", "generate", out / "plan", "--model", model),
            *(*shlex.split(chat_arguments(form)), "--prompt", common.PROMPT),
        ),
        markup=False,
    )


def show(result: TuneResult, max_kl: float, rows: int, samples: int) -> None:
    """The best settings of the search, so many rows, what the chosen one does to held-out data, and what it writes."""
    split = result.settings["data"]
    measured = f"{split['measure']['pairs']} pairs measured, " if "measure" in split else ""
    console.print(
        f"{measured}{split['tune']['items']} items tuned on, {result.unsteered.items} held out; "
        f"{len(result.trials)} settings by {result.trials[0].method}\n{options.groups_line(split)}\n"
    )
    cells = []
    for t in result.trials[:rows]:
        where, effect = f"{t.operation} at {show_place(t)}", show_value(t.effect, t.low, t.high)
        cells.append([where, str(t.k), show_alpha(t.alpha), str(t.items), effect, f"{t.share:.0%}"])
    show_table(["setting", "k", "alpha", "items", "effect, nats [95 %]", "up"], cells)
    console.print(f"\n[bold]On {result.unsteered.items} held-out items[/]: the chosen setting first")
    show_held_out(result.unsteered, result.held_out)
    console.print(LEGEND)
    show_writing(result.writing, samples)
    show_left_out(result.left_out)
    first = result.held_out[0]
    if first.low is not None and first.low <= 0:
        console.print(
            "[bold]no effect was found on the held-out items[/]: the interval includes 0. Other pairs, more of them, "
            "or a larger --max-kl may help; see austeer inspect for whether the ranking is stable"
        )
    if first.kl > 1.5 * max_kl:
        console.print(f"the limit of {max_kl:g} held on the tuning texts; on held-out ones it is {first.kl:.3f}")
