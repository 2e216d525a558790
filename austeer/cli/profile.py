"""``austeer profile``: a model -> its side-effect profile."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import common
from .common import Device, DType, Json, Model, Quiet
from .momentum_file import ForceAnew, Resume
from .search_options import Neutral, read_neutral

if TYPE_CHECKING:
    from ..momentum.profile import Profile


def profile(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="The profile to write (safetensors).", show_default=False)],
    sites: Annotated[
        str | None,
        typer.Option(help="attention, ffn, layer, neuron; comma-separated. [default: what there is of all but layer]"),
    ] = None,
    error: Annotated[
        float | None, typer.Option(help="Relative standard error of a predicted KL. [default: 0.1]", show_default=False)
    ] = None,
    draws: Annotated[
        int | None,
        typer.Option(help="Draws of all texts together. [default: what --error takes]", min=1, show_default=False),
    ] = None,
    neutral: Neutral = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    batch_tokens: Annotated[int, typer.Option(help="Tokens in a batch, with padding.", min=1)] = 1024,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Keep one layer's activations at a time: less memory, more time.")
    ] = False,
    dtype: DType = "auto",
    device: Device = None,
    resume: Resume = False,
    force: ForceAnew = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find out once what shifts of a model's AUs do to neutral text: the KL of any plan of shifts, without running it.

    Example: `austeer profile --model demo --out demo.profile`

    An interrupted run is kept in OUT.checkpoint, batch by batch; `--resume` goes on.
    """
    from ..errors import AusteerError
    from ..measuring.profiling import prepare_profile

    common.check_writable(out, force)
    texts, checkpoint = read_neutral(neutral), out.with_name(f"{out.name}.checkpoint")
    if force and not resume:
        checkpoint.unlink(missing_ok=True)
    if checkpoint.exists() and not resume:
        raise AusteerError(f"{checkpoint}: found what an interrupted run kept; go on with --resume, or --force anew")
    network, tokenizer = common.load(model, dtype, device)
    prepared = prepare_profile(
        network,
        tokenizer,
        None if sites is None else common.split_names(sites),
        texts,
        draws=draws,
        error=error,
        batch_tokens=batch_tokens,
        recompute=recompute,
        seed=seed,
    )
    memory = prepared.memory()
    if not (quiet or json):
        common.console.print(
            f"will hold {memory.device / 1e9:.1f} GB beside the weights for {memory.batch:,} tokens at a time (less "
            f"with --batch-tokens or --recompute), and twice {memory.rows / 1e9:.2f} GB of draws in the CPU's memory"
        )
    start = time.perf_counter()
    made = prepared.run(checkpoint, resume, progress=False if quiet else None)
    seconds = time.perf_counter() - start
    made.save(out)
    checkpoint.unlink(missing_ok=True)
    show(made, out, seconds, asdict(memory), json)


def show(made: Profile, out: Path, seconds: float, memory: dict[str, int], json: bool) -> None:
    """What was made, and how far it can be trusted."""
    several = len(made.texts.unique()) > 1
    found = {
        "file": out,
        "sites": list(made.rows),
        "draws": len(made.tokens),
        "texts": len(made.texts.unique()),
        "source": made.texts_name,
        "error": made.error,
        "spread": made.spread if several else None,
        "memory": memory,
        "bytes": out.stat().st_size,
        "seconds": seconds,
    }
    if json:
        common.emit(found)
        return
    units = sum(rows[0].numel() for rows in made.rows.values())
    common.console.print(
        f"{len(made.tokens)} draws of {found['texts']} texts ({made.texts_name}), {units:,} AUs of "
        f"{', '.join(made.rows)}\n"
        f"a predicted KL has a standard error of {made.error:.0%}"
        f"{f'; by the spread between halves of the texts {made.spread:.0%}' if several else ''}\n"
        f"wrote {out} ({out.stat().st_size / 1e6:.0f} MB) in {seconds:.0f} s"
    )
