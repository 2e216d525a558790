"""``austeer select``: a momentum file -> a plan."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from .common import PROMPT, Json, check_writable, console, emit, model_word, next_line


def select(
    momentum: Annotated[Path, typer.Argument(help="A file of austeer measure.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write the plan into.")],
    site: Annotated[str, typer.Option(help="attention, ffn, layer or neuron.")] = "attention",
    k: Annotated[int | None, typer.Option(help="How many AUs.")] = None,
    max_fdr: Annotated[float | None, typer.Option(help="Instead of --k: all AUs at this false discovery rate.")] = None,
    min_stability: Annotated[
        float | None,
        typer.Option(help="Instead of --k: as many AUs as halves of the pairs agree on to this share, say 0.5."),
    ] = None,
    ties: Annotated[str, typer.Option(help="effect (size), or public (as the public code).")] = "effect",
    operation: Annotated[str, typer.Option(help="scale (the paper), push or shift.")] = "scale",
    force: Annotated[bool, typer.Option("--force", help="Overwrite the plan in --out.")] = False,
    json: Json = False,
) -> None:
    """Take the most consistent AUs of a site as a plan.

    Example: `austeer select kind.momentum --site attention --k 10 --operation shift --out plans/kind`
    """
    from ..errors import count_of
    from ..momentum.momentum import Momentum
    from ..pairs.chat import chat_arguments
    from ..plans.files import FILE_NAME

    check_writable(out / FILE_NAME, force)
    plan = Momentum.load(momentum).select(
        site, k, max_fdr=max_fdr, min_stability=min_stability, ties=ties, operation=operation
    )
    path = plan.save_pretrained(out)
    layers = sorted(set(plan.layer.tolist()))
    if json:
        emit({"file": path, "site": site, "operation": operation, "k": len(plan), "layers": layers})
        return
    command = ("austeer", "generate", out, "--model", model_word(plan))
    first, last = plan.beta[0].item(), plan.beta[-1].item()
    console.print(
        f"{count_of(len(plan), 'AU')} of site {site} in {count_of(len(layers), 'layer')}, beta {first:+.3f} to "
        f"{last:+.3f}, {operation}\nwrote {path}\n"
        + next_line(*command, "--alpha", 1, *shlex.split(chat_arguments(plan.chat_template)), "--prompt", PROMPT),
        markup=False,
    )
