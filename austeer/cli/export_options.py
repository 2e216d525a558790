"""What the commands of ``austeer export`` share."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from .common import note

Plans = Annotated[list[str], typer.Argument(help="A plan's folder or Hub id; effects of several add up.")]
Alphas = Annotated[
    list[float] | None, typer.Option("--alpha", "-a", help="Strength: one for all plans, or one for each. [1]")
]
Out = Annotated[Path, typer.Option("--out", "-o", help="The folder to make.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is in --out.")]


def read_plans(names: Sequence[str], alphas: Sequence[float] | None) -> list:
    """Plans from folders or the Hub, each with its strength."""
    from ..errors import PlanError
    from ..plans.plan import Plan

    given = list(alphas or [1.0])
    if len(given) not in (1, len(names)):
        raise PlanError(f"--alpha: found {len(given)} for {len(names)} plans, expected one, or one for each plan")
    return list(zip(map(Plan.from_pretrained, names), given if len(given) > 1 else given * len(names)))


@contextmanager
def warnings_as_notes() -> Iterator[None]:
    """What an export warns of, in the command line's form."""
    from ..export import ExportWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ExportWarning)
        yield
    for warning in caught:
        if issubclass(warning.category, ExportWarning):
            note(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
