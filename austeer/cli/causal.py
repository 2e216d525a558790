"""``austeer causal``: what AUs do when few are steered, beside what momentum and gradients say of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import count_of
from ..utils.tables import show_table, signed
from . import common
from .common import Chat, ChatOption, Device, DType, Json, Model, Quiet, Split, System, Where, console, note
from .search_text import show_value
from .strength import parse_alphas

if TYPE_CHECKING:
    from ..causal import CausalResult, Correlation, Difference, Together

#: The two samples of AUs that correlations are over, and how groups are chosen, in print.
EVERY, MIXED = "every |beta|", "and top by effect"
KINDS = {
    "random": "nothing (random)",
    "momentum": "momentum",
    "effect": "predicted effect",
    "per_side_effect": "effect per side effect",
}


HeldOut = Annotated[
    str,
    typer.Argument(
        help="Pairs, or a labelled task (with --template if it is not in the neutral format), that the momentum was "
        "not measured on.",
        show_default=False,
    ),
]
ProfileFile = Annotated[
    Path | None,
    typer.Option(help="A file of austeer profile: adds top AUs by effect per side effect.", show_default=False),
]
Groups = Annotated[
    int, typer.Option(help="Groups of ten AUs of each kind, steered together, where momentum has effects.", min=0)
]
GroupAlpha = Annotated[
    list[str] | None,
    typer.Option(help="Strengths of the groups; repeated, or with commas. [default: 1,4,16]", show_default=False),
]


def causal(
    held_out: HeldOut,
    momentum: Annotated[Path, typer.Option(help="A file of austeer measure, of other pairs.", show_default=False)],
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder for the result.", show_default=False)],
    site: Annotated[str, typer.Option(help="attention, ffn, layer or neuron.")] = "attention",
    template: Annotated[str | None, typer.Option(help="The task's template, for example boolq.")] = None,
    n: Annotated[
        int, typer.Option("-n", "--n", help="Top AUs of each kind; by momentum beside matched ones.", min=2)
    ] = 25,
    sample: Annotated[int, typer.Option(help="AUs over the whole range of |beta|, for the correlations.", min=4)] = 75,
    items: Annotated[int, typer.Option(help="Held-out items, drawn with the seed.", min=2)] = 32,
    profile: ProfileFile = None,
    groups: Groups = 8,
    alpha: GroupAlpha = None,
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

    Where the momentum has effects (austeer measure --effects), the top AUs by predicted effect are steered, too, and
    groups of ten together, and what the gradient predicts stands beside what is measured.

    Give pairs or items that the momentum was **not** measured on: on its own pairs everything ranked high looks good.

    Example: `austeer causal rest.jsonl --momentum kind.momentum --model demo --site attention --out causal/`

    An interrupted check goes on where it was with the same command; more AUs (-n, --sample, --groups) go on, too.
    """
    from ..causal import ALPHAS, causal_check
    from ..momentum.momentum import Momentum
    from ..momentum.profile import Profile
    from ..tasks import load_task

    form = common.chat_form(chat, chat_option, system)
    result_file, record = out / "causal.json", out / "record.jsonl"
    common.check_writable(result_file, force=True)
    measured = Momentum.load(momentum)
    measured.counters(site)
    made = None if profile is None else Profile.load(profile)
    strengths = parse_alphas(alpha) or ALPHAS
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
            profile=made,
            groups=groups,
            alphas=strengths,
            seed=seed,
            batch_tokens=batch_tokens,
            record=record,
            progress=False if quiet else None,
        )
    except KeyboardInterrupt:
        note(f"what is finished is in {record}: the same command goes on")
        raise
    common.write_json(result_file, result.to_json())
    figures = _figures(result, out)
    for text in result.notes:
        note(text)
    if json:
        common.emit({"out": out, "figures": figures, **result.to_json()})
        return
    show(result)
    names = " and ".join(path.name for path in (result_file, *figures))
    console.print(f"\n{result.seconds:.0f} s; wrote {names} in {out}")
    if not figures:
        note("no figure: it needs matplotlib (pip install 'austeer[plots]')")


def _figures(result: CausalResult, out: Path) -> list[Path]:
    """Draws what there is to draw, if matplotlib is installed."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        return []
    from ..causal.figures import draw_causal, draw_predicted

    draw_causal(result, out / "causal.png")
    return [out / "causal.png", *([out / "predicted.png"] if draw_predicted(result, out / "predicted.png") else [])]


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
    console.print("\n[bold]Rank correlation of |beta| with |effect|[/], AUs of every |beta|")
    rows = [
        [way, *(show_value(c.rho, c.low, c.high) for c in (found.absolute, found.absolute_given))]
        for way, found in result.findings.items()
    ]
    show_table(["steered", "|beta|, |effect|", "the same, layer and scale held constant"], rows)
    console.print("\n[bold]Rank correlation with the effect of raising[/], one AU at a time")
    rows = [
        [way, where, str(row.count), *(_rho(c) for c in (row.beta, row.delta, row.predicted))]
        for way, found in result.findings.items()
        for where, row in ((EVERY, found.spread), (MIXED, found.mixed))
        if row is not None
    ]
    show_table(["steered", "AUs", "count", "beta [95 %]", "delta [95 %]", "predicted [95 %]"], rows)
    mixed = {way: found.mixed for way, found in result.findings.items()}
    if rows := [
        [way, show_value(*row.ahead), show_value(*row.slope)]
        for way, row in mixed.items()
        if row is not None and row.ahead is not None and row.slope is not None
    ]:
        console.print()
        show_table(["steered", "predicted above beta [95 %]", "measured for 1 nat predicted [95 %]"], rows)
    if result.together is not None:
        _show_together(result.together)
    for way, sentences in result.verdict.items():
        console.print(f"\n[bold]{way}[/] ({WAYS[way]})")
        for sentence in sentences:
            console.print(f"  {sentence}")


def _show_together(found: Together) -> None:
    """Groups of AUs: predicted and measured effects at each strength."""
    count = len(found.groups) // len(found.strengths[0].means)
    console.print(
        f"\n[bold]Ten AUs together[/], {count_of(count, 'group')} of each kind, by alpha times their mean differences: "
        "mean predicted / measured effect, nats"
    )
    kinds, headings = list(found.strengths[0].means), [f"alpha {row.alpha:g}" for row in found.strengths]
    show_table(
        ["chosen by", *headings],
        [
            [KINDS[kind], *(" / ".join(signed(value, 2) for value in row.means[kind]) for row in found.strengths)]
            for kind in kinds
        ],
    )
    if found.strengths[0].kl:
        console.print("\nMedian KL on neutral text that the profile predicts, nats a token")
        show_table(
            ["chosen by", *headings],
            [[KINDS[kind], *(f"{row.kl[kind]:.2g}" for row in found.strengths)] for kind in kinds],
        )
    console.print()
    rows = [[f"{row.alpha:g}", show_value(*row.correlation), show_value(*row.slope)] for row in found.strengths]
    show_table(["alpha", "correlation [95 %]", "measured for 1 nat predicted [95 %]"], rows)


def _rho(value: Correlation | None) -> str:
    return "" if value is None else show_value(value.rho, value.low, value.high)


def _cells(row: Difference) -> list[str]:
    top, matched, difference, low, high = (
        1000 * value for value in (row.top, row.matched, row.difference, row.low, row.high)
    )
    return [signed(top, 2), signed(matched, 2), show_value(difference, low, high), f"{row.p:.2g}"]
