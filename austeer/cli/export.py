"""``austeer export``: plans for other programs."""

from __future__ import annotations

import json as json_module
import shlex
from typing import Annotated, Any

import typer

from . import export_checkpoint, export_gguf
from .common import Json, Model, Quiet, console, emit
from .export_options import Alphas, Force, Out, Plans, read_plans, warnings_as_notes

app = typer.Typer(no_args_is_help=True)


@app.callback()
def export() -> None:
    """Write plans as a LoRA adapter, a folded checkpoint or an adapter for llama.cpp."""


@app.command()
def lora(
    plan: Plans,
    model: Model,
    out: Out,
    alpha: Alphas = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16. [default: the weights' own]", show_default=False)
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Of every layer. [default: the smallest that is exact]")] = None,
    rank_pattern: Annotated[
        bool, typer.Option("--rank-pattern", help="Each layer its own rank, none without AUs (PEFT, vLLM).")
    ] = False,
    lora_bias: Annotated[
        bool, typer.Option("--lora-bias", help="Also biases, and so the operation shift (PEFT alone).")
    ] = False,
    experts: Annotated[bool, typer.Option("--experts", help="Also the experts of mixtures (PEFT alone).")] = False,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write plans as one LoRA adapter, for PEFT, vLLM, SGLang and TGI. Needs no GPU, and little memory.

    Example: `austeer export lora plans/kind --model meta-llama/Llama-3.1-8B-Instruct --alpha 8 --out adapters/kind`
    """
    from ..export import export_lora
    from ..export.adapter import CONFIG, TENSORS
    from ..export.output import RECORD, gigabytes
    from ..plans.serving import vllm_rank

    with warnings_as_notes():
        export_lora(
            read_plans(plan, alpha),
            model,
            out,
            dtype=dtype,
            rank=rank,
            rank_pattern=rank_pattern,
            lora_bias=lora_bias,
            experts=experts,
            force=force,
            progress=False if quiet or json else None,
        )
    config, record = (json_module.loads((out / name).read_text(encoding="utf-8")) for name in (CONFIG, RECORD))
    size = (out / TENSORS).stat().st_size
    found = {
        "folder": out,
        "model": record["model"],
        "rank": config["r"],
        "layers": record["layers"],
        "modules": len(config["target_modules"]) + len(config.get("target_parameters", [])),
        "bytes": size,
        "vllm_max_lora_rank": vllm_rank(config["r"]),
        "plans": record["plans"],
    }
    if json:
        emit(found)
        return
    console.print(
        f"rank {config['r']}, {found['modules']} modules, AUs in {len(record['layers'])} layers, {gigabytes(size)}\n"
        f"wrote {out}\n"
        f"next: {_next(found, peft_only=lora_bias or experts)}",
        markup=False,
    )


def _next(found: dict[str, Any], peft_only: bool) -> str:
    """What to do with an adapter."""
    from ..plans.serving import VLLM_DEFAULT_RANK, VLLM_RANKS

    out, limit = found["folder"], found["vllm_max_lora_rank"]
    if peft_only:
        return f'peft.PeftModel.from_pretrained(model, "{out}")  (other engines do not read all of it)'
    if limit is None:
        return f"austeer export checkpoint (vLLM takes ranks up to {VLLM_RANKS[-1]}), or PEFT"
    more = f" --max-lora-rank {limit}" if limit > VLLM_DEFAULT_RANK else ""
    module = shlex.quote(f"{out.name}={out}")
    return f"vllm serve {shlex.quote(found['model'])} --enable-lora{more} --lora-modules {module}"


app.command()(export_checkpoint.checkpoint)
app.command()(export_gguf.gguf)
