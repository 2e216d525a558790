"""``austeer measure``: pairs and a model -> a momentum file."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from .common import Device, DType, Json, Model, Quiet, check_writable, console, emit, load, split_names


def measure(
    pairs: Annotated[Path, typer.Argument(help="JSONL, JSON or CSV with a prompt and two continuations a row.")],
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="The momentum file to write (safetensors).")],
    sites: Annotated[str, typer.Option(help="attention, ffn, layer, neuron; comma-separated.")] = "attention,ffn",
    prompt_field: Annotated[str, typer.Option(help="The name of the prompt's field.")] = "prompt",
    positive_field: Annotated[str, typer.Option(help="The name of the desired continuation's field.")] = "positive",
    negative_field: Annotated[str, typer.Option(help="The name of the undesired continuation's field.")] = "negative",
    where: Annotated[list[str] | None, typer.Option(help="Only rows where FIELD=VALUE; may be repeated.")] = None,
    limit: Annotated[int | None, typer.Option(help="Read at most so many pairs.", min=2)] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts through the model's chat template.")] = False,
    max_length: Annotated[int | None, typer.Option(help="Cut texts on the left to so many tokens.", min=1)] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens in a batch, with padding.", min=1)] = None,
    dtype: DType = "auto",
    device: Device = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite --out.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Count on contrastive pairs how often each AU is larger on the desired text (activation momentum).

    Example: `austeer measure pairs.jsonl --model demo --out kind.momentum`
    """
    from ..errors import PairsError
    from ..momentum import measure as measure_momentum
    from ..pairs import load_pairs

    check_writable(out, force)
    for condition in where or ():
        if "=" not in condition:
            raise PairsError(f"--where: found {condition!r}, expected FIELD=VALUE")
    loaded = load_pairs(
        pairs,
        prompt=prompt_field,
        positive=positive_field,
        negative=negative_field,
        where=dict(condition.split("=", 1) for condition in where or ()),
        limit=limit,
    )
    network, tokenizer = load(model, dtype, device)
    if chat:
        loaded = loaded.with_chat_template(tokenizer)
    start = time.perf_counter()
    momentum = measure_momentum(
        network,
        tokenizer,
        loaded,
        split_names(sites),
        batch_tokens=batch_tokens,
        max_length=max_length,
        progress=False if quiet else None,
    )
    seconds = time.perf_counter() - start
    momentum.save(out)
    if json:
        emit(
            {
                "file": out,
                "pairs": momentum.pairs,
                "cut": momentum.cut,
                "identical": momentum.identical,
                "sites": {name: list(c.positive.shape) for name, c in momentum.sites.items()},
                "seconds": seconds,
            }
        )
        return
    console.print(f"{momentum.pairs} pairs on {momentum.model.name} in {seconds:.1f} s")
    for name, counters in momentum.sites.items():
        layers, width = counters.positive.shape
        console.print(f"  {name:<9} {layers} layers x {width} AUs")
    if momentum.cut:
        console.print(f"  {momentum.cut} texts were cut on the left to fit")
    if momentum.identical:
        console.print(f"  {momentum.identical} pairs have equal sides and count for nothing")
    console.print(f"wrote {out}\nnext: austeer inspect {out}")
