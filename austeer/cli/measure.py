"""``austeer measure``: pairs and a model -> a momentum file."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import common, momentum_file
from .common import (
    Chat,
    ChatOption,
    Device,
    DType,
    Json,
    Model,
    NegativeField,
    PositiveField,
    PromptField,
    Quiet,
    Split,
    System,
    Where,
)
from .momentum_file import Checkpoint, ForceAnew, Out, Resume

if TYPE_CHECKING:
    from ..momentum.momentum import Momentum
    from ..pairs.chat import ChatForm
    from ..pairs.stream import PairStream

Sources = Annotated[
    list[str],
    typer.Argument(
        help="Files with a prompt and two continuations a row: JSONL, JSON, CSV (also .gz, .zst), Parquet; or "
        "hf:ORG/NAME, or a folder of Dataset.save_to_disk.",
        show_default=False,
    ),
]
Layers = Annotated[
    str | None, typer.Option(help="Only these, for example 0-11,15; what is above is not run. [default: all]")
]
Strategy = Annotated[
    str, typer.Option(help="resident, layerwise (each layer is loaded once), or auto: by what fits into memory.")
]
BatchTokens = Annotated[
    int | None, typer.Option(help="Tokens in a batch, with padding. [default: by the device and its memory]", min=1)
]
SaveActivations = Annotated[
    Path | None, typer.Option(help="A folder to keep the activations in, for momentum from-activations.")
]
Effects = Annotated[
    bool,
    typer.Option(
        "--effects",
        help="Also find what shifting each AU does to the log-odds of the positive text, for select by effect: a pass "
        "there and back, which takes about three times as long.",
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Only estimate time, memory and bytes, from the model's config.")
]


EFFECTS_NOTE = (
    "time and memory are those without --effects, which takes about three times as long, and also holds the "
    "activations of all layers of a batch"
)


def measure(
    pairs: Sources,
    model: Model,
    out: Out = None,
    sites: Annotated[str, typer.Option(help="attention, ffn, layer, neuron; comma-separated.")] = "attention,ffn",
    layers: Layers = None,
    effects: Effects = False,
    prompt_field: PromptField = "prompt",
    positive_field: PositiveField = "positive",
    negative_field: NegativeField = "negative",
    where: Where = None,
    split: Split = None,
    limit: Annotated[int | None, typer.Option(help="Read at most so many pairs.", min=2)] = None,
    chat: Chat = False,
    chat_option: ChatOption = None,
    system: System = None,
    max_length: Annotated[int | None, typer.Option(help="Cut texts on the left to so many tokens.", min=1)] = None,
    strategy: Strategy = "auto",
    share_prompts: Annotated[bool, typer.Option(help="Run what texts have in common once.")] = True,
    batch_tokens: BatchTokens = None,
    dtype: DType = "auto",
    device: Device = None,
    checkpoint: Checkpoint = None,
    checkpoint_every: Annotated[int, typer.Option(help="Pairs between two checkpoints.", min=1)] = 1024,
    resume: Resume = False,
    save_activations: SaveActivations = None,
    scratch: Annotated[Path | None, typer.Option(help="A folder for hidden states (layerwise).")] = None,
    dry_run: DryRun = False,
    force: ForceAnew = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Count on contrastive pairs how often each AU is larger on the desired text (activation momentum).

    Example: `austeer measure pairs.jsonl --model demo --out kind.momentum`

    On several GPUs: `accelerate launch -m austeer measure ...` splits the pairs over the processes.
    """
    from ..making import grave_note
    from ..measuring.measure import measure as measure_momentum
    from ..pairs.stream import stream_pairs

    conditions, form = common.parse_where(where), common.chat_form(chat, chat_option, system)
    momentum_file.check_out(out, dry_run)
    fields = {"prompt": prompt_field, "positive": positive_field, "negative": negative_field}
    source = pairs[0] if len(pairs) == 1 else pairs
    loaded = stream_pairs(source, **fields, where=conditions, limit=limit, split=split)
    checkpoint = checkpoint or (out and out.with_name(f"{out.name}.checkpoint"))
    work: dict[str, Any] = {  # what a run and its estimate take alike
        "sites": common.split_names(sites),
        "layers": momentum_file.parse_layers(layers),
        "strategy": strategy_of(strategy, effects),
        "share_prompts": share_prompts,
        "batch_tokens": batch_tokens,
        "max_length": max_length,
        "checkpoint": checkpoint,
        "scratch": scratch,
    }
    if dry_run:
        show_estimate(model, loaded, form, json, effects, dtype=dtype, device=device, **work)
        return
    assert out is not None and checkpoint is not None
    common.check_writable(out, force)
    check_checkpoint(checkpoint, out, pairs)
    main = os.environ.get("RANK", "0") == "0"
    open_checkpoint(checkpoint, scratch, force, resume, main)
    next(iter(loaded))  # what is wrong with the first row is told before the model is loaded
    network, tokenizer, load_seconds = load_timed(model, dtype, device, work["strategy"])
    loaded = common.in_chat_form(loaded, tokenizer, form)
    if main and (grave := grave_note(loaded, tokenizer, chat_template=form)):
        common.note(grave)
    momentum = measure_momentum(
        network,
        tokenizer,
        loaded,
        **work,
        effects=effects,
        checkpoint_every=checkpoint_every,
        resume=resume,
        distributed=distributed(),
        save_activations=save_activations,
        progress=False if quiet or not main else None,
    )
    if main:
        momentum_file.save(momentum, out, checkpoint, scratch)
        show(momentum, out, load_seconds, json)


def load_timed(*arguments: Any) -> tuple[Any, Any, float]:
    """:func:`austeer.cli.common.load`, and how many seconds it took."""
    start = time.perf_counter()
    return *common.load(*arguments), time.perf_counter() - start


def strategy_of(strategy: str, effects: bool) -> str:
    """Effects are found by the resident one; refuses the other before a model is loaded."""
    from ..errors import CaptureError

    if effects and strategy == "layerwise":
        raise CaptureError(
            "--effects: found it beside --strategy layerwise, in which no gradient goes through the whole model; "
            "expected resident"
        )
    return "resident" if effects and strategy == "auto" else strategy


def show_estimate(model: str, pairs: PairStream, chat: ChatForm, json: bool, effects: bool, **options: Any) -> None:
    """Prints what the same command without ``--dry-run`` will take."""
    from ..costs.estimate import estimate
    from ..models.skeleton import load_tokenizer

    tokenizer = load_tokenizer(model)
    found = estimate(model, common.in_chat_form(pairs, tokenizer, chat), **options)
    if effects:
        found = replace(found, notes=(*found.notes, EFFECTS_NOTE))
    if json:
        common.emit(found.to_json())
        return
    for line in found.lines():
        common.console.print(line)


def check_checkpoint(checkpoint: Path, out: Path, pairs: Sequence[str]) -> None:
    """Refuses a checkpoint that is no file, or would overwrite the result or the pairs."""
    from ..errors import AusteerError
    from ..measuring.checkpoint import check_path

    check_path(checkpoint)
    if checkpoint.absolute() in [out.absolute(), *(Path(path).absolute() for path in pairs)]:
        raise AusteerError(
            f"--checkpoint: found {checkpoint}, which is the result or the pairs; give a name of its own"
        )


def distributed() -> bool:
    """Whether ``accelerate launch`` started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def open_checkpoint(checkpoint: Path, scratch: Path | None, force: bool, resume: bool, main: bool) -> None:
    """With ``--force`` removes an earlier checkpoint; with ``--resume`` says so where there is none."""
    from ..measuring.checkpoint import remove, written
    from ..measuring.processes import Processes

    if force and not resume:
        if distributed():
            Processes.launched().main_first(lambda: remove(checkpoint, scratch))
        else:
            remove(checkpoint, scratch)
    if resume and main and not written(checkpoint):
        common.note(f"{checkpoint}: there is no checkpoint; starting with the first pair")


def show(momentum: Momentum, out: Path, load_seconds: float, json: bool) -> None:
    """What was measured, and how the measurement went."""
    report = momentum.report
    assert report is not None
    report.seconds.load = load_seconds
    if json:
        figures = momentum_file.figures(momentum)
        common.emit({"file": out, **figures, "seconds": report.seconds.total, "report": report.to_json()})
    else:
        momentum_file.show(momentum, out, *report.lines())
