"""Replays of plans as the commands record them: ``--replay`` and ``--record``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import common

if TYPE_CHECKING:
    from ..plans.plan import Plan

Replay = Annotated[
    bool,
    typer.Option(
        "--replay",
        help="Also run the model, and store what it writes with the plan and without, for austeer verify to compare.",
    ),
]


def load_sharp(model: str, dtype: str | None, device: str | None) -> tuple[Any, Any]:
    """A model and tokenizer; by default in float32, in which a replay is sharpest, if that fits into memory."""
    from ..models.load import fits

    return common.load(model, dtype or ("float32" if fits(model, "float32", device) else "auto"), device)


def with_replay(
    plans: list[tuple[Plan, float]], model: str, out: Path, force: bool, quiet: bool, *, file: bool = False
) -> list[tuple[Plan, float]]:
    """The one plan of an export, with a replay at its strength.

    Args:
        out, force, quiet, file: of the export, which is not to fail after the model has run.

    Raises:
        PlanError: there are several plans. ExportError: ``out`` cannot be written.
    """
    from ..errors import PlanError
    from ..export.output_files import check_output
    from ..verifying import record_replay

    if len(plans) > 1:
        raise PlanError(
            f"--replay: found {len(plans)} plans, expected one; what several do together is no plan's own. Export "
            "their sum (plan_a + plan_b), or leave --replay out"
        )
    check_output(out, force, 0, file=file)
    ((plan, alpha),) = plans
    network, tokenizer = load_sharp(model, None, None)
    return [(record_replay(network, tokenizer, plan, alpha, progress=False if quiet else None), alpha)]
