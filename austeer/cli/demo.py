"""``austeer demo``: the whole path on a real model, with its figures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .common import DType, Json, Quiet, check_writable, console, emit, load, to_json

if TYPE_CHECKING:
    from ..demo import DemoResult


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
    from .. import demo as demonstration
    from ..figures import draw_demo, require_matplotlib
    from ..progress import Progress

    @contextmanager
    def step(what: str, total: int) -> Iterator[Callable[[], None]]:
        with Progress(what, total, "steps", False if quiet or json else None) as bar:
            yield bar.advance

    require_matplotlib()  # before minutes of work, not after
    check_writable(out / "result.json", force=True)
    say = (lambda text: None) if json else (lambda text: console.print(escape(text)))
    start = time.perf_counter()
    network, tokenizer = load(model, dtype, "cpu")
    say(f"model     {network.config._name_or_path}, loaded in {time.perf_counter() - start:.1f} s")
    result, _, _ = demonstration.run(
        network, tokenizer, out, say=say, step=step, progress=False if quiet or json else None
    )
    (out / "result.json").write_text(to_json(result.to_json()) + "\n", encoding="utf-8")
    draw_demo(result, out / "demo.png")
    if json:
        emit({"out": out, **result.to_json()})
        return
    show(result, console)
    console.print(
        f"\n{result.seconds:.0f} s; wrote momentum.safetensors, plan, result.json and demo.png in {out}\n"
        f"try: austeer generate {out}/plan --model {model} --alpha {result.chosen.alpha:.3g} "
        '--prompt "My new neighbour is"'
    )


def show(result: DemoResult, console: Console) -> None:
    """The result's figures."""
    from ..demo import MAX_SIDE_EFFECT, PROMPTS

    pairs = result.pairs
    console.print(
        f"\n[bold]Effect on {pairs['held-out']} held-out pairs[/]: mean change of log p(positive) - log p(negative), "
        f"nats\n(unsteered {result.base_log_odds:+.2f}). up: share of pairs; side effect: rise of the cross-entropy on "
        "held-out neutral text, nats a token"
    )
    table = Table("steering", "alpha", escape("effect [interval]"), "up", "side effect", box=None, pad_edge=False)
    for row in result.held_out:
        table.add_row(
            row.name,
            f"{row.alpha:.3g}",
            escape(f"{row.effect:+.2f} [{row.low:+.2f}, {row.high:+.2f}]"),
            f"{row.share:.0%}",
            f"{row.side_effect:+.3f}",
        )
    console.print(table)
    console.print(
        "intervals: 95 % over topics; random AUs, with strengths of the same norm: the least and greatest seed"
    )
    if result.held_out[0].side_effect > MAX_SIDE_EFFECT:
        console.print(
            f"the limit of {MAX_SIDE_EFFECT} on the side effect held on the selection part, and on this text it is "
            f"{result.held_out[0].side_effect:.3f}"
        )

    console.print("\n[bold]Generations[/], greedy")
    for i, prompt in enumerate(PROMPTS):
        console.print(f"  [bold]{prompt}[/]")
        for name, texts in result.generations.items():
            console.print(f"    [cyan]{name:<11}[/] {escape(' '.join(texts[i].split()))}")

    console.print("\n[bold]Time per token[/], decoding at batch 1, interleaved rounds")
    table = Table("path", "ms", escape("ratio to unsteered [quartiles]"), box=None)
    for name, timing in result.timings.items():
        spread = escape(f"{timing.ratio:.3f} [{timing.low:.3f}, {timing.high:.3f}]")
        table.add_row(name, f"{1000 * timing.seconds:.1f}", spread)
    console.print(table)
    console.print(
        "fused: its PyTorch definition, as this is a CPU; differences within those of unsteered again are noise"
    )
