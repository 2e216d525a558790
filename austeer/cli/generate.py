"""``austeer generate``: a plan's text beside the unsteered one."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from .common import Device, DType, Json, Model, console, emit, load, note


def generate(
    plan: Annotated[Path, typer.Argument(help="A plan's folder, of austeer select.")],
    model: Model,
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="What to continue; may be repeated.")],
    alpha: Annotated[list[float] | None, typer.Option("--alpha", "-a", help="Strength; may be repeated. [1]")] = None,
    k: Annotated[int | None, typer.Option(help="Only the k most important AUs. [default: all]")] = None,
    mode: Annotated[str, typer.Option(help="auto, fold, fused, columns or dense.")] = "auto",
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts through the model's chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.", min=1)] = 40,
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of greedy decoding.")] = False,
    temperature: Annotated[float, typer.Option(help="With --sample.", min=0.01)] = 1.0,
    seed: Annotated[int, typer.Option(help="With --sample.", min=0, max=2**63 - 1)] = 0,
    report: Annotated[bool, typer.Option("--report", help="Show which path each site took.")] = False,
    dtype: DType = "auto",
    device: Device = None,
    json: Json = False,
) -> None:
    """Continue prompts unsteered and steered, side by side.

    Example: `austeer generate plans/kind --model demo --alpha 8 --prompt "The weekend trip was"`
    """
    from ..generation import continue_prompts
    from ..plan import Plan
    from ..steering import steer

    loaded = Plan.from_pretrained(plan)
    strengths = alpha or [1.0]
    network, tokenizer = load(model, dtype, device)
    write = partial(
        continue_prompts,
        network,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        chat=chat,
        seed=seed,
        temperature=temperature if sample else None,
    )
    if loaded.chat_template != chat:
        form = "through" if loaded.chat_template else "without"
        note(f"the plan was measured {form} a chat template, and these prompts are not; see --chat")
    steering = steer(network, loaded, strengths[0], k=k, mode=mode)
    results = {"unsteered": write()}
    with steering:
        for strength in strengths:
            steering.alpha = strength
            results[f"alpha {strength:.12g}"] = write()
    if json:
        emit({"prompts": prompt, "continuations": results, "report": [vars(row) for row in steering.report()]})
        return
    for i, text in enumerate(prompt):
        console.print(f"[bold]{_plain(text)}[/]")
        for name, texts in results.items():
            console.print(f"  [cyan]{name:<12}[/] {_plain(texts[i])}")
    if report:
        console.print(str(steering.report()))


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(" ".join(text.split()))
