"""``austeer export``: plans for other programs."""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import Json, Model, Quiet, console, emit, next_line, note
from .replays import Replay, with_replay
from .strength import KL, ProfileFile, parse_alphas, parse_kls, with_doses

if TYPE_CHECKING:
    from ..plans.plan import Plan

Plans = Annotated[list[str], typer.Argument(help="A plan's folder or Hub id; effects of several add up.")]
Alphas = Annotated[
    list[str] | None,
    typer.Option(
        "--alpha",
        "-a",
        metavar="NUMBER",
        help="Strength: one for all plans, or one for each (with commas). [1]",
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="The folder to make.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is in --out.")]
_COPY = "Copy files that stay as they are; linked otherwise: one file on disk under two names."

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
    kl: KL = None,
    profile: ProfileFile = None,
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
    replay: Replay = False,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write plans as one LoRA adapter, for PEFT, vLLM, SGLang and TGI. Needs no GPU, and little memory.

    Example: `austeer export lora plans/kind --model meta-llama/Llama-3.1-8B-Instruct --alpha 8 --out adapters/kind`
    """
    from ..errors import count_of
    from ..export import export_lora
    from ..export.adapter import CONFIG, TENSORS
    from ..export.output_files import RECORD, REPLAY, gigabytes
    from ..plans.serving import vllm_rank

    plans, predicted = read_plans(plan, alpha, kl, profile)
    plans = with_replay(plans, model, out, force, quiet) if replay else plans
    export_lora(
        plans,
        model,
        out,
        dtype=dtype,
        rank=rank,
        rank_pattern=rank_pattern,
        lora_bias=lora_bias,
        experts=experts,
        force=force,
        progress=False if quiet else None,
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
        "predicted": predicted or None,
        "replay": (out / REPLAY).exists(),
    }
    if json:
        emit(found)
        return
    layers = count_of(len(record["layers"]), "layer")
    console.print(
        f"rank {config['r']}, {count_of(found['modules'], 'module')}, AUs in {layers}, {gigabytes(size)}\n"
        f"{_predicted_line(predicted)}{_wrote(found)}\n" + _next(found, peft_only=lora_bias or experts),
        markup=False,
    )


@app.command()
def checkpoint(
    plan: Plans,
    model: Model,
    out: Out,
    alpha: Alphas = None,
    kl: KL = None,
    profile: ProfileFile = None,
    copy: Annotated[bool, typer.Option("--copy", help=_COPY)] = False,
    replay: Replay = False,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fold plans into a model's weights: a checkpoint for any engine. Needs no GPU, and little memory.

    The operation shift becomes biases, where the model's config has them; of the site layer, its last projection's.

    Example: `austeer export checkpoint plans/kind --model meta-llama/Llama-3.1-8B-Instruct --alpha 8 --out kind-8b`
    """
    from ..export.biases import READ_BY_VLLM
    from ..export.checkpoint import export_checkpoint
    from ..export.model_weights import INDEX
    from ..export.output_files import RECORD, REPLAY, gigabytes

    plans, predicted = read_plans(plan, alpha, kl, profile)
    plans = with_replay(plans, model, out, force, quiet) if replay else plans
    export_checkpoint(plans, model, out, force=force, link=not copy, progress=False if quiet else None)
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
        "predicted": predicted or None,
        "replay": (out / REPLAY).exists(),
        "sharded": (out / INDEX).is_file(),
    }
    if "base" in record:
        note(f"{record['model']} had plans folded in already, and has these as well now; see {out / RECORD}")
    if json:
        emit(found)
        return
    family = record["plans"][0]["model"]["model_type"]
    unread = ["--model-impl", "transformers"] if found["settings"] and family not in READ_BY_VLLM else []
    biases = f", new biases ({', '.join(found['settings'])})" if found["settings"] else ""
    console.print(
        f"weight files: {len(files) - found['linked']} written ({gigabytes(found['bytes'])}), {found['linked']} linked"
        f"{biases}\n"
        f"{_predicted_line(predicted)}{_wrote(found)}\n" + next_line("vllm", "serve", out, *unread),
        markup=False,
    )


@app.command()
def gguf(
    plan: Plans,
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to make, FILE.gguf.")],
    alpha: Alphas = None,
    kl: KL = None,
    profile: ProfileFile = None,
    dtype: Annotated[str, typer.Option(help="Of an adapter: float32 or float16.")] = "float32",
    architecture: Annotated[
        str | None, typer.Option(help="general.architecture of the model's GGUF. [default: its family's]")
    ] = None,
    replay: Replay = False,
    force: Annotated[bool, typer.Option("--force", help="Replace --out.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write plans for llama.cpp: a LoRA adapter (scale, ablate) or a control vector (shift at the sites layer and ffn).

    --model is what the GGUF was converted from. Any quantisation of it can be served with the file.

    Example: `austeer export gguf plans/kind --model Qwen/Qwen3-8B --alpha 8 --out kind.gguf`
    """
    from ..export.gguf import export_gguf
    from ..export.output_files import gigabytes

    plans, predicted = read_plans(plan, alpha, kl, profile)
    plans = with_replay(plans, model, out, force, quiet, file=True) if replay else plans
    export_gguf(
        plans,
        model,
        out,
        dtype=dtype,
        architecture=architecture,
        force=force,
        progress=False if quiet else None,
    )
    vector = plans[0][0].operation == "shift"
    size = out.stat().st_size
    if json:
        kind = "controlvector" if vector else "lora"
        emit(
            {
                "file": out,
                "kind": kind,
                "bytes": size,
                "alphas": [strength for _, strength in plans],
                "predicted": predicted or None,
            }
        )
        return
    option = "--control-vector" if vector else "--lora"
    console.print(
        f"{'control vector' if vector else 'LoRA adapter'}, {gigabytes(size)}\n"
        f"{_predicted_line(predicted)}wrote {out}\n" + next_line("llama-server", "-m", "MODEL.gguf", option, out),
        markup=False,
    )


def _next(found: dict[str, Any], peft_only: bool) -> str:
    """What to do with an adapter."""
    from ..plans.serving import VLLM_DEFAULT_RANK, VLLM_RANKS

    out, limit = found["folder"], found["vllm_max_lora_rank"]
    if peft_only:
        return f"next: peft.PeftModel.from_pretrained(model, {str(out)!r})  (other engines do not read all of it)"
    if limit is None:
        return f"next: austeer export checkpoint (vLLM takes ranks up to {VLLM_RANKS[-1]}), or PEFT"
    more = ["--max-lora-rank", limit] if limit > VLLM_DEFAULT_RANK else []
    return next_line("vllm", "serve", found["model"], "--enable-lora", *more, "--lora-modules", f"{out.name}={out}")


def read_plans(
    names: Sequence[str], alphas: Sequence[str] | None, kl: Sequence[str] | None, profile: Path | None
) -> tuple[list[tuple[Plan, float]], dict[str, float]]:
    """Plans from folders or the Hub, each with its strength; and, with --kl, what was predicted."""
    from ..errors import PlanError
    from ..export.edits import with_alphas
    from ..plans.plan import Plan

    given, kls = parse_alphas(alphas) or [1.0], parse_kls(kl, alphas or (), profile)
    if len(given) not in (1, len(names)):
        raise PlanError(f"--alpha: found {len(given)} for {len(names)} plans, expected one, or one for each plan")
    if len(kls) > 1:
        raise PlanError(f"--kl: found {len(kls)}, expected one, of one plan")
    plans = list(map(Plan.from_pretrained, names))
    if not kls:
        return list(zip(plans, given if len(given) > 1 else given * len(plans))), {}
    found = with_alphas([with_doses({name: plan}, profile)[0][name] for name, plan in zip(names, plans)], kl=kls[0])
    return found, {"kl": kls[0], "alpha": found[0][1]}


def _wrote(found: dict[str, Any]) -> str:
    return f"wrote {found['folder']}{', with a replay for austeer verify' if found['replay'] else ''}"


def _predicted_line(predicted: dict[str, float]) -> str:
    """Which strength a KL has become: no model is run here, so it is a prediction."""
    if not predicted:
        return ""
    far = "; only small ones are predicted well, see austeer evaluate" if predicted["kl"] > 0.2 else ""
    return f"alpha {predicted['alpha']:.4g}, predicted for a KL of {predicted['kl']:g} nats a token{far}\n"
