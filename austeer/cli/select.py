"""``austeer select``: a momentum file -> a plan."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..utils.tables import show_table, signed
from .common import PROMPT, Json, check_writable, console, emit, model_word, next_line, note, split_names

if TYPE_CHECKING:
    from ..momentum.by_effect import EffectCurve
    from ..momentum.momentum import Momentum
    from ..momentum.profile import Profile
    from ..plans.plan import Plan

Site = Annotated[
    str,
    typer.Option(
        help="attention, ffn, layer or neuron; by effect also several with commas, whose AUs are ranked together, or "
        "auto: the site of the largest predicted effect, or all together."
    ),
]
Rank = Annotated[
    str | None,
    typer.Option(
        help="momentum (of the largest beta), difference (of the largest delta), or effect (of the largest effect for "
        "the side effect: takes --profile, and momentum of measure --effects). [default: effect with --profile, else "
        "momentum]",
        show_default=False,
    ),
]
Step = Annotated[
    str | None,
    typer.Option(
        help="By effect, what a strength of 1 shifts by: difference (delta), or newton (the largest effect at a given "
        "KL). [default: newton]",
        show_default=False,
    ),
]
ProfileFile = Annotated[
    Path | None,
    typer.Option(
        "--profile",
        help="The model's file of austeer profile: for rank effect, and for the dose of every plan of shift.",
        show_default=False,
    ),
]
KL = Annotated[
    float | None,
    typer.Option(
        "--kl",
        metavar="NATS",
        help="By effect, instead of --k: the KL to steer with, nats a token, for example 0.1; takes as few AUs as have "
        "95 % of the largest predicted effect at it.",
        show_default=False,
    ),
]
Operation = Annotated[
    str | None,
    typer.Option(
        help="scale (the paper), push, shift or ablate. [default: by effect shift, else scale]", show_default=False
    ),
]
Layers = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        help="Only AUs of these layers (14 or 0-7,12); without --k or what stands for it, all of them. [default: all "
        "that were measured]",
        show_default=False,
    ),
]


def select(
    momentum: Annotated[Path, typer.Argument(help="A file of austeer measure.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write the plan into.")],
    site: Site = "attention",
    k: Annotated[int | None, typer.Option(help="How many AUs.")] = None,
    kl: KL = None,
    rank: Rank = None,
    step: Step = None,
    profile: ProfileFile = None,
    max_fdr: Annotated[
        float | None, typer.Option(help="By momentum, instead of --k: all AUs at this false discovery rate.")
    ] = None,
    min_stability: Annotated[
        float | None,
        typer.Option(
            help="By momentum, instead of --k: as many AUs as halves of the pairs agree on to this share, say 0.5."
        ),
    ] = None,
    ties: Annotated[str, typer.Option(help="By momentum: effect (size), or public (as the public code).")] = "effect",
    operation: Operation = None,
    layers: Layers = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the plan in --out.")] = False,
    json: Json = False,
) -> None:
    """Take the most consistent AUs of a site as a plan, or those of the largest effect for their side effect.

    Example: `austeer select kind.momentum --site attention --k 10 --operation shift --out plans/kind`

    A direction to ablate: `austeer select kind.momentum --site layer --layers 14 --operation ablate --out plans/kind`

    By effect: `austeer select kind.momentum --site auto --profile demo.profile --kl 0.1 --out plans/kind`
    """
    from ..momentum.momentum import Momentum
    from ..momentum.profile import Profile
    from ..momentum.selection import KL as USUAL
    from ..plans.dose_table import dose_rows
    from ..plans.files import FILE_NAME
    from .momentum_file import parse_layers

    check_writable(out / FILE_NAME, force)
    names = split_names(site)
    where: str | list[str] = names[0] if len(names) == 1 else names
    counted = Momentum.load(momentum)
    made = None if profile is None else Profile.load(profile)
    plan = counted.select(
        where,
        k,
        kl=kl,
        rank=rank,
        step=step,
        profile=made,
        max_fdr=max_fdr,
        min_stability=min_stability,
        ties=ties,
        operation=operation,
        layers=parse_layers(layers),
    )
    searched = plan.rank == "effect" and (kl is not None or where == "auto")
    curves = _curves(counted, made, names, plan.step) if searched and made is not None else []
    path = plan.save_pretrained(out)
    if made is not None and plan.dose is None:
        note(f"--profile: the plan has no dose, as it is of {plan.operation}; only one of shift has")
    if json:
        emit(
            {
                "file": path,
                "sites": list(plan.sites),
                "operation": plan.operation,
                "rank": plan.rank,
                "step": plan.step,
                "k": len(plan),
                "layers": sorted(set(plan.layer.tolist())),
                "searched": [{"sites": c.sites, "enough": c.enough, "k": c.k, "effect": c.effect} for c in curves],
                "dose": [] if plan.dose is None else [vars(row) for row in dose_rows(plan.dose)],
            }
        )
        return
    if curves:
        taken = curves[0] if where == "auto" else max(curves, key=lambda curve: len(curve.sites))
        show_curves(curves, taken, len(plan), USUAL if kl is None else kl)
    show(plan)
    console.print(f"wrote {path}\n{_next(plan, out, kl)}", markup=False)


def _curves(momentum: Momentum, profile: Profile, names: list[str], step: str) -> list[EffectCurve]:
    """The predicted effects of the sites that were to choose from, each and together, best first."""
    from ..momentum.by_effect import best_sites

    sites = [site for site in momentum.sites if site in profile.rows] if names == ["auto"] else names
    return best_sites(momentum, profile, list(dict.fromkeys(sites)), step)


def show_curves(curves: list[EffectCurve], taken: EffectCurve, k: int, kl: float) -> None:
    """What there was to choose from, and what was taken."""
    from ..momentum.by_effect import ENOUGH

    rows = []
    for curve in curves:
        effect = curve.effect[curve.k.index(curve.enough)] * kl**0.5
        mark = f"k = {k}" if curve is taken else ""
        rows.append([" + ".join(curve.sites), str(curve.enough), signed(effect, 2), mark])
    show_table(["sites", "AUs", f"predicted effect at a KL of {kl:g}, nats", "taken"], rows)
    console.print(
        f"AUs: the fewest that have {ENOUGH:.0%} of the largest effect; chosen by one half of the pairs and of the "
        "profile, and judged by the other\n",
        soft_wrap=False,
    )


def show(plan: Plan) -> None:
    """What was taken, and what its strengths do."""
    from ..errors import count_of
    from ..plans.dose_table import dose_legend, dose_rows, dose_table

    how = f"by effect, {plan.step} step" if plan.rank == "effect" else f"by {plan.rank}"
    if plan.rank == "momentum":
        how = f"beta {plan.beta[0].item():+.3f} to {plan.beta[-1].item():+.3f}"
    layers = count_of(len(set(plan.layer.tolist())), "layer")
    sites = f"site {plan.sites[0]}" if len(plan.sites) == 1 else f"sites {', '.join(plan.sites)}"
    console.print(f"{count_of(len(plan), 'AU')} of {sites} in {layers}, {how}, {plan.operation}")
    if plan.dose is not None and (rows := dose_rows(plan.dose)):
        console.print()
        headings, *cells = dose_table(rows)
        show_table(headings, cells, right=True)
        console.print(dose_legend(plan.dose, plan.rank), soft_wrap=False)


def _next(plan: Plan, out: Path, kl: float | None) -> str:
    from ..momentum.selection import KL as USUAL
    from ..pairs.chat import chat_arguments

    strength: tuple[Any, ...] = ("--alpha", 1)
    if plan.dose is not None:
        strength = ("--kl", f"{USUAL if kl is None else kl:g}")
    chat = shlex.split(chat_arguments(plan.chat_template))
    return next_line("austeer", "generate", out, "--model", model_word(plan), *strength, *chat, "--prompt", PROMPT)
