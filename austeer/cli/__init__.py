"""The command line: one thin file a command.

``austeer COMMAND``; the work is done by the library.
"""

from __future__ import annotations

import sys
from importlib.metadata import entry_points

import typer

from ..errors import AusteerError
from . import (
    causal,
    compare,
    cost,
    demo,
    evaluate,
    export,
    generate,
    help_tables,
    inspect,
    measure,
    momentum,
    pairs,
    probe,
    profile,
    pull,
    push,
    select,
    serve,
    tune,
    verify,
)
from .common import fail, warnings_as_notes

help_tables.install()
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Steer language models by scaling a few single activation dimensions (atomic units, AUs).

Pairs of texts become counters, counters become a plan, a plan steers a model; `tune` does all of it:

```
austeer measure pairs.jsonl --model MODEL --out kind.momentum
austeer inspect kind.momentum
austeer tune pairs.jsonl --model MODEL --budget 5m --out runs/kind
austeer select kind.momentum --site attention --k 10 --operation shift --out plans/kind
austeer generate plans/kind --model MODEL --alpha 8 --prompt "The weekend trip was"
austeer export checkpoint plans/kind --model MODEL --alpha 8 --out models/kind
austeer push plans/kind USER/kind
austeer serve MODEL --sets plans
```

`--model demo` is SmolLM2-135M-Instruct; `austeer demo` shows everything on it.
""",
)
COMMANDS = (
    measure,
    select,
    inspect,
    tune,
    compare,
    evaluate,
    generate,
    verify,
    push,
    pull,
    demo,
    cost,
    causal,
    profile,
)
for module in (*COMMANDS, probe):
    app.command()(getattr(module, module.__name__.rsplit(".", 1)[1]))
app.command(context_settings=serve.SETTINGS)(serve.serve)
app.add_typer(momentum.app, name="momentum")
app.add_typer(export.app, name="export")
app.add_typer(pairs.app, name="pairs")
# What measures imports this package, and nothing here imports it: it is found by its installed name.
for command in entry_points(group="austeer.commands"):
    app.add_typer(command.load(), name=command.name)


@app.callback(invoke_without_command=True)
def version(
    show: bool = typer.Option(False, "--version", help="Print the version and exit.", is_eager=True),
) -> None:
    if show:
        from ..version import __version__

        print(__version__)
        raise typer.Exit


def main() -> None:
    """Exit codes: 0 done, 1 not applied (verify), 2 bad input (one message says what and why), 130 interrupted."""
    run(app)


def run(command: typer.Typer) -> None:
    """Runs a command line, with errors as :func:`main` gives them."""
    try:
        with warnings_as_notes():
            command()
    except AusteerError as error:
        fail(str(error))
    except OSError as error:  # a full disk, a folder that may not be read ...
        fail(f"{error.filename or 'input or output'}: {error.strerror or error}")
    except SystemExit as error:
        interrupt = getattr(error.__context__, "__cause__", None)  # typer makes an exit code of Ctrl-C, without a word
        if isinstance(interrupt, KeyboardInterrupt):
            print(str(interrupt) or "interrupted", file=sys.stderr)
        raise
