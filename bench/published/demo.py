"""What the commands print, from a result file: the demo's figures, and how a measurement of momentum went."""

from __future__ import annotations

import io
from dataclasses import fields
from typing import Any

from rich.console import Console

from austeer.demo.demo import DemoResult
from austeer.forward.timing import Timing
from austeer.momentum.report import MeasureReport, Seconds
from austeer.tuning.held_out import HeldOut, Unsteered
from austeer.tuning.tune import Trial


def printed(content: dict[str, Any]) -> str:
    """What ``austeer demo`` prints of this result, as a block of code."""
    from austeer.cli.demo import show  # needs typer, which a machine that only measures may lack

    own = {field.name: content[field.name] for field in fields(DemoResult)} | {
        "trials": [Trial(**trial) for trial in content["trials"]],
        "chosen": Trial(**content["chosen"]),
        "unsteered": Unsteered(**content["unsteered"]),
        "held_out": [HeldOut(**row) for row in content["held_out"]],
        "timings": {name: Timing(**row) for name, row in content["timings"].items()},
    }
    text = io.StringIO()
    console = Console(file=text, width=1000, highlight=False, color_system=None, soft_wrap=True)
    show(DemoResult(**own), console)
    return _code(text.getvalue().strip("\n").splitlines())


def measured(report: dict[str, Any]) -> str:
    """What ``austeer measure`` prints at its end of this report, as a block of code."""
    known = {field.name: report[field.name] for field in fields(MeasureReport)}
    found = MeasureReport(**known | {"seconds": Seconds(**report["seconds"])})
    return _code(
        [f"{found.pairs} pairs on ... in {found.seconds.total:.1f} s", *(f"  {line}" for line in found.lines())]
    )


def _code(lines: list[str]) -> str:
    return "\n".join(["```text", *(line.rstrip() for line in lines), "```"])
