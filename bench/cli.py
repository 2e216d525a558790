"""``austeer bench``: steered inference beside unsteered, on any model and machine; and the published report."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from austeer.cli.common import Device, DType, Json, Quiet, console, emit, split_names

if TYPE_CHECKING:
    from .inference import Job
    from .lineup import Case

app = typer.Typer(rich_markup_mode="markdown", context_settings={"help_option_names": ["-h", "--help"]})

#: What ``--full`` measures: for each option its values, the first one in the main case.
FULL = {
    "site": "ffn,attention",
    "operation": "scale,push,shift",
    "k": "100,1,10,1000,all",
    "batch": "1,4,16",
    "layers": "1,3,10",
    "prompt_tokens": "32,256",
    "execution": "eager,compile",
}
#: The ways in the sweeps of ``--full``, which would take hours with all.
SWEPT = ("public", "dense hook", "sparse hook", "columns", "fold", "auto")


@app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    model: Annotated[str, typer.Option("--model", "-m", help="Folder or Hub id; 'demo' is SmolLM2-135M.")] = "demo",
    site: Annotated[
        str, typer.Option(help="attention, ffn, layer, neuron. Of every list: the first is the main case.")
    ] = "ffn",
    operation: Annotated[str, typer.Option(help="scale, push, shift.")] = "scale",
    k: Annotated[str, typer.Option(help="How many AUs, in the whole model; 'all' for all of the site.")] = "100",
    layers: Annotated[str, typer.Option(help="How many layers have AUs. [default: all, or k]")] = "",
    batch: Annotated[str, typer.Option(help="Rows at a time.")] = "1",
    prompt_tokens: Annotated[str, typer.Option(help="Tokens of the prompt.")] = "32",
    execution: Annotated[str, typer.Option(help="eager (generate), compile, graph (CUDA graph, GPU only).")] = "eager",
    variants: Annotated[str, typer.Option(help="Which ways to steer. [default: all that are installed]")] = "",
    tokens: Annotated[int, typer.Option(help="Tokens of a generation.", min=2)] = 8,
    seconds: Annotated[
        float,
        typer.Option(help="How long each case is timed, 12 turns at least; checks come on top.", min=0),
    ] = 60,
    full: Annotated[bool, typer.Option("--full", help="All sites, sizes and executions, as published.")] = False,
    dtype: DType = "auto",
    device: Device = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder of the results.")] = Path("runs/bench"),
    trace: Annotated[
        Path | None, typer.Option(help="Write a Chrome trace (.json or .json.gz) of the main case, and time nothing.")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Two result files of this command: print what changed beyond noise, run nothing."),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure what steering costs: every way on the same model and AUs, checked, then timed token by token in turns.

    Example: `austeer bench --k 100,1,1000 --batch 1,8`

    Lists are comma-separated. The first value of each makes the main case; the others are varied one at a time.
    """
    if context.invoked_subcommand is not None:
        return
    if compare is not None:
        from .changes import compare as compared
        from .changes import show
        from .files import read

        changes = compared(*(read(path, "inference") for path in compare))
        emit(changes.to_json()) if json else show(changes, console)
        return
    from austeer.cli.common import load
    from austeer.errors import AusteerError
    from austeer.models.load import fits

    from .catalogue import chosen
    from .inference import Effort, Job
    from .trace import check_trace_path, show_trace, write_trace

    given = [name for name in FULL if str(context.get_parameter_source(name)).endswith("COMMANDLINE")]
    if full and given:
        raise AusteerError(f"--full: found --{given[0].replace('_', '-')} beside it, expected one of the two")
    if trace is not None:
        check_trace_path(trace)  # before a model is loaded
    ways = chosen(split_names(variants) or None)
    if not fits(model, dtype, device):
        raise AusteerError(
            f"model {model!r}: found less free memory than its weights need; expected a smaller model, a smaller "
            "--dtype, or another --device"
        )
    if trace is None:
        _expect_writable(out)
    loaded, _ = load(model, dtype, device)
    _expect_plain(loaded)
    cases, series = expand(loaded, full_lists(loaded) if full else {name: context.params[name] for name in FULL})
    if trace is not None:
        rows = write_trace(loaded, cases[0], ways, trace)
        emit({"file": trace, "ways": rows}) if json else show_trace(rows, trace, console)
        return
    effort, brief = Effort(seconds=seconds, tokens=tokens), Effort(seconds=seconds / 4, tokens=tokens)
    swept = {name: way for name, way in ways.items() if name in SWEPT or name.startswith("unsteered")}
    thorough = {*series["main"], *series.get("site", ()), *series.get("operation", ())} if full else set(cases)
    jobs = [Job(case, ways, effort) if case in thorough else Job(case, swept, brief) for case in cases]
    _measure(loaded, jobs, series, out, json, quiet)


def _expect_writable(folder: Path) -> None:
    """Refuses, before minutes of work, a folder in which no result can be kept."""
    from austeer.errors import AusteerError

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise AusteerError(f"--out: {folder} cannot be written ({error.strerror}); give another folder") from error


def _expect_plain(model: Any) -> None:
    """Refuses what cannot be copied for the gate and shared between twins."""
    import torch

    from austeer.errors import AusteerError

    devices, quantised = {p.device for p in model.parameters()}, getattr(model, "hf_quantizer", None) is not None
    if len(devices) > 1 or torch.device("meta") in devices or quantised:
        found = "a quantised model" if quantised else f"weights on {sorted(map(str, devices))}"
        raise AusteerError(f"model: found {found}, expected plain weights on one device; give --device cpu or cuda:0")
    if model.device.type == "cuda":
        torch.cuda.set_device(model.device)  # clocks and graphs are the current device's


def full_lists(model: Any) -> dict[str, str]:
    """The lists of ``--full``, as far as the model has so many layers and AUs."""
    from .inference import touched_most

    layers, aus = model.config.get_text_config().num_hidden_layers, touched_most(model, "ffn")

    def fitting(name: str, most: int) -> str:
        return ",".join(text for text in split_names(FULL[name]) if text == "all" or int(text) < most)

    execution = FULL["execution"] + ("" if model.device.type == "cpu" else ",graph")
    touched = f"{fitting('layers', layers)},{layers}"  # the last one is the main case's
    return FULL | {"k": fitting("k", aus), "layers": touched, "execution": execution}


def expand(model: Any, texts: dict[str, str]) -> tuple[list[Case], dict[str, list[Case]]]:
    """The cases that the options ask for, and the sweeps that they make.

    Raises:
        AusteerError: what is no number where one is expected.
    """
    from austeer.errors import AusteerError

    from .inference import sweep, touched_most
    from .lineup import Case

    values: dict[str, list[Any]] = {name: split_names(texts[name]) for name in texts}
    for name, found in values.items():
        option = f"--{name.replace('_', '-')}"
        if not found and name != "layers":
            raise AusteerError(f"{option}: found none, expected at least one value")
        if name not in ("k", "layers", "batch", "prompt_tokens"):
            continue
        for place, text in enumerate(found):
            if name == "k" and text == "all":
                found[place] = touched_most(model, values["site"][0])
            elif not text.isdecimal() or int(text) < 1:
                raise AusteerError(f"{option}: found {text!r}, expected numbers from 1 on, such as 1,16")
            else:
                found[place] = int(text)
    defaults = {name: found[0] for name, found in values.items() if name != "layers"}
    whole = min(defaults["k"], model.config.get_text_config().num_hidden_layers)
    own = values["layers"]
    base = Case(**defaults, layers=own[0] if len(own) == 1 else None)
    if len(own) > 1:  # the main case touches them all, and is the last of the sweep
        values["layers"] = [number for number in own if number != whole] + [None]
    return sweep(base, **values)


def _measure(model: Any, jobs: list[Job], series: dict[str, list[Case]], out: Path, json: bool, quiet: bool) -> None:
    from austeer.utils.progress import Progress

    from . import files, goals, report
    from .inference import KIND, run

    path = files.new_file(out, model.device, KIND)
    content: dict[str, Any] = {}
    with Progress("measuring", None, "turns", False if quiet else None) as bar:
        for content in run(model, model.config._name_or_path, jobs, series, tell=bar.advance):
            files.write(path, content)  # after each case: an interrupted run keeps what it has
    if json:
        emit(content)
        return
    report.show(path, content)
    if reached := goals.table_of([content]):
        report.show_markdown(reached)
    console.print(f"wrote {path}")


@app.command()
def report(
    results: Annotated[Path, typer.Option(help="The folder of results.")] = Path("bench/results"),
    docs: Annotated[Path, typer.Option(help="The folder of pages.")] = Path("docs"),
    readme: Annotated[Path, typer.Option(help="The page that has the main table.")] = Path("README.md"),
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; fail if a page differs from the results.")
    ] = False,
) -> None:
    """Make docs/efficiency.md, its figures, and every measured number in README and docs from the committed results."""
    from .published import write

    changed = write(results, docs, readme, check)
    for line in changed:
        console.print(line, markup=False)
    console.print(
        "all pages are as the results say"
        if not changed
        else f"{len(changed)} files {'differ' if check else 'written'}"
    )
    if check and changed:
        raise typer.Exit(1)
