"""``austeer export checkpoint``: plans folded into a model's weights."""

from __future__ import annotations

import json as json_module
import shlex
from typing import Annotated

import typer

from .common import Json, Model, Quiet, console, emit, note
from .export_options import Alphas, Force, Out, Plans, read_plans, warnings_as_notes

_COPY = "Copy files that stay as they are; linked otherwise: one file on disk under two names."


def checkpoint(
    plan: Plans,
    model: Model,
    out: Out,
    alpha: Alphas = None,
    copy: Annotated[bool, typer.Option("--copy", help=_COPY)] = False,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fold plans into a model's weights: a checkpoint for any engine. Needs no GPU, and little memory.

    The operation shift becomes biases, where the model's config has them.

    Example: `austeer export checkpoint plans/kind --model meta-llama/Llama-3.1-8B-Instruct --alpha 8 --out kind-8b`
    """
    from ..export.biases import READ_BY_VLLM
    from ..export.checkpoint import export_checkpoint
    from ..export.output import RECORD, gigabytes
    from ..export.tensors import INDEX

    with warnings_as_notes():
        export_checkpoint(
            read_plans(plan, alpha), model, out, force=force, link=not copy, progress=False if quiet or json else None
        )
    record = json_module.loads((out / RECORD).read_text(encoding="utf-8"))
    files = sorted(file for file in out.rglob("*.safetensors"))
    own = [file for file in files if file.stat().st_nlink == 1]
    found = {
        "folder": out,
        "model": record["model"],
        "files": len(files),
        "linked": len(files) - len(own),
        "rewritten": record["rewritten"],
        "bytes": sum(file.stat().st_size for file in own),
        "settings": record.get("biases", {}).get("settings", []),
        "plans": record["plans"],
        "sharded": (out / INDEX).is_file(),
    }
    if "base" in record:
        note(f"{record['model']} had plans folded in already, and has these as well now; see {out / RECORD}")
    if json:
        emit(found)
        return
    family = record["plans"][0]["model"]["model_type"]
    unread = " --model-impl transformers" if found["settings"] and family not in READ_BY_VLLM else ""
    biases = f", new biases ({', '.join(found['settings'])})" if found["settings"] else ""
    console.print(
        f"weight files: {len(files) - found['linked']} written ({gigabytes(found['bytes'])}), {found['linked']} linked"
        f"{biases}\n"
        f"wrote {out}\n"
        f"next: vllm serve {shlex.quote(str(out))}{unread}",
        markup=False,
    )
