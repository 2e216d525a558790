"""What ``austeer measure`` and ``austeer momentum`` share: the options of a momentum file, its writing and figures."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import console, next_line, split_names

if TYPE_CHECKING:
    from ..momentum.momentum import Momentum

Out = Annotated[
    Path | None, typer.Option("--out", "-o", help="The momentum file to write (safetensors).", show_default=False)
]
Checkpoint = Annotated[Path | None, typer.Option(help="Where counters are kept. [default: OUT.checkpoint]")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint, if there is one.")]
ForceAnew = Annotated[bool, typer.Option("--force", help="Overwrite --out, and start anew over a checkpoint.")]


def check_out(out: Path | None, dry_run: bool) -> None:
    """Refuses a run that has nowhere to write its result."""
    from ..errors import AusteerError

    if out is None and not dry_run:
        raise AusteerError("--out: found none, expected the momentum file to write")


def parse_layers(text: str | None) -> list[int] | None:
    """``0-11,15`` as numbers."""
    from ..errors import SiteError

    if text is None:
        return None
    numbers: list[int] = []
    for part in split_names(text):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise SiteError(f"--layers: found {part!r}, expected numbers and ranges, for example 0-11,15")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def save(momentum: Momentum, out: Path, checkpoint: Path, scratch: Path | None = None) -> None:
    """Writes the result and drops the checkpoint; where the disk is full, saves what can be saved and says where."""
    from ..errors import AusteerError, FileFormatError
    from ..measuring.checkpoint import remove, written

    try:
        momentum.save(out)
    except FileFormatError as error:
        elsewhere = Path(tempfile.mkdtemp(prefix="austeer-"), out.name)
        try:
            momentum.save(elsewhere)
        except FileFormatError:
            elsewhere.parent.rmdir()
            kept = (
                f"What was counted up to the last checkpoint is in {checkpoint}: make"
                if written(checkpoint)
                else "Make"
            )
            raise AusteerError(f"{error}. {kept} room, and run the same with --resume") from error
        raise AusteerError(f"{error}. The result is whole, in {elsewhere}: move it from there") from error
    remove(checkpoint, scratch)


def figures(momentum: Momentum) -> dict[str, Any]:
    """What a momentum was counted on, for JSON."""
    return {
        "pairs": momentum.pairs,
        "cut": momentum.cut,
        "identical": momentum.identical,
        "sites": {name: list(c.positive.shape) for name, c in momentum.sites.items()},
        "layers": list(momentum.layers),
        "effects": [] if momentum.effects is None else list(momentum.effects.sites),
    }


def show(momentum: Momentum, out: Path, *lines: str) -> None:
    """What a momentum was counted on, further lines, and where it was written."""
    from ..errors import count_of

    report = momentum.report
    took = "" if report is None else f" in {report.seconds.total:.1f} s"
    console.print(f"{count_of(momentum.pairs, 'pair')} on {momentum.model.name}{took}")
    for name, counters in momentum.sites.items():
        count, width = counters.positive.shape
        console.print(f"  {name:<9} {count_of(count, 'layer')} x {count_of(width, 'AU')}")
    if momentum.effects is not None:
        took = "" if report is None else f", {report.seconds.effects:.1f} s there and back"
        console.print(f"  with the effects of {', '.join(momentum.effects.sites)}{took}")
    if report is not None and momentum.cut:
        console.print(f"  cut on the left to fit: {count_of(momentum.cut, 'text')}")
    if momentum.identical:
        console.print(f"  of equal sides, which count for nothing: {count_of(momentum.identical, 'pair')}")
    for line in lines:
        console.print(f"  {line}")
    console.print(f"wrote {out}\n{next_line('austeer', 'inspect', out)}", markup=False)
