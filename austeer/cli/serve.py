"""``austeer serve``: vLLM's server with the plugin's options."""

from __future__ import annotations

import os
import shlex
import sys
from importlib.util import find_spec
from typing import Annotated

import typer

from .common import console

#: For ``app.command``: what is not ours is vLLM's.
SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A folder or Hub id, as vLLM takes it.")],
    sets: Annotated[
        str, typer.Option("--sets", help="A folder of plans, a JSON file, or JSON: what requests may name.")
    ],
    show: Annotated[bool, typer.Option("--print", help="Print the command; start nothing.")] = False,
) -> None:
    """Start vLLM's server, steered by the plans that its requests name.

    Example: `austeer serve MODEL --sets plans/ --port 8000`

    Further options are those of `vllm serve`. A request names a plan of the folder, and its strength:
    `"vllm_xargs": {"austeer": "kind", "austeer_alpha": 8}`. Plans come and go while the server runs.
    """
    from ..errors import AusteerError
    from ..plans.serving import MIDDLEWARE, PROCESSOR, SCHEDULER, VARIABLE
    from ..vllm.sets import parse

    parse(sets)
    options = ["--logits-processors", PROCESSOR, "--scheduler-cls", SCHEDULER, "--middleware", MIDDLEWARE]
    command = ["serve", model, *options, *context.args]
    if show:
        print(f"{VARIABLE}={shlex.quote(sets)} vllm {shlex.join(command)}")
        return
    if find_spec("vllm") is None or find_spec("vllm.entrypoints") is None:
        raise AusteerError("found no vLLM in this environment, expected it beside austeer; pip install vllm")
    console.print(f"vllm {shlex.join(command)}", markup=False)
    arguments = [sys.executable, "-m", "vllm.entrypoints.cli.main", *command]
    os.execve(sys.executable, arguments, {**os.environ, VARIABLE: sets})
