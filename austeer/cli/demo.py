"""``austeer demo``: the whole path on a real model, with its figures."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from ..utils.tables import show_table, signed
from .common import DType, Json, Quiet, check_writable, console, load, next_line
from .search_options import bars, write_result
from .search_text import LEGEND, show_alpha, show_held_out, show_ratio

if TYPE_CHECKING:
    from ..demo.demo import DemoResult


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder for momentum, plan, figure and result.")] = Path(
        "runs/demo"
    ),
    model: Annotated[str, typer.Option("--model", "-m", help="Another model, if you like.")] = "demo",
    dtype: DType = "float32",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Steer SmolLM2-135M-Instruct towards praise, and measure the effect, the side effect and the cost.

    Example: `austeer demo --out runs/demo`
    """
    from ..demo import demo as demonstration
    from ..demo.figures import draw_demo
    from ..utils.figures import require_matplotlib

    require_matplotlib()  # before minutes of work, not after
    check_writable(out / "result.json", force=True)
    say = (lambda text: None) if json else (lambda text: console.print(escape(text)))
    start = time.perf_counter()
    network, tokenizer = load(model, dtype, "cpu")
    say(f"model     {network.config._name_or_path}, loaded in {time.perf_counter() - start:.1f} s")
    show_bars = False if quiet else None
    result, _, _ = demonstration.run(network, tokenizer, out, say=say, step=bars(show_bars), progress=show_bars)
    write_result(result, out / "demo.png", draw_demo, json)
    if json:
        return
    show(result, console)
    console.print(
        f"\n{result.seconds:.0f} s; wrote momentum.safetensors, plan, result.json and demo.png in {out}\n"
        + next_line(
            *("austeer", "generate", out / "plan", "--model", model, "--alpha", show_alpha(result.chosen.alpha)),
            *("--prompt", "My new neighbour is"),
        ),
        markup=False,
    )


def show(result: DemoResult, console: Console) -> None:
    """The result's figures."""
    from ..demo.demo import PROMPTS

    first = result.held_out[0]
    console.print(
        f"\n[bold]Effect on {result.pairs['held-out']} held-out pairs[/]: mean change of log p(positive) - "
        f"log p(negative), nats (unsteered {signed(result.unsteered.log_odds, 2)})"
    )
    show_held_out(result.unsteered, result.held_out, on=console)
    console.print(LEGEND)
    console.print(
        f"groups: topics; every setting's strength was chosen within a KL of {result.max_kl:g} on other neutral text;\n"
        "scale: the paper's operation; random: AUs of the first row's site and number, brought to its side effect"
    )
    if first.kl > result.max_kl:
        console.print(
            f"the limit of {result.max_kl:g} held on the selection part; on held-out text it is {first.kl:.3f}"
        )

    console.print("\n[bold]Generations[/], greedy")
    for i, prompt in enumerate(PROMPTS):
        console.print(f"  [bold]{prompt}[/]")
        for name, texts in result.generations.items():
            console.print(f"    [cyan]{name:<11}[/] {escape(' '.join(texts[i].split()))}")

    console.print("\n[bold]Time per token[/], decoding at batch 1, interleaved rounds")
    rows = [[name, f"{1000 * timing.seconds:.1f}", show_ratio(timing)] for name, timing in result.timings.items()]
    show_table(["path", "ms", "ratio to unsteered [quartiles]"], rows, on=console)
    console.print(
        "fused: its PyTorch definition, as this is a CPU; differences within those of unsteered again are noise"
    )
