"""``austeer momentum``: momentum files from stored activations, and from other momentum files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import ChatOption, Force, Json, Quiet, chat_form, check_writable, console, emit
from .momentum_file import Checkpoint, ForceAnew, Out, Resume, check_out, figures, parse_layers, save, show

if TYPE_CHECKING:
    from ..models.sites import Fingerprint
    from ..momentum.momentum import Momentum

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Make momentum files from stored activations, or from other momentum files.",
)


@app.command()
def from_activations(
    shards: Annotated[
        list[Path],
        typer.Argument(
            help='Safetensors files, or folders of them, with "SITE.positive" and "SITE.negative" '
            "[rows, layers, width] for every site.",
            show_default=False,
        ),
    ],
    out: Out = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="What the activations are of, if the shards do not say: folder or Hub id."),
    ] = None,
    model_type: Annotated[str | None, typer.Option(help="Instead of --model: its type, for example llama.")] = None,
    model_layers: Annotated[int | None, typer.Option(help="With --model-type: how many layers it has.", min=1)] = None,
    name: Annotated[str | None, typer.Option(help="With --model-type: what it is called.")] = None,
    layers: Annotated[
        str | None, typer.Option(help="Which layers the shards hold, for example 0-11,15. [default: all]")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="The prompts went through a chat template.")] = False,
    chat_option: ChatOption = None,
    device: Annotated[
        str | None, typer.Option(help="Where to count: cpu, cuda:0 ... [default: cuda if there is one]")
    ] = None,
    chunk_mb: Annotated[
        int | None, typer.Option(help="MB read at a time; three such are held. [default: 64 MiB, or 32 rows]", min=1)
    ] = None,
    checkpoint: Checkpoint = None,
    resume: Resume = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it takes: bytes, memory, and time by a short trial.")
    ] = False,
    force: ForceAnew = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Count momentum over stored last-token activations, far bigger than memory, at the speed of storage.

    Example: `austeer momentum from-activations activations/ --out kind.momentum`

    Arrays of other tools: `... shards/*.safetensors --model Qwen/Qwen3-8B --out kind.momentum` (only its config is
    read).
    """
    from ..measuring.checkpoint import check_path, remove
    from ..measuring.stored.count import ActivationCount
    from ..measuring.stored.folder import StoredActivations

    check_out(out, dry_run)
    stored = StoredActivations.open(
        shards,
        model=fingerprint_option(model, model_type, model_layers, name),
        layers=parse_layers(layers),
        chat_template=chat_form(chat, chat_option, None) or None,
    )
    chunk_bytes = None if chunk_mb is None else chunk_mb * 10**6
    if dry_run:
        needs = ActivationCount(stored, device=device, chunk_bytes=chunk_bytes).needs()
        if json:
            emit(needs.to_json())
        else:
            console.print("\n".join(needs.lines()))
        return
    assert out is not None
    check_writable(out, force)
    checkpoint = checkpoint or out.with_name(f"{out.name}.checkpoint")
    check_path(checkpoint)
    if force and not resume:
        remove(checkpoint)
    count = ActivationCount(
        stored,
        device=device,
        chunk_bytes=chunk_bytes,
        checkpoint=checkpoint,
        resume=resume,
        progress=False if quiet else None,
    )
    momentum = count.run()
    save(momentum, out, checkpoint)
    if json:
        emit({**file_figures(out, momentum), "report": count.report.to_json()})
    else:
        show(momentum, out, count.report.line())


@app.command()
def merge(
    files: Annotated[list[Path], typer.Argument(help="Momentum files of one model.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The momentum file to write (safetensors).")],
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Add up momentum files of different pairs, made anywhere. Counts do not depend on the order.

    Example: `austeer momentum merge monday.momentum tuesday.momentum --out both.momentum`
    """
    from ..momentum.merging import merge_files

    check_writable(out, force)
    momentum = merge_files(files, progress=False if quiet else None)
    momentum.save(out)
    if json:
        emit(file_figures(out, momentum))
    else:
        show(momentum, out)


def fingerprint_option(
    model: str | None, model_type: str | None, layers: int | None, name: str | None
) -> Fingerprint | None:
    """The fingerprint of the model that the options name; None if they name none."""
    from ..errors import AusteerError
    from ..measuring.stored.folder import fingerprint_of
    from ..models.sites import Fingerprint

    by_hand = {"--model-type": model_type, "--model-layers": layers, "--name": name}
    given = [option for option, value in by_hand.items() if value is not None]
    if model is not None:
        if given:
            raise AusteerError(f"{given[0]}: found with --model, expected one way to name the model")
        return fingerprint_of(model)
    if not given:
        return None
    missing = [option for option, value in by_hand.items() if value is None]
    if missing:
        raise AusteerError(f"{', '.join(missing)}: found none, expected with {given[0]}; or give --model")
    assert model_type is not None and layers is not None and name is not None
    return Fingerprint(model_type, layers, {}, name, None)


def file_figures(out: Path, momentum: Momentum) -> dict[str, Any]:
    """What a file was counted on, for JSON."""
    return {"file": out, "model": momentum.model.name, **figures(momentum), "sources": list(momentum.sources)}
