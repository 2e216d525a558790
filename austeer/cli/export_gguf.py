"""``austeer export gguf``: plans for llama.cpp."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from .common import Json, Model, Quiet, console, emit
from .export_options import Alphas, Plans, read_plans, warnings_as_notes


def gguf(
    plan: Plans,
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to make, FILE.gguf.")],
    alpha: Alphas = None,
    dtype: Annotated[str, typer.Option(help="Of an adapter: float32 or float16.")] = "float32",
    architecture: Annotated[
        str | None, typer.Option(help="general.architecture of the model's GGUF. [default: its family's]")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace --out.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write plans for llama.cpp: a LoRA adapter (scale) or a control vector (shift at the sites layer and ffn).

    --model is what the GGUF was converted from. Any quantisation of it can be served with the file.

    Example: `austeer export gguf plans/kind --model Qwen/Qwen3-8B --alpha 8 --out kind.gguf`
    """
    from ..export.gguf import export_gguf
    from ..export.output import gigabytes

    plans = read_plans(plan, alpha)
    with warnings_as_notes():
        export_gguf(
            plans,
            model,
            out,
            dtype=dtype,
            architecture=architecture,
            force=force,
            progress=False if quiet or json else None,
        )
    vector = plans[0][0].operation == "shift"
    size = out.stat().st_size
    if json:
        kind = "controlvector" if vector else "lora"
        emit({"file": out, "kind": kind, "bytes": size, "alphas": [strength for _, strength in plans]})
        return
    option = "--control-vector" if vector else "--lora"
    console.print(
        f"{'control vector' if vector else 'LoRA adapter'}, {gigabytes(size)}\n"
        f"wrote {out}\n"
        f"next: llama-server -m MODEL.gguf {option} {shlex.quote(str(out))}",
        markup=False,
    )
