"""``austeer cost``: what steering costs on each path, predicted from a model's config."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..utils.tables import show_table
from .common import Json, console, emit, note

if TYPE_CHECKING:
    from ..costs.steering import Pass, SteeringCost


def cost(
    model: Annotated[
        str, typer.Argument(help="A folder with config.json, that file, a Hub id, or 'demo'.", show_default=False)
    ],
    k: Annotated[int, typer.Option(help="How many AUs are steered.")] = 100,
    site: Annotated[str, typer.Option(help="attention, ffn, layer or neuron.")] = "ffn",
    batch: Annotated[int, typer.Option(help="Rows of the batch.")] = 1,
    layers: Annotated[
        int | None, typer.Option(help="How many layers they are in, evenly. [default: all, or k if fewer]")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each row's prompt, for the prefill.")] = 512,
    context: Annotated[int, typer.Option(help="Tokens of each row at the decoded token.")] = 512,
    operation: Annotated[str, typer.Option(help="scale, push, shift or ablate.")] = "scale",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda (an H100 if there is no GPU here). [default: cuda if there is one]")
    ] = None,
    bandwidth: Annotated[
        float | None, typer.Option(help="Bytes a second. [default: measured now]", show_default=False)
    ] = None,
    flops: Annotated[
        float | None, typer.Option(help="Operations a second in products. [default: measured now]", show_default=False)
    ] = None,
    launch: Annotated[
        float | None, typer.Option(help="Seconds for one more launch. [default: measured now]", show_default=False)
    ] = None,
    execution: Annotated[str, typer.Option(help="eager, graph (a CUDA graph) or compile.")] = "eager",
    host_us: Annotated[
        float | None,
        typer.Option(help="Host us a launch of the model, eager. [default: measured now]", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """Predict what steering costs on each path: bytes, operations, launches, the device's and the host's time.

    Nothing is downloaded but the config, and nothing is run.

    Example: `austeer cost meta-llama/Llama-3.1-8B --k 100 --device cuda`
    """
    import torch
    from transformers.utils import logging

    from ..costs.steering import steering_cost

    logging.set_verbosity_error()  # details of the config would stand in the table
    found = steering_cost(
        model,
        site,
        k,
        layers=layers,
        batch=batch,
        prompt_tokens=prompt_tokens,
        context=context,
        operation=operation,
        dtype=dtype,
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        bandwidth=bandwidth,
        flops=flops,
        launch=launch,
        execution=execution,
        host_us=host_us,
    )
    if json:
        emit({"config": model, **found.to_json()})
        return
    console.print(
        f"[bold]{model}[/] ({found.model}, {found.dtype}, {found.device}):\n"
        f"{operation} of {k} AUs at site {site}, in {len(found.aus)} of {found.layers} layers\n{_rates(found)}"
    )
    _show_pass("One decoded token a row", found, found.decode)
    _show_pass("The prompt", found, found.prefill)
    for way, reason in found.refused.items():
        console.print(f"  {way:<11} not possible: {reason}")
    console.print(
        "Beyond the model's own: bytes moved, floating-point operations, operations called (launches), bytes kept.\n"
        "device: bytes and launches at the ceilings. host: calling the operations, in eager mode.\n"
        "public: the paper's code, at every layer. lora: as an adapter that is not merged.",
        style="dim",
    )
    for text in found.notes:
        note(text)
    console.print(found.conclusion())


def _rates(found: SteeringCost) -> str:
    """What the seconds were worked out with, and how: a line each."""
    limits, host = found.ceilings, found.host
    rates = f"{_short(limits.bandwidth)}B/s, {_short(limits.flops)} operations/s, {limits.launch * 1e6:.1f} us a launch"
    lines = [f"device: {rates}", f"        {limits.source}"]
    if found.execution != "eager":
        return "\n".join([*lines, f"{found.execution}: a pass takes the device's time"])
    both = "both, one after the other" if found.device == "cpu" else "the longer of the two"
    lines += [f"host:   {host.launch * 1e6:.1f} us a launch, {host.source}", f"eager:  a pass takes {both}"]
    return "\n".join(lines)


def _show_pass(title: str, found: SteeringCost, done: Pass) -> None:
    itself = done.unsteered
    title = f"{title}: {found.batch} x {done.tokens // found.batch} tokens, {done.past} in the cache"
    console.print(f"\n[bold]{title}: {_time(done.seconds)}[/]")
    launches = "?" if itself.launches is None else f"{itself.launches}"
    cells = [_short(itself.bytes), _short(itself.operations), launches, _time(done.device), _time(done.host)]
    rows = [["unsteered", *cells, "", ""]]
    for way, extra in done.extra.items():
        work = extra.work
        rows.append(
            [
                way,
                f"+{_short(work.bytes)}",
                f"+{_short(work.operations)}",
                f"+{work.launches}",
                f"+{_time(extra.device)}",
                f"+{_time(extra.host)}",
                f"{100 * extra.overhead:.2f} %",
                _short(found.memory[way]),
            ]
        )
    columns = ["", "bytes", "operations", "launches", "device", "host", "overhead", "kept"]
    show_table(columns, rows, right=True)


def _short(value: float) -> str:
    """With a decimal prefix: 15.0 G, 3.2 M."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f} {prefix}"
    return f"{value:.0f}"


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{1e3 * seconds:.2f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.1f} us"
