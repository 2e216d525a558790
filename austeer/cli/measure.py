"""``austeer measure``: pairs and a model -> a momentum file."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import (
    Device,
    DType,
    Json,
    Model,
    Quiet,
    check_writable,
    console,
    emit,
    load,
    note,
    parse_where,
    split_names,
)


def measure(
    pairs: Annotated[
        list[str],
        typer.Argument(
            help="Files with a prompt and two continuations a row: JSONL, JSON, CSV (also .gz, .zst), Parquet; or "
            "hf:ORG/NAME, or a folder of Dataset.save_to_disk.",
            show_default=False,
        ),
    ],
    model: Model,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The momentum file to write (safetensors).", show_default=False)
    ] = None,
    sites: Annotated[str, typer.Option(help="attention, ffn, layer, neuron; comma-separated.")] = "attention,ffn",
    layers: Annotated[
        str | None, typer.Option(help="Only these, for example 0-11,15; what is above is not run. [default: all]")
    ] = None,
    prompt_field: Annotated[str, typer.Option(help="The name of the prompt's field.")] = "prompt",
    positive_field: Annotated[str, typer.Option(help="The name of the desired continuation's field.")] = "positive",
    negative_field: Annotated[str, typer.Option(help="The name of the undesired continuation's field.")] = "negative",
    where: Annotated[list[str] | None, typer.Option(help="Only rows where FIELD=VALUE; may be repeated.")] = None,
    split: Annotated[str | None, typer.Option(help="Which split of a dataset.")] = None,
    limit: Annotated[int | None, typer.Option(help="Read at most so many pairs.", min=2)] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts through the model's chat template.")] = False,
    max_length: Annotated[int | None, typer.Option(help="Cut texts on the left to so many tokens.", min=1)] = None,
    strategy: Annotated[
        str, typer.Option(help="resident, layerwise (each layer is loaded once), or auto: by what fits into memory.")
    ] = "auto",
    share_prompts: Annotated[bool, typer.Option(help="Run what texts have in common once.")] = True,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens in a batch, with padding. [default: by the device and its memory]", min=1)
    ] = None,
    dtype: DType = "auto",
    device: Device = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Where counters are kept. [default: OUT.checkpoint]")] = None,
    checkpoint_every: Annotated[int, typer.Option(help="Pairs between two checkpoints.", min=1)] = 1024,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint, if there is one.")] = False,
    save_activations: Annotated[
        Path | None, typer.Option(help="A folder to keep the activations in, for momentum from-activations.")
    ] = None,
    scratch: Annotated[Path | None, typer.Option(help="A folder for hidden states (layerwise).")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only estimate time, memory and bytes, from the model's config.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite --out, and start anew over a checkpoint.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Count on contrastive pairs how often each AU is larger on the desired text (activation momentum).

    Example: `austeer measure pairs.jsonl --model demo --out kind.momentum`

    On several GPUs: `accelerate launch -m austeer measure ...` splits the pairs over the processes.
    """
    from ..errors import AusteerError
    from ..making import grave_note
    from ..measuring.checkpoint import check_path, remove, written
    from ..measuring.measure import measure as measure_momentum
    from ..measuring.processes import Processes
    from ..pairs.stream import stream_pairs

    conditions = parse_where(where)
    if out is None and not dry_run:
        raise AusteerError("--out: found none, expected the momentum file to write")
    loaded = stream_pairs(
        pairs[0] if len(pairs) == 1 else pairs,
        prompt=prompt_field,
        positive=positive_field,
        negative=negative_field,
        where=conditions,
        limit=limit,
        split=split,
    )
    names, numbers = split_names(sites), parse_layers(layers)
    if checkpoint is None and out is not None:
        checkpoint = out.with_name(f"{out.name}.checkpoint")
    if dry_run:
        estimate_only(
            model,
            loaded,
            names,
            chat,
            json,
            layers=numbers,
            strategy=strategy,
            dtype=dtype,
            device=device,
            batch_tokens=batch_tokens,
            share_prompts=share_prompts,
            max_length=max_length,
            checkpoint=checkpoint,
            scratch=scratch,
        )
        return
    assert out is not None and checkpoint is not None
    check_writable(out, force)
    check_path(checkpoint)
    if checkpoint.absolute() in [out.absolute(), *(Path(path).absolute() for path in pairs)]:
        raise AusteerError(
            f"--checkpoint: found {checkpoint}, which is the result or the pairs; give a name of its own"
        )
    distributed, main = int(os.environ.get("WORLD_SIZE", "1")) > 1, os.environ.get("RANK", "0") == "0"
    if force and not resume:
        if distributed:
            Processes.launched().main_first(lambda: remove(checkpoint, scratch))
        else:
            remove(checkpoint, scratch)
    if resume and main and not written(checkpoint):
        note(f"{checkpoint}: there is no checkpoint; starting with the first pair")
    start = time.perf_counter()
    network, tokenizer = load(model, dtype, device, strategy)
    load_seconds = time.perf_counter() - start
    if chat:
        loaded = loaded.with_chat_template(tokenizer)
    if main and (grave := grave_note(loaded, tokenizer, chat_template=chat)):
        note(grave)
    momentum = measure_momentum(
        network,
        tokenizer,
        loaded,
        names,
        layers=numbers,
        strategy=strategy,
        share_prompts=share_prompts,
        batch_tokens=batch_tokens,
        max_length=max_length,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        resume=resume,
        distributed=distributed,
        save_activations=save_activations,
        scratch=scratch,
        progress=False if quiet or not main else None,
    )
    if not main:
        return
    save(momentum, out, checkpoint, scratch)
    assert momentum.report is not None
    momentum.report.seconds.load = load_seconds
    if json:
        emit(
            {
                "file": out,
                "pairs": momentum.pairs,
                "cut": momentum.cut,
                "identical": momentum.identical,
                "sites": {name: list(c.positive.shape) for name, c in momentum.sites.items()},
                "layers": list(momentum.layers),
                "seconds": momentum.report.seconds.total,
                "report": momentum.report.to_json(),
            }
        )
        return
    console.print(f"{momentum.pairs} pairs on {momentum.model.name} in {momentum.report.seconds.total:.1f} s")
    for name, counters in momentum.sites.items():
        count, width = counters.positive.shape
        console.print(f"  {name:<9} {count} layers x {width} AUs")
    if momentum.cut:
        console.print(f"  {momentum.cut} texts were cut on the left to fit")
    if momentum.identical:
        console.print(f"  {momentum.identical} pairs have equal sides and count for nothing")
    for line in momentum.report.lines():
        console.print(f"  {line}")
    console.print(f"wrote {out}\nnext: austeer inspect {out}")


def estimate_only(model: str, pairs: Any, sites: list[str], chat: bool, json: bool, **options: Any) -> None:
    """Prints what the same command without ``--dry-run`` will take."""
    from ..costs.estimate import estimate
    from ..models.skeleton import load_tokenizer

    tokenizer = load_tokenizer(model)
    found = estimate(model, pairs.with_chat_template(tokenizer) if chat else pairs, sites, **options)
    if json:
        emit(found.to_json())
        return
    for line in found.lines():
        console.print(line)


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


def save(momentum, out: Path, checkpoint: Path, scratch: Path | None) -> None:
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
