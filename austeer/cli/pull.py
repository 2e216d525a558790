"""``austeer pull``: a repository on the Hugging Face Hub -> a plan's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import Json, console, emit


def pull(
    repo: Annotated[str, typer.Argument(metavar="USER/NAME[@REVISION]", help="The plan's repository.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The plan's folder; a plan that is there is replaced.")],
    json: Json = False,
) -> None:
    """Fetch a plan from the Hugging Face Hub into a folder.

    Example: `austeer pull USER/kind --out sets/kind`

    A server whose steering sets are the folder around it has it at the next request, as `kind`.
    """
    from ..errors import count_of
    from ..plans.plan import Plan

    plan = Plan.from_pretrained(repo)
    file = plan.save_pretrained(out)
    if json:
        emit({"repo": repo, "file": file.as_posix(), "aus": len(plan), "operation": plan.operation})
        return
    console.print(f"{count_of(len(plan), 'AU')}, {plan.operation}\nwrote {file}", markup=False)
