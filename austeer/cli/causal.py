"""``austeer causal``: whether what momentum ranks high does more than what it does not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..utils.tables import show_table, signed
from . import common
from .common import Chat, ChatOption, Device, DType, Json, Model, Quiet, Split, System, Where, console, note
from .search_text import show_value

if TYPE_CHECKING:
    from ..causal import CausalResult, Difference


def causal(
    held_out: Annotated[
        str,
        typer.Argument(
            help="Pairs, or a labelled task (with --template if it is not in the neutral format), that the momentum "
            "was not measured on.",
            show_default=False,
        ),
    ],
    momentum: Annotated[Path, typer.Option(help="A file of austeer measure, of other pairs.", show_default=False)],
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder for the result.", show_default=False)],
    site: Annotated[str, typer.Option(help="attention, ffn, layer or neuron.")] = "attention",
    template: Annotated[str | None, typer.Option(help="The task's template, for example boolq.")] = None,
    n: Annotated[int, typer.Option("-n", "--n", help="Top AUs, each beside a matched random one.", min=2)] = 25,
    sample: Annotated[int, typer.Option(help="AUs over the whole range of |beta|, for the correlations.", min=4)] = 75,
    items: Annotated[int, typer.Option(help="Held-out items, drawn with the seed.", min=2)] = 32,
    ways: Annotated[str, typer.Option(help="scale, shift, deviation; comma-separated.")] = "scale,shift,deviation",
    where: Where = None,
    split: Split = None,
    chat: Chat = False,
    chat_option: ChatOption = None,
    system: System = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    batch_tokens: Annotated[int, typer.Option(help="Tokens in a batch.", min=1)] = 2048,
    dtype: DType = "float32",
    device: Device = None,
    force: Annotated[bool, typer.Option("--force", help="Start anew over what is in --out.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Steer the top AUs, and random AUs that match them, each alone, and compare what that does.

    Give pairs or items that the momentum was **not** measured on: on its own pairs everything ranked high looks good.

    Example: `austeer causal rest.jsonl --momentum kind.momentum --model demo --site attention --out causal/`

    An interrupted check goes on where it was with the same command; more AUs (-n, --sample) go on, too.
    """
    from importlib.util import find_spec

    from ..causal import causal_check
    from ..momentum.momentum import Momentum
    from ..tasks import load_task

    form = common.chat_form(chat, chat_option, system)
    result_file, record = out / "causal.json", out / "record.jsonl"
    common.check_writable(result_file, force=True)
    measured = Momentum.load(momentum)
    measured.counters(site)
    task = load_task(held_out, template, where=common.parse_where(where), split=split).take(items, seed)
    if force:
        record.unlink(missing_ok=True)
    network, tokenizer = common.load(model, dtype, device)
    task = common.in_chat_form(task, tokenizer, form)
    try:
        result = causal_check(
            network,
            tokenizer,
            task,
            measured,
            site,
            n=n,
            sample=sample,
            ways=common.split_names(ways),
            seed=seed,
            batch_tokens=batch_tokens,
            record=record,
            progress=False if quiet else None,
        )
    except KeyboardInterrupt:
        note(f"what is finished is in {record}: the same command goes on")
        raise
    common.write_json(result_file, result.to_json())
    figure = None
    if find_spec("matplotlib") is not None:
        from ..causal.figures import draw_causal

        draw_causal(result, figure := out / "causal.png")
    for text in result.notes:
        note(text)
    if json:
        common.emit({"out": out, "figure": figure, **result.to_json()})
        return
    show(result)
    console.print(f"\n{result.seconds:.0f} s; wrote {result_file.name}{' and causal.png' if figure else ''} in {out}")
    if figure is None:
        note("no figure: it needs matplotlib (pip install 'austeer[plots]')")


def show(result: CausalResult) -> None:
    """The result's figures and what follows from them."""
    from ..causal import WAYS

    console.print(
        f"[bold]{result.n} top AUs of site {result.site} beside {result.n} matched random ones[/], each steered alone, "
        f"on {result.items} held-out items (unsteered log-odds {signed(result.log_odds, 2)} nats)"
    )
    rows = [
        [way, name, *_cells(row)]
        for way, found in result.findings.items()
        for name, row in (("|effect|", found.size), ("wanted direction", found.wanted))
    ]
    show_table(["steered", "mean, millinats", "top", "matched", "difference [95 %]", "p"], rows)
    console.print("\n[bold]Rank correlation with the effect[/], AUs over the whole range of |beta|")
    rows = [
        [way, *(show_value(c.rho, c.low, c.high) for c in (found.signed, found.absolute, found.absolute_given))]
        for way, found in result.findings.items()
    ]
    show_table(["steered", "beta, effect", "|beta|, |effect|", "the same, layer and scale held constant"], rows)
    for way, sentences in result.verdict.items():
        console.print(f"\n[bold]{way}[/] ({WAYS[way]})")
        for sentence in sentences:
            console.print(f"  {sentence}")


def _cells(row: Difference) -> list[str]:
    top, matched, difference, low, high = (
        1000 * value for value in (row.top, row.matched, row.difference, row.low, row.high)
    )
    return [signed(top, 2), signed(matched, 2), show_value(difference, low, high), f"{row.p:.2g}"]
