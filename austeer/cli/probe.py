"""``austeer probe``: two files of prompts -> a probe that tells when a plan is wanted."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import common
from .common import Chat, ChatOption, Device, DType, Force, Json, Model, PromptField, Quiet, System

if TYPE_CHECKING:
    from ..plans.probe import Probe


def probe(
    model: Model,
    positive: Annotated[
        str, typer.Option("--positive", help="Prompts after which the plan is to run: a .txt, one a line, or JSONL.")
    ],
    negative: Annotated[str, typer.Option("--negative", help="Others, as they come.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The probe to write (safetensors).", show_default=False)],
    rate: Annotated[float, typer.Option(help="Share of prompts like --negative on which it may fire.")] = 0.01,
    site: Annotated[str, typer.Option(help="attention, ffn, layer or neuron.")] = "layer",
    layer: Annotated[int | None, typer.Option(help="Where it reads. [default: the best]", show_default=False)] = None,
    prompt_field: PromptField = "prompt",
    chat: Chat = False,
    chat_option: ChatOption = None,
    system: System = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens in a batch, with padding. [default: what suits the device]")
    ] = None,
    dtype: DType = "auto",
    device: Device = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find what tells prompts that a plan is for from others, with a known rate of false positives.

    Example: `austeer probe --model demo --positive french.txt --negative other.txt --rate 0.02 --out french.probe`

    `austeer generate PLAN --when french.probe` then steers what follows such prompts, and nothing else.
    """
    from ..making.prompts import read_prompts
    from ..measuring.probing import fit_probe

    common.check_writable(out, force)
    wanted, others = (read_prompts(source, field=prompt_field) for source in (positive, negative))
    form = common.chat_form(chat, chat_option, system)
    network, tokenizer = common.load(model, dtype, device)
    start = time.perf_counter()
    made = fit_probe(
        network,
        tokenizer,
        wanted,
        others,
        site=site,
        layer=layer,
        false_positive_rate=rate,
        chat=form,
        batch_tokens=batch_tokens,
        progress=False if quiet else None,
    )
    seconds = time.perf_counter() - start
    made.save(out)
    _show(made, out, (len(wanted), len(others)), seconds, json)


def _show(made: Probe, out: Path, counts: tuple[int, int], seconds: float, json: bool) -> None:
    """Where it reads, and what it did to prompts that were kept for that."""
    found = made.evidence
    assert found is not None
    if json:
        figures = {"site": made.site, "layer": made.layer, "threshold": made.threshold, **asdict(found)}
        common.emit({"file": out, "positive": counts[0], "negative": counts[1], **figures, "seconds": seconds})
        return
    common.console.print(
        f"{made.site} of layer {made.layer}, above {made.threshold:.4g}; {counts[0]} positive and {counts[1]} negative "
        f"prompts in {seconds:.0f} s\n"
        f"asked for at most {found.asked:.2%} false positives: by {found.calibration} negative prompts "
        f"{found.expected_low:.2%} to {found.expected_high:.2%}\n"
        f"on held-out prompts, with 95 % intervals:\n"
        f"  false positives {found.false_positives}\n"
        f"  true positives  {found.true_positives}\n"
        f"  AUC             {found.auc:.3f}\n"
        f"wrote {out}",
        markup=False,
    )
